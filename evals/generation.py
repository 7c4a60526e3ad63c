"""Generation with continuous batching over shared prompts.

What prompts share is computed once and attended to by all (`tree`); every running sequence has a slot that holds keys and
values of its own tokens. A sequence that ends gives its slot to the next prompt at once, so a batch never waits for its
longest member. Greedy, or sampled from a random stream of the request's own, so that results do not depend on batching.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.evals.attention import Kept, Pass, Unsupported, attending, implementing
from shoal.evals.engine import Work, costs_of
from shoal.evals.slots import Filling, Slots, Step
from shoal.evals.tree import Prompts, prompts

SLOTS = 32
STEPS = 64  # that a prompt is thought to take at most, when it is laid out
CACHE_BYTES = 1 << 30  # of the slots' keys and values


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0: the most likely one. seed: needed for everything else."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass
class Request:
    """A prompt (token ids) and when it ends. stops(tokens so far): whether they hold a stop string.

    number: of the sample, where a prompt is sampled several times.
    """

    prompt: tuple[int, ...]
    most: int
    stops: Callable[[Sequence[int]], bool]
    sampling: Sampling = field(default_factory=Sampling)
    number: int = 0


@dataclass
class _Running:
    """A sequence in a slot. begin: position of the first token of its own; length: tokens in the slot."""

    index: int
    request: Request
    trunks: tuple[int, ...]
    begin: int
    length: int
    next: int
    made: list[int]
    random: np.random.Generator | None


class Generator:
    """Generates by `model`. ends: token ids after which a sequence ends. slots: sequences at once."""

    def __init__(
        self,
        model: Any,
        ends: Sequence[int],
        slots: int = SLOTS,
        budget: int = 2048,
        work: Work | None = None,
    ) -> None:
        self.model = model
        self.work = work or Work()
        self.ends = frozenset(ends)
        self.slots = slots
        self.budget = budget
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.costs = costs_of(model)

    def shrink(self) -> int:
        if self.slots <= 1:
            return 0
        self.slots //= 2
        self.budget = max(32, self.budget // 2)
        return self.slots

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """New tokens of every request, an end token included where one was made."""
        # a trunk is attended to once more in every step
        steps = min(STEPS, max(r.most for r in requests))
        laid = prompts([r.prompt for r in requests], replace(self.costs, call=self.costs.call * (1 + steps)))
        order = sorted(range(len(requests)), key=lambda i: (laid.row_of[i], i))
        queue = deque(order)
        results: list[list[int]] = [[] for _ in requests]
        running: list[_Running] = []
        slots = Slots(self._count(requests, laid))
        kept: Kept = {}
        left = _uses(laid, order)
        with implementing(self.model):
            while queue or running:
                admitted: list[int] = []
                tokens = 0
                while queue and len(running) + len(admitted) < slots.count:
                    new = len(laid.rows[laid.row_of[queue[0]]].tokens)
                    if admitted and tokens + new > self.budget:
                        break
                    admitted.append(queue.popleft())
                    tokens += new
                if admitted:
                    running += self._admit(requests, laid, admitted, len(running), slots, kept)
                else:
                    self._step(laid, running, slots, kept)
                self._retire(running, results, slots, kept, left)
        return results

    def _count(self, requests: Sequence[Request], laid: Prompts) -> int:
        """Slots that fit: each has room for the longest row and what is generated after it."""
        config = self.model.config.get_text_config()
        if not hasattr(config, "num_attention_heads"):
            raise Unsupported(f"{type(self.model).__name__} has attention of its own")
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 4 if self.device.type == "cpu" else self.dtype.itemsize
        room = max(len(laid.rows[laid.row_of[i]].tokens) + r.most for i, r in enumerate(requests))
        each = 2 * config.num_hidden_layers * heads * dim * width * room
        return max(1, min(self.slots, len(requests), int(CACHE_BYTES // each)))

    def _admit(
        self,
        requests: Sequence[Request],
        laid: Prompts,
        admitted: Sequence[int],
        first: int,
        slots: Slots,
        kept: Kept,
    ) -> list[_Running]:
        wanted = [laid.row_of[i] for i in admitted]
        trunks = {t for row in wanted for t in laid.rows[row].trunks}
        known = {row for _, row in kept}
        # in the order of rows, trunks come before what hangs on them
        group = sorted({*wanted, *(t for t in trunks if t not in known)})
        batch = laid.batch(group, laid.trunks)
        one = Pass.of(batch, self.dtype, self.device)
        one.kept = kept
        starts = dict(zip(group, np.cumsum([0, *(len(laid.rows[r].tokens) for r in group)]), strict=False))
        taps = []
        for number, row in enumerate(wanted):
            low = int(starts[row])
            taps.append((first + number, low, low + len(laid.rows[row].tokens)))
        count = len(batch.tokens)
        self.work.add(count, int(batch.positions.sum()) + count, len(group))
        slots.reserve(max(high - low for _, low, high in taps) + 1)
        with attending(self.model, Filling(one, slots, taps)):
            logits = self.model(
                input_ids=one.tokens,
                position_ids=one.positions,
                use_cache=False,
                logits_to_keep=one.wanted,
            ).logits[0]
        # one logit row per row of the group, in the order of their ends in the stream, which is the group's
        place = {row: number for number, row in enumerate(group)}
        logits = logits[torch.tensor([place[row] for row in wanted], device=logits.device)]
        made = []
        for index, row in zip(admitted, wanted, strict=True):
            request = requests[index]
            made.append(
                _Running(
                    index=index,
                    request=request,
                    trunks=laid.rows[row].trunks,
                    begin=int(laid.rows[row].positions[0]),
                    length=len(laid.rows[row].tokens),
                    next=-1,
                    made=[],
                    random=_random(request),
                )
            )
        self._choose(made, logits)
        return made

    def _step(self, laid: Prompts, running: Sequence[_Running], slots: Slots, kept: Kept) -> None:
        for one in running:
            one.length += 1
        slots.reserve(max(r.length for r in running))
        lengths = torch.tensor([r.length for r in running], device=self.device)
        begins = torch.tensor([r.begin for r in running], device=self.device)
        positions = begins + lengths - 1
        self.work.add(len(running), sum(r.begin + r.length for r in running), len(running))
        below: dict[int, list[int]] = {}
        for slot, one in enumerate(running):
            for trunk in one.trunks:
                below.setdefault(trunk, []).append(slot)
        trunks = [
            (
                row,
                int(laid.rows[row].positions[0]),
                None if len(some) == len(running) else torch.tensor(some, device=self.device),
            )
            for row, some in below.items()
        ]
        tokens = torch.tensor([[r.next for r in running]], device=self.device)
        with attending(
            self.model, Step(slots, kept, lengths, max(r.length for r in running), positions, trunks)
        ):
            logits = self.model(
                input_ids=tokens, position_ids=positions[None], use_cache=False, logits_to_keep=0
            ).logits[0]
        self._choose(running, logits)

    def _choose(self, running: Sequence[_Running], logits: Tensor) -> None:
        best = logits.argmax(dim=-1).tolist()
        for number, one in enumerate(running):
            sampling = one.request.sampling
            if sampling.temperature > 0 or sampling.repetition_penalty != 1.0:
                one.next = _draw(logits[number].float().cpu(), one)
            else:
                one.next = best[number]
            one.made.append(one.next)

    def _retire(
        self,
        running: list[_Running],
        results: list[list[int]],
        slots: Slots,
        kept: Kept,
        left: dict[int, int],
    ) -> None:
        """Give up the slots of what has ended; the last slot moves into a gap."""
        for slot in range(len(running) - 1, -1, -1):
            one = running[slot]
            ended = one.next in self.ends or len(one.made) >= one.request.most
            if not ended and not one.request.stops(one.made):
                continue
            results[one.index] = one.made
            last = running.pop()
            if slot < len(running):
                running[slot] = last
                slots.move(len(running), slot, last.length)
            for trunk in one.trunks:
                left[trunk] -= 1
                if not left[trunk]:
                    for key in [k for k in kept if k[1] == trunk]:
                        del kept[key]


def _uses(laid: Prompts, order: Sequence[int]) -> dict[int, int]:
    uses: dict[int, int] = {}
    for index in order:
        for trunk in laid.rows[laid.row_of[index]].trunks:
            uses[trunk] = uses.get(trunk, 0) + 1
    return uses


def _random(request: Request) -> np.random.Generator | None:
    if request.sampling.temperature <= 0:
        return None
    text = f"{request.sampling.seed}:{request.number}:{','.join(map(str, request.prompt))}"
    return np.random.Generator(
        np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))
    )


def _draw(logits: Tensor, one: _Running) -> int:
    """The next token; penalty, temperature, top-k and top-p in transformers' order."""
    sampling = one.request.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*one.request.prompt, *one.made}))
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if one.random is None:
        return int(logits.argmax())
    scores = logits.double() / sampling.temperature
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, len(scores))).values[-1]
        scores[scores < least] = -math.inf
    ranked, order = scores.sort(descending=True, stable=True)
    shares = torch.softmax(ranked, dim=-1)
    if sampling.top_p < 1.0:
        before = shares.cumsum(0) - shares
        shares = torch.where(before < sampling.top_p, shares, 0.0)
    sums = shares.cumsum(0)
    drawn = int(torch.searchsorted(sums, one.random.random() * float(sums[-1]), right=True))
    return int(order[min(drawn, len(order) - 1)])
