"""Token sequences as one tree, laid out for forward passes in which no token is computed twice.

Requests share much: a few-shot prompt, an item's context before its options. All sequences go into one radix tree, the
tree is cut into rows, and rows are packed into batches of one long stream each:

- a *row* is a run of the stream whose tokens attend to each other as ancestors (a chain, or a small subtree);
- a *trunk* is a chain row that rows below it attend to as well, each of them to all of it; kept for later batches.

So attention costs what the tree needs, and every other layer of the model sees one dense stream without padding. What
is a row of its own and what is a trunk is decided by `Costs`. Pure numpy; no model in here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

SHORT = 32  # a row costs as if it were longer by this
ROW = 512  # longest subtree in one row
LEAST = 128  # tokens of a batch that is made for the sake of batches abreast


@dataclass(frozen=True)
class Costs:
    """In token pairs of attention, per layer; the defaults are a 135M model's on a CPU. Only their order of magnitude matters.

    call: one more attention call. join: per token, the attention to a trunk joined with the row's own. token: a token
    through everything but attention.
    """

    call: float = 1500.0
    join: float = 20.0
    token: float = 400.0


USUAL = Costs()


@dataclass(frozen=True)
class Scored:
    """A sequence to be scored: `tokens` as the model sees them, and `targets`, which follow its last positions.

    Target k is predicted at position len(tokens) - len(targets) + k.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass
