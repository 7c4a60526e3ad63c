"""The token tree: nothing is computed twice, and every token attends to its own past and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from shoal.evals.tree import Batch, Costs, Layout, Scored, layout, prompts


def seen(batches: Sequence[Batch]) -> dict[tuple[int, int], tuple[tuple[int, int], ...]]:
    """For each (batch, stream index): what it attends to, as (position, token), by rows, masks, links and trunks."""
    kept: dict[int, list[tuple[int, int]]] = {}
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, batch in enumerate(batches):
        tokens = list(zip(batch.positions.tolist(), batch.tokens.tolist(), strict=True))
        place = {}
        for bucket in batch.buckets:
            rows, length = bucket.index.shape
            for row in range(rows):
                for query in range(length):
                    allowed = (
                        range(query + 1)
                        if bucket.mask is None
                        else np.flatnonzero(bucket.mask[row, query]).tolist()
                    )
                    keys = [int(bucket.index[row, k]) for k in allowed]
                    place[len(place)] = (int(bucket.index[row, query]), [tokens[k] for k in keys])
        for index, padded in enumerate(batch.back.tolist()):
            stream, keys = place[padded]
            assert stream == index
            found[number, index] = keys
        for row, low, high in batch.keep:
            kept[row] = tokens[low:high]
        for link in batch.links:
            trunk = kept[link.row] if link.source is None else tokens[link.source[0] : link.source[1]]
            assert trunk[0][0] == link.begin
            for index in range(link.start, link.stop):
                found[number, index] += trunk
        for row in batch.drop:
            del kept[row]
    return {k: tuple(sorted(v)) for k, v in found.items()}


def check(sequences: Sequence[Scored], laid: Layout) -> None:
    attended = seen(laid.batches)
    by_owner: dict[int, list[tuple[int, int, int]]] = {i: [] for i in range(len(sequences))}
    for number, batch in enumerate(laid.batches):
        for index, token, owner in batch.reads.T.tolist():
            stream = int(batch.wanted[index])
            by_owner[owner].append((int(batch.positions[stream]), token, 0))
            position = int(batch.positions[stream])
            past = tuple(enumerate(sequences[owner].tokens[: position + 1]))
            assert attended[number, stream] == past
    for owner, reads in by_owner.items():
        one = sequences[owner]
        first = len(one.tokens) - len(one.targets)
        assert [(p, t) for p, t, _ in sorted(reads)] == [(first + k, t) for k, t in enumerate(one.targets)]
    for number, batch in enumerate(laid.batches):
        for index, (position, token) in enumerate(zip(batch.positions, batch.tokens, strict=True)):
            assert attended[number, index][-1] == (position, token)
            assert [p for p, _ in attended[number, index]] == list(range(position + 1))


def draw(rng: random.Random, few: int, prefix: int, options: int) -> list[Scored]:
    lead = [rng.randrange(5) for _ in range(prefix)]
    found = []
    for _ in range(few):
        context = lead + [rng.randrange(5) for _ in range(rng.randrange(1, 40))]
        for _ in range(rng.randrange(1, options + 1)):
            answer = [rng.randrange(3) for _ in range(rng.randrange(1, 6))]
            found.append(Scored(tuple((context + answer)[:-1]), tuple(answer)))
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [16, 100, 4096])
def test_every_token_attends_to_its_past(seed: int, budget: int) -> None:
    rng = random.Random(seed)
    sequences = draw(rng, few=30, prefix=rng.choice([0, 3, 60, 200]), options=4)
    laid = layout(sequences, budget, logits=50)
    check(sequences, laid)
    assert laid.statistics.batches == len(laid.batches)
    longest = max(len(b.tokens) for b in laid.batches)
    assert longest <= max(budget, 520, max(len(s.tokens) for s in sequences))


def test_what_is_shared_is_computed_once() -> None:
    lead = tuple(range(100, 300))
    context = [(*lead, *(1000 * i + k for k in range(20))) for i in range(10)]
    sequences = [Scored((*c, 7, 8), (7, 8, 9 + option)) for c in context for option in range(4)]
    laid = layout(sequences, 4096, 1 << 20)
    assert laid.statistics.requested == 40 * 222
    assert laid.statistics.planned == 200 + 10 * 22
    assert laid.statistics.logits == 10 * 3
    check(sequences, laid)


def test_equal_sequences_and_beginnings_of_others() -> None:
    one = Scored((1, 2, 3), (3, 4))
    sequences = [one, one, Scored((1, 2), (2, 3)), Scored((1, 2, 3, 4, 5), (5, 6)), Scored((9,), (1,))]
    laid = layout(sequences, 4096, 100)
    check(sequences, laid)
    assert laid.statistics.planned == 6


def test_short_beginnings_within_beginnings_are_computed_again_and_are_no_trunks() -> None:
    """Where a call is dear: a beginning that moved into its children moves on with the next one above it."""
    sequences = [
        Scored((1, 2, 10 + i, 20 + i, 100 + 10 * i + j, *range(500, 512)), (1,))
        for i in range(6)
        for j in range(40)
    ]
    laid = layout(sequences, 4096, 4096, Costs(call=1e6, token=5.0))
    check(sequences, laid)
    assert not any(b.links for b in laid.batches)
    shared = layout(sequences, 4096, 4096, Costs(call=1.0, join=0.0, token=5000.0))
    check(sequences, shared)
    assert any(b.links for b in shared.batches) and shared.statistics.planned < laid.statistics.planned


def test_a_trunk_serves_later_batches_and_is_dropped_after_the_last() -> None:
    lead = tuple(range(500, 600))
    sequences = [Scored((*lead, *(i * 50 + k for k in range(40))), (1,)) for i in range(20)]
    laid = layout(sequences, 200, 1000)
    assert len(laid.batches) > 3
    kept = [row for b in laid.batches for row, _, _ in b.keep]
    dropped = [row for b in laid.batches for row in b.drop]
    assert kept == dropped and len(kept) == 1
    check(sequences, laid)


def test_the_same_layout_every_time() -> None:
    sequences = draw(random.Random(3), 20, 50, 3)
    first, second = layout(sequences, 300, 60), layout(list(sequences), 300, 60)
    for a, b in zip(first.batches, second.batches, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.reads, b.reads) and a.links == b.links


def test_long_chains_of_beginnings_need_no_recursion() -> None:
    sequences = [Scored(tuple([1] * n), (1,)) for n in range(1, 1500)]
    laid = layout(sequences, 4096, 4096)
    assert sum(b.reads.shape[1] for b in laid.batches) == 1499


def test_prompts_end_with_rows_of_their_own() -> None:
    lead = tuple(range(100))
    texts = [(*lead, 200, 201), (*lead, 300, 301, 302), (*lead, 300, 301, 302), lead, (7, 8)]
    laid = prompts(texts)
    for text, row in zip(texts, laid.row_of, strict=True):
        chain = [*laid.rows[row].trunks, row]
        assert tuple(t for r in chain for t in laid.rows[r].tokens.tolist()) == text
    assert laid.row_of[1] == laid.row_of[2]
    assert laid.row_of[3] in laid.trunks
