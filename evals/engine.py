"""Log-likelihoods of token sequences by a resident model: over a token tree, or in plain padded batches.

`TreeEngine` computes every shared token once (see `tree`, `attention`); `PlainEngine` pads rows on the left and works
with any causal model; `choose` takes the tree only where it gives plain batching's numbers on sequences of the run.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.evals import abreast
from shoal.evals.abreast import Trunks
from shoal.evals.attention import Pass, attending, implementing
from shoal.evals.head import Head
from shoal.evals.heap import keep_free_heap
from shoal.evals.picking import picked
from shoal.evals.tree import USUAL, Costs, Scored, Statistics, layout

BUDGET_CPU, BUDGET_GPU = (
    1280,
    16384,
)  # tokens of a forward pass; on a CPU its activations shall stay in the cache
LOGITS = 1 << 26  # float32 logits at once, elements
LAYOUTS = 8  # layouts that are kept: one per set of items


@dataclass(frozen=True)
class LogLikelihood:
    """Sum over the targets, nats, and whether each was the most likely token."""

    value: float
    greedy: bool


@dataclass
class Work:
    """What was computed so far: tokens through the layers, token pairs of attention, positions with logits."""

    tokens: int = 0
    pairs: int = 0
    logits: int = 0

    def add(self, tokens: int, pairs: int, logits: int) -> None:
        self.tokens += tokens
        self.pairs += pairs
        self.logits += logits


class Engine(Protocol):
    """Scores sequences; `shrink` halves its batches and says their size, or 0 when they cannot be smaller."""

    def score(self, sequences: Sequence[Scored]) -> list[LogLikelihood]: ...

    def shrink(self) -> int: ...

    def words(self) -> str: ...


def default_budget(device: torch.device, passes: int = 1) -> int:
    """Tokens that are computed at once, by so many passes."""
    if passes > 1:
        return passes * abreast.PASS
    return BUDGET_CPU if device.type == "cpu" else BUDGET_GPU


def accepts_tree(model: Any) -> bool:
    accepted = inspect.signature(model.forward).parameters
    config = model.config
    return (
        {"logits_to_keep", "position_ids"} <= set(accepted)
        and not getattr(config, "is_encoder_decoder", False)
        and getattr(config, "_attn_implementation", None) is not None
    )


# what an attention call costs beyond its arithmetic, as FLOP that attention could do in that time
CALL_FLOP_CPU, CALL_FLOP_GPU = 3.5e6, 1e9
PRODUCTS = 7.7  # by how much matrix products run faster than attention


def costs_of(model: Any) -> Costs:
    """What a layer of this model costs: calls weigh more in a small model, and much more on a GPU."""
    config = model.config.get_text_config()
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not layers or not heads:
        return USUAL
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    embeddings = {
        id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    inner = sum(p.numel() for p in model.parameters()) - sum(embeddings.values())
    pair = 4 * width  # FLOP
    on_gpu = next(model.parameters()).device.type != "cpu"
    return Costs(
        call=(CALL_FLOP_GPU if on_gpu else CALL_FLOP_CPU) / pair,
        token=2 * inner / layers / PRODUCTS / pair,
    )


@dataclass(frozen=True)
class _Planned:
    """Passes over `sequences`, which are kept so that their identity stays theirs, and the trunks of these passes."""

    sequences: tuple[Scored, ...]
    passes: list[Pass]
    trunks: Trunks
    statistics: Statistics


class TreeEngine:
    """Over a token tree. budget: tokens that are computed at once. most: passes that share them."""

    def __init__(
        self,
        model: Any,
        budget: int | None = None,
        work: Work | None = None,
        most: int | None = None,
    ) -> None:
        self.model = model
        self.work = work or Work()
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._most = abreast.useful(model) if most is None else most
        self.budget = budget or default_budget(self.device, self._most)
        self.costs = costs_of(model)
        if self.device.type == "cpu":
            keep_free_heap()
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self._head = Head(model)
        # keyed by the identity of the sequences, which are kept beside: planning again costs nothing
        self._layouts: OrderedDict[tuple[int, ...], _Planned] = OrderedDict()

    @property
    def abreast(self) -> int:
        """Passes at once."""
        return max(1, min(self._most, self.budget // abreast.PASS))

    def words(self) -> str:
        together = f", {self.abreast} passes at once" if self.abreast > 1 else ""
        return f"token tree, {self.budget // self.abreast} tokens per pass{together}"

    def shrink(self) -> int:
        self._layouts.clear()
        self._head.drop()
        if self.budget <= 32:
            return 0
        self.budget //= 2
        return self.budget

    def forget(self) -> None:
        """Drop keys and values that a broken-off pass may have left; they are of old weights."""
        for planned in self._layouts.values():
            planned.trunks.clear()

    def plan(self, sequences: Sequence[Scored]) -> Statistics:
        """Lay `sequences` out, unless that is done; what it costs."""
        return self._planned(tuple(sequences)).statistics

    def _planned(self, sequences: tuple[Scored, ...]) -> _Planned:
        key = tuple(map(id, sequences))
        found = self._layouts.get(key)
        if found is None:
            most = max(1, LOGITS // self.abreast // self.vocabulary)
            laid = layout(sequences, self.budget // self.abreast, most, self.costs, self.abreast)
            passes = [Pass.of(b, self.dtype, self.device) for b in laid.batches]
            trunks = Trunks()
            for one in passes:
                one.kept = trunks
            found = self._layouts[key] = _Planned(sequences, passes, trunks, laid.statistics)
            while len(self._layouts) > LAYOUTS:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(key)
        return found

    @torch.inference_mode()
    def score(self, sequences: Sequence[Scored]) -> list[LogLikelihood]:
        if not sequences:
            return []
        planned = self._planned(tuple(sequences))
        passes, trunks, costs = planned.passes, planned.trunks, planned.statistics
        self.work.add(costs.planned, costs.pairs, costs.logits)
        sums = np.zeros(len(sequences))
        greedy = np.ones(len(sequences), dtype=bool)
        try:
            computed = abreast.run(self._targets, passes, trunks, self.abreast)
            with implementing(self.model), self._head.ready(), closing(computed) as found:
                for one, (values, best) in zip(passes, found, strict=True):
                    owner = one.batch.reads[2]
                    np.add.at(sums, owner, values)
                    np.logical_and.at(greedy, owner, best)
                    # passes before this one have ended, and none after it needs these
                    for row in one.batch.drop:
                        trunks.forget(row)
        finally:
            trunks.clear()
        return [LogLikelihood(float(s), bool(g)) for s, g in zip(sums, greedy, strict=True)]

    def _targets(self, one: Pass) -> tuple[Any, Any]:
        """Log-probability of every target of a pass, and whether it is the most likely token."""
        with attending(self.model, one), self._head.kept():
            logits = self.model(
                input_ids=one.tokens,
                position_ids=one.positions,
                use_cache=False,
                logits_to_keep=one.wanted,
            ).logits[0]
        values, best = picked(logits, one.reads[0], one.reads[1])
        return values.double().cpu().numpy(), best.cpu().numpy()


class PlainEngine:
    """Rows padded on the right, which no causal model sees; rows that differ in targets only are computed once."""

    def __init__(self, model: Any, rows: int, work: Work | None = None) -> None:
        self.model = model
        self.work = work or Work()
        self.rows = rows
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._sparse = "logits_to_keep" in inspect.signature(model.forward).parameters

    def words(self) -> str:
        return f"plain batches, {self.rows} rows per pass"

    def shrink(self) -> int:
        if self.rows <= 1:
            return 0
        self.rows //= 2
        return self.rows

    @torch.inference_mode()
    def score(self, sequences: Sequence[Scored]) -> list[LogLikelihood]:
        together: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, sequence in enumerate(sequences):
            together[sequence.tokens].append(index)
        ordered = sorted(together, key=lambda tokens: (-len(tokens), tokens))
        results: list[LogLikelihood] = [LogLikelihood(0.0, False)] * len(sequences)
        for start in range(0, len(ordered), self.rows):
            batch = ordered[start : start + self.rows]
            first = min(len(t) - len(sequences[i].targets) for t in batch for i in together[t])
            logits = self.logits(batch, first)
            for row, tokens in enumerate(batch):
                for index in together[tokens]:
                    targets = torch.tensor(sequences[index].targets, device=logits.device)
                    end = len(tokens) - first
                    part = torch.log_softmax(logits[row, end - len(targets) : end].float(), dim=-1)
                    value = part.gather(1, targets.unsqueeze(1)).sum()
                    results[index] = LogLikelihood(float(value), bool((part.argmax(dim=-1) == targets).all()))
        return results

    @torch.inference_mode()
    def gaps(self, prompt: tuple[int, ...], made: Sequence[int]) -> list[float]:
        """By how much the logit of each token of `made`, which follow `prompt`, falls short of the largest there."""
        logits = self.logits([(*prompt, *made[:-1])], len(prompt) - 1)[0].float()
        chosen = logits.gather(1, torch.tensor(list(made), device=logits.device).unsqueeze(1))[:, 0]
        return [float(x) for x in logits.amax(dim=-1) - chosen]

    def logits(self, rows: Sequence[tuple[int, ...]], first: int) -> Tensor:
        """Logits [rows, width - first, vocabulary] of the positions from `first` on."""
        width = max(len(row) for row in rows)
        count = len(rows) * width
        self.work.add(count, count * (width + 1) // 2, len(rows) * (width - first if self._sparse else width))
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        more = {"logits_to_keep": torch.arange(first, width, device=self.device)} if self._sparse else {}
        logits: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False, **more).logits
        return logits if self._sparse else logits[:, first:]


def excerpt(tokens: tuple[int, ...], model: Any, least: int = 1) -> tuple[int, ...]:
    """Beginning and end of a long sequence, for a check that costs little; whole where a sliding window would be missed.

    least: how many tokens of the end are needed.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    head, tail = 48, max(16, least)
    if len(tokens) <= head + tail or (window is not None and window < len(tokens)):
        return tokens
    return tokens[:head] + tokens[-tail:]


def compare(tree: TreeEngine, plain: PlainEngine, sequences: Sequence[Scored]) -> str | None:
    """Why the token tree must not be used, or None: on the longest sequences and on some that share their beginning."""
    ranked = sorted(set(sequences), key=lambda s: (s.tokens, s.targets))  # neighbours share most
    middle = len(ranked) // 2
    some = dict.fromkeys([*ranked[middle : middle + 2], max(ranked, key=lambda s: len(s.tokens))])
    chosen = [Scored(excerpt(s.tokens, tree.model, len(s.targets)), s.targets) for s in some]
    ours, theirs = tree.score(chosen), plain.score(chosen)
    exact = tree.dtype in (torch.float32, torch.float64)
    for sequence, one, other in zip(chosen, ours, theirs, strict=True):
        # half precision rounds every layer: several tenths of a nat per token are seen between two batch sizes
        count = len(sequence.targets)
        allowed = max(1e-3, 1e-5 * abs(other.value)) if exact else 0.5 * count**0.5 + 0.05 * abs(other.value)
        if not abs(one.value - other.value) <= allowed and other.value == other.value:
            return f"it gives {one.value:.4f} where plain batches give {other.value:.4f}"
    return None
