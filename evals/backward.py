"""Backward passes of the smooth objective: its gradient with respect to the runtime parameters, batch by batch.

The sum over items of count x objective is differentiated in plain padded batches of whole items (the options of a
multiple choice meet in one softmax). Gradients are handed out as soon as a pass has made them and then dropped, so that
the memory needed beside the model is that of one batch's activations and one parameter's gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.errors import EvaluationError
from shoal.evals.engine import PlainEngine
from shoal.evals.limits import MemoryLimit, forward_bytes
from shoal.evals.objective import Form, form_of
from shoal.evals.tree import Scored
from shoal.types import Role

Take = Callable[[Tensor, Tensor], None]  # a runtime parameter, its gradient
BUDGET_CPU, BUDGET_GPU = (
    512,
    4096,
)  # padded tokens of a batch, whose activations are all kept for the way back


@dataclass(frozen=True)
class _Item:
    """One item: what it counts, and the token sequences of each of its requests (rolling: several windows)."""

    number: int
    count: float
    form: Form
    requests: tuple[tuple[Scored, ...], ...]

    @property
    def rows(self) -> set[tuple[int, ...]]:
        return {s.tokens for sequences in self.requests for s in sequences}


class Backward:
    """Differentiates the smooth objective of planned items by the parameters of a resident model.

    lm: a ResidentLM. tasks: as the scorer's. limit: bytes that this process may use on a CPU.
    """

    def __init__(self, lm: Any, tasks: Mapping[tuple[str, Role], Any], limit: int | None = None) -> None:
        self._lm, self._tasks = lm, tasks
        self._engine = PlainEngine(lm.model, 1, lm.work)
        self._limit = MemoryLimit(limit)
        self._budget = BUDGET_CPU if lm.device.type == "cpu" else BUDGET_GPU

    @property
    def able(self) -> bool:
        """Whether the model is one that this works with."""
        return str(self._lm.backend) == "causal"

    def shrink(self) -> int:
        """Halve the batches; their padded tokens, 0 when every item is a batch of its own already."""
        self._budget //= 2
        return self._budget if self._budget >= 16 else 0

    def run(self, key: tuple[str, Role], counts: Mapping[int, float], take: Take) -> dict[int, float]:
        """Item -> objective; `take` hears every parameter's gradient of sum of count x objective, one part per batch.

        counts: item -> what it counts.

        Raises:
            EvaluationError: an item has no smooth objective, or it is not finite.
        """
        items = [self._item(key, number, count) for number, count in sorted(counts.items())]
        values: dict[int, float] = {}
        with self._gradients(take):
            for batch in self._batches(items):
                total, found = self._objective(key[0], batch)
                values |= found
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
        return values

    def _item(self, key: tuple[str, Role], number: int, count: float) -> _Item:
        planned = self._tasks[key]
        request = planned.requests[number]
        form = form_of(self._lm, planned.source, request.doc, request.instances, request.gold)
        scored = [i for i in request.instances if i.request_type != "generate_until"]
        if request.gold is not None:
            scored.append(request.gold)
        if form is None or form.value([0.0] * len(scored)) is None:
            raise EvaluationError(f"task {key[0]!r}, item {number}: has no smooth objective to differentiate")
        return _Item(number, count, form, tuple(self._lm.sequences(i) for i in scored))

    def _batches(self, items: Sequence[_Item]) -> Iterator[list[_Item]]:
        """Whole items, longest first, within the budget where more than one is in a batch."""
        budget = self._budget
        left = self._limit.left()
        if left is not None:
            config, dtype = self._lm.model.config, self._engine.dtype
            text = config.get_text_config()
            # a forward pass without gradients holds one layer's activations, the way back needs all of them
            layers = int(getattr(text, "num_hidden_layers", 1))
            budget = min(budget, left // (layers * forward_bytes(config, dtype, 1, 1)))
        batch: list[_Item] = []
        rows: set[tuple[int, ...]] = set()
        for item in sorted(items, key=lambda i: (-max(map(len, i.rows)), i.number)):
            both = rows | item.rows
            if batch and len(both) * max(map(len, both)) > budget:
                yield batch
                batch, both = [], item.rows
            batch.append(item)
            rows = both
        if batch:
            yield batch

    def _objective(self, task: str, batch: Sequence[_Item]) -> tuple[Tensor, dict[int, float]]:
        """Sum of count x objective, float64, and item -> objective."""
        logliks = self._logliks([s for item in batch for sequences in item.requests for s in sequences])
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        values = {}
        at = 0
        for item in batch:
            parts = []
            for sequences in item.requests:
                parts.append(torch.stack(logliks[at : at + len(sequences)]).sum())
                at += len(sequences)
            objective = item.form.differentiable(torch.stack(parts))
            assert objective is not None  # asked in _item
            values[item.number] = float(objective.detach())
            if not values[item.number] < float("inf"):
                raise EvaluationError(f"task {task!r}, item {item.number}: its objective is not finite")
            total = total + item.count * objective
        return total, values

    def _logliks(self, sequences: Sequence[Scored]) -> list[Tensor]:
        """Log-likelihood of each sequence's targets, as PlainEngine.score computes it, with its graph."""
        together: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, sequence in enumerate(sequences):
            together[sequence.tokens].append(index)
        ordered = sorted(together, key=lambda tokens: (-len(tokens), tokens))
        first = min(len(t) - len(sequences[i].targets) for t in ordered for i in together[t])
        with self._lm.precision():
            logits = self._engine.logits(ordered, first)
        found: list[Tensor] = [logits.new_zeros(())] * len(sequences)
        for row, tokens in enumerate(ordered):
            for index in together[tokens]:
                targets = torch.tensor(sequences[index].targets, device=logits.device)
                end = len(tokens) - first
                part = torch.log_softmax(logits[row, end - len(targets) : end].float(), dim=-1)
                found[index] = part.gather(1, targets.unsqueeze(1)).sum()
        return found

    @contextmanager
    def _gradients(self, take: Take) -> Iterator[None]:
        """The model's parameters want gradients, which go to `take` and nowhere else."""

        def hand_over(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                take(parameter, gradient)

        parameters = [p for p in self._lm.model.parameters() if p.dtype.is_floating_point]
        handles = []
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(hand_over))
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