class _Node:
    """A run of tokens that one set of sequences shares. ends: sequences that end with it."""

    tokens: Ints
    depth: int
    children: list[_Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    size: int = 0  # tokens of the subtree
    longest: int = 0  # tokens from here to its deepest end
    row: int = -1
    offset: int = 0
    parent: _Node | None = None
    split: bool = False
    cost: float = 0.0
    copied: int = 0  # tokens of the subtree that are computed more than once


@dataclass(frozen=True)
class Row:
    """Tokens that lie together in a stream. ends: for each token, where its subtree ends within the row.

    trunks: rows that all of its tokens attend to, outermost first. chain: every token attends to all before it.
    """

    tokens: Ints
    positions: Ints
    ends: Ints
    trunks: tuple[int, ...]
    chain: bool


@dataclass(frozen=True)
class Link:
    """Tokens start to stop of a stream attend to all tokens of trunk `row`.

    source: its place in the same stream, or None: it was kept from an earlier batch. begin: its first position.
    """

    start: int
    stop: int
    row: int
    source: tuple[int, int] | None
    begin: int


@dataclass(frozen=True)
class Bucket:
    """Rows of nearly one length: stream indices [rows, length], padded with each row's last token.

    mask: True where the query (second axis) may see the key (third): [rows, length, length]; None for chains.
    """

    index: Ints
    mask: NDArray[np.bool_] | None
    positions: Ints


@dataclass(frozen=True)
class Batch:
    """One forward pass. tokens, positions: of the stream [T]. buckets: cover it; back: stream index -> its place among
    the buckets' padded tokens. links: outermost trunks first. keep: (row, start, stop) of trunks that later batches
    need; drop: trunks that no later batch needs. wanted: stream indices whose logits are needed [N]; reads: for each
    reading its index into wanted, the target token and the sequence, [3, R].
    """

    tokens: Ints
    positions: Ints
    buckets: tuple[Bucket, ...]
    back: Ints
    links: tuple[Link, ...]
    keep: tuple[tuple[int, int, int], ...]
    drop: tuple[int, ...]
    wanted: Ints
    reads: Ints


@dataclass(frozen=True)
class Statistics:
    """What a layout costs. requested: tokens of all sequences; planned: that are computed; pairs: of attention."""

    sequences: int
    requested: int
    planned: int
    logits: int
    pairs: int
    batches: int


@dataclass(frozen=True)
class Layout:
    """Batches of all sequences, in order, and what they cost."""

    batches: tuple[Batch, ...]
    statistics: Statistics


def layout(
    sequences: Sequence[Scored], budget: int, logits: int, costs: Costs = USUAL, abreast: int = 1
) -> Layout:
    """Lay out `sequences`: at most `budget` tokens and `logits` scored positions per batch (a single row may be longer).

    Equal sequences and equal beginnings are computed once. abreast: batches that are computed at once, so that their
    number is made a multiple of it.
    """
    roots = _trees(sequences)
    rows: list[Row] = []
    order = sorted(roots, key=lambda root: -root.longest)
    for root in order:
        _decide(root, costs)
        _place(root, (), rows)
    targets = [_targets(rows, node, index, sequences[index]) for node, index in _ends(order)]
    return _pack(sequences, rows, targets, budget, logits, costs, abreast)


@dataclass(frozen=True)
class Prompts:
    """Chains of prompts that go on. row_of: for each prompt the row that it ends with, whole."""

    rows: tuple[Row, ...]
    row_of: tuple[int, ...]
    costs: Costs = USUAL

    @property
    def trunks(self) -> frozenset[int]:
        """All rows that others hang on."""
        return frozenset(t for row in self.rows for t in row.trunks)

    def batch(self, group: Sequence[int], keep: Collection[int]) -> Batch:
        """A pass over the rows `group` (in their order) that reads the logits after each; trunks `keep` are kept.

        Trunks of the rows that are not in the group were kept before.
        """
        last = np.array([len(self.rows[r].tokens) - 1 for r in group], dtype=np.int64)
        rows = np.asarray(group, dtype=np.int64)
        none = np.zeros(len(group), dtype=np.int64)
        known = {t: 1 if t in keep else 0 for r in group for t in (r, *self.rows[r].trunks)}
        return _batch(
            self.rows, group, (rows, last, none, np.arange(len(group))), 0, known, self.costs, forget=False
        )


def prompts(sequences: Sequence[Sequence[int]], costs: Costs = USUAL) -> Prompts:
    """Lay prompts out for generation: what they share in trunks, what is a prompt's own in a row of its own."""
    scored = [Scored(tuple(s), ()) for s in sequences]
    rows: list[Row] = []
    row_of = [0] * len(scored)
    for root in sorted(_trees(scored), key=lambda root: -root.longest):
        _decide(root, costs, subtrees=False)
        _place(root, (), rows)
        for node, index in _ends([root]):
            row_of[index] = node.row
    return Prompts(tuple(rows), tuple(row_of), costs)


def _trees(sequences: Sequence[Scored]) -> list[_Node]:
    """Radix trees of the sequences, one for each first token."""
    arrays = [np.asarray(s.tokens, dtype=np.int64) for s in sequences]
    ranked = sorted(range(len(sequences)), key=lambda i: sequences[i].tokens)
    roots: list[_Node] = []
    stack: list[tuple[int, int, int, _Node | None]] = [(0, len(ranked), 0, None)]
    made: list[_Node] = []
    while stack:
        low, high, depth, parent = stack.pop()
        at = low
        while at < high:  # runs that agree in the token at `depth`
            first = arrays[ranked[at]]
            token = first[depth]
            stop = at + 1
            while stop < high and arrays[ranked[stop]][depth] == token:
                stop += 1
            last = arrays[ranked[stop - 1]]
            common = _common(first, last, depth)
            node = _Node(first[depth:common], depth, parent=parent)
            made.append(node)
            (roots if parent is None else parent.children).append(node)
            ended = at
            while ended < stop and len(arrays[ranked[ended]]) == common:  # the shorter is ranked first
                node.ends.append(ranked[ended])
                ended += 1
            if ended < stop:
                stack.append((ended, stop, common, node))
            at = stop
    for node in reversed(made):
        _measure(node)
    return roots


def _measure(node: _Node) -> None:
    node.size = len(node.tokens) + sum(c.size for c in node.children)
    node.longest = len(node.tokens) + max((c.longest for c in node.children), default=0)


def _common(a: Ints, b: Ints, start: int) -> int:
    """How many tokens a and b have in common, known to be at least `start`."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[start:length] != b[start:length])
    return length if not len(differ) else start + int(differ[0])


def _post_order(root: _Node) -> list[_Node]:
    found, stack = [], [root]
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(node.children)
    return found[::-1]


def _decide(root: _Node, costs: Costs, subtrees: bool = True) -> None:
    """For every node: is its subtree one row, or is it a trunk with rows below; the cheaper one.

    subtrees: whether rows other than chains are wanted.
    """
    for node in _post_order(root):
        _adopt(node)
        _measure(node)  # tokens may have moved below it
        own, below = len(node.tokens), node.size - len(node.tokens)
        node.copied = sum(c.copied for c in node.children)
        if not node.children:
            node.cost = own * own / 2
            continue
        whole = float("inf")
        if subtrees and node.size <= ROW:
            whole = node.size**2 + costs.token * node.copied
        under = sum(c.cost for c in node.children)
        trunk = own * own / 2 + own * below + costs.join * below + costs.call + under
        more = own * (len(node.children) - 1)
        again = costs.token * more + own * below + under
        if not node.ends and again < min(whole, trunk):
            # a short beginning is cheaper computed again below than attended to from everywhere
            for child in node.children:
                child.tokens = np.concatenate([node.tokens, child.tokens])
                child.depth = node.depth
                _measure(child)
            node.tokens = node.tokens[:0]
            _measure(node)
            node.split, node.cost, node.copied = True, again, node.copied + more
        else:
            node.split, node.cost = trunk < whole, min(trunk, whole)


def _adopt(node: _Node) -> None:
    """Children of a child whose own tokens have moved below it become the node's."""
    children = []
    for child in node.children:
        children += child.children if not len(child.tokens) else [child]
    for child in children:
        child.parent = node
    node.children = children


def _place(root: _Node, trunks: tuple[int, ...], rows: list[Row]) -> None:
    """Append the rows of a subtree in an order in which every trunk is followed by all that hangs on it."""
    stack: list[tuple[_Node, tuple[int, ...]]] = [(root, trunks)]
    while stack:
        node, above = stack.pop()
        if not node.split:
            _one_row(node, above, rows)
            continue
        if len(node.tokens):
            node.row = len(rows)
            length = len(node.tokens)
            rows.append(
                Row(node.tokens, node.depth + np.arange(length), np.full(length, length), above, True)
            )
            above = (*above, node.row)
        # the stack turns the order round: longest first
        stack.extend((c, above) for c in sorted(node.children, key=lambda c: c.longest))


def _one_row(node: _Node, trunks: tuple[int, ...], rows: list[Row]) -> None:
    tokens, positions, ends = [], [], []
    at = 0
    stack = [node]
    while stack:
        part = stack.pop()
        length = len(part.tokens)
        part.row, part.offset = len(rows), at
        tokens.append(part.tokens)
        positions.append(part.depth + np.arange(length))
        ends.append(np.full(length, at + part.size))
        at += length
        stack.extend(reversed(part.children))
    rows.append(
        Row(
            np.concatenate(tokens),
            np.concatenate(positions),
            np.concatenate(ends),
            trunks,
            len(tokens) == 1,
        )
    )


def _ends(roots: Sequence[_Node]) -> Iterator[tuple[_Node, int]]:
    for root in roots:
        for node in _post_order(root):
            for index in node.ends:
                yield node, index


def _targets(rows: Sequence[Row], node: _Node | None, index: int, sequence: Scored) -> tuple[int, Ints, Ints]:
    """(sequence, rows, offsets) of the positions that predict its targets, in order."""
    left = len(sequence.targets)
    found_rows: list[int] = []
    found_offsets: list[int] = []
    while left and node is not None:
        length = len(node.tokens)
        take = min(left, length)
        found_offsets = [*range(node.offset + length - take, node.offset + length), *found_offsets]
        found_rows = [node.row] * take + found_rows
        left -= take
        node = node.parent
    return index, np.asarray(found_rows, dtype=np.int64), np.asarray(found_offsets, dtype=np.int64)


def _pack(
    sequences: Sequence[Scored],
    rows: Sequence[Row],
    targets: Sequence[tuple[int, Ints, Ints]],
    budget: int,
    logits: int,
    costs: Costs,
    abreast: int,
) -> Layout:
    where = np.concatenate([r for _, r, _ in targets]) if targets else np.zeros(0, dtype=np.int64)
    offset = np.concatenate([o for _, _, o in targets]) if targets else np.zeros(0, dtype=np.int64)
    owner = np.concatenate([np.full(len(r), i) for i, r, _ in targets]) if targets else where
    token = (
        np.concatenate([np.asarray(sequences[i].targets, dtype=np.int64) for i, _, _ in targets])
        if targets
        else where
    )
    by_row = np.argsort(where, kind="stable")
    where, offset, owner, token = where[by_row], offset[by_row], owner[by_row], token[by_row]
    first = np.searchsorted(where, np.arange(len(rows) + 1))
    needed = np.array(
        [len(np.unique(offset[first[r] : first[r + 1]])) for r in range(len(rows))], dtype=np.int64
    )
    groups: list[list[int]] = []
    size = scored = 0
    total = sum(len(r.tokens) for r in rows)
    # passes of one size: a small one at the end would be slow for its tokens
    count = max(1, -(-total // budget))
    if total >= abreast * LEAST:
        count = -(-count // abreast) * abreast
    longest = max((len(r.tokens) for r in rows), default=0)
    budget = min(budget, -(-total // count) + longest // 2)
    for row in range(len(rows)):
        length = len(rows[row].tokens)
        if not groups or size + length > budget or scored + needed[row] > logits:
            groups.append([])
            size = scored = 0
        groups[-1].append(row)
        size += length
        scored += int(needed[row])
    last = {t: number for number, group in enumerate(groups) for row in group for t in rows[row].trunks}
    batches = []
    for number, group in enumerate(groups):
        low, high = first[group[0]], first[group[-1] + 1]
        reads = (where[low:high], offset[low:high], token[low:high], owner[low:high])
        batches.append(_batch(rows, group, reads, number, last, costs))
    statistics = Statistics(
        sequences=len(sequences),
        requested=sum(len(s.tokens) for s in sequences),
        planned=sum(len(r.tokens) for r in rows),
        logits=sum(len(b.wanted) for b in batches),
        pairs=sum(
            len(r.tokens) * (len(r.tokens) + 1) // 2
            + len(r.tokens) * sum(len(rows[t].tokens) for t in r.trunks)
            for r in rows
        ),
        batches=len(batches),
    )
    return Layout(tuple(batches), statistics)


def _batch(
    rows: Sequence[Row],
    group: Sequence[int],
    reads: tuple[Ints, Ints, Ints, Ints],
    number: int,
    last: dict[int, int],
    costs: Costs,
    forget: bool = True,
) -> Batch:
    lengths = np.array([len(rows[r].tokens) for r in group])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    place = {row: int(starts[i]) for i, row in enumerate(group)}
    spans: dict[int, list[int]] = {}
    for i, row in enumerate(group):
        for trunk in rows[row].trunks:
            span = spans.setdefault(trunk, [int(starts[i]), int(starts[i + 1])])
            span[1] = int(starts[i + 1])  # all that hangs on a trunk lies together
    links = tuple(
        Link(
            low,
            high,
            trunk,
            (place[trunk], place[trunk] + len(rows[trunk].tokens)) if trunk in place else None,
            int(rows[trunk].positions[0]),
        )
        for trunk, (low, high) in sorted(spans.items())
    )
    buckets, back = _buckets([rows[r] for r in group], starts, costs)
    where, offset, token, owner = reads
    stream = np.array([place[int(r)] for r in where], dtype=np.int64) + offset
    wanted, index = np.unique(stream, return_inverse=True)
    return Batch(
        tokens=np.concatenate([rows[r].tokens for r in group]),
        positions=np.concatenate([rows[r].positions for r in group]),
        buckets=buckets,
        back=back,
        links=links,
        keep=tuple(
            (row, place[row], place[row] + len(rows[row].tokens))
            for row in group
            if last.get(row, -1) > number
        ),
        drop=tuple(t for t in spans if forget and last[t] == number and t not in place),
        wanted=wanted,
        reads=np.stack([index.reshape(-1), token, owner]),
    )


def _buckets(rows: Sequence[Row], starts: Ints, costs: Costs) -> tuple[tuple[Bucket, ...], Ints]:
    """Rows of similar length together: padding costs at most a fifth, or little in all."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].chain, -len(rows[i].tokens)))
    groups: list[list[int]] = []
    waste = 0
    for i in order:
        length = len(rows[i].tokens)
        longest = len(rows[groups[-1][0]].tokens) if groups else 0
        gap = (longest + SHORT) ** 2 - (length + SHORT) ** 2
        if (
            not groups
            or rows[groups[-1][0]].chain != rows[i].chain
            or waste + gap > max(costs.call, 0.25 * len(groups[-1]) * (longest + SHORT) ** 2)
        ):
            groups.append([])
            waste = gap = 0
        groups[-1].append(i)
        waste += gap
    buckets = []
    back = np.zeros(int(starts[-1]), dtype=np.int64)
    base = 0
    for group in groups:
        longest = len(rows[group[0]].tokens)
        column = np.arange(longest)
        lengths = np.array([len(rows[i].tokens) for i in group])
        index = starts[group][:, None] + np.minimum(column[None, :], lengths[:, None] - 1)
        mask = None
        if not rows[group[0]].chain:
            ends = np.zeros((len(group), longest), dtype=np.int64)
            for k, i in enumerate(group):
                ends[k, : lengths[k]] = rows[i].ends
            # key j is an ancestor of query i when i lies in j's subtree; padded queries see themselves
            query, key = column[None, :, None], column[None, None, :]
            mask = ((key <= query) & (query < ends[:, None, :])) | (query == key)
        positions = np.concatenate([r.positions for r in (rows[i] for i in group)])
        padded = np.zeros((len(group), longest), dtype=np.int64)
        at = 0
        for k, i in enumerate(group):
            padded[k, : lengths[k]] = positions[at : at + lengths[k]]
            padded[k, lengths[k] :] = positions[at + lengths[k] - 1]
            at += int(lengths[k])
            back[starts[i] : starts[i] + lengths[k]] = base + k * longest + column[: lengths[k]]
        buckets.append(Bucket(index, mask, padded))
        base += len(group) * longest
    return tuple(buckets), back
