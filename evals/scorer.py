"""Scores a resident model on any subset of the planned items: one row per item.

Requests are built once; a call costs forward passes and lm-eval's own `process_results`. lm-eval's response cache is
never used: its key leaves out the model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import EvaluationError
from shoal.evals.catalogue import TaskSource
from shoal.evals.finite import first_broken
from shoal.evals.objective import form_of
from shoal.evals.quiet import quiet_libraries
from shoal.evals.remember import remember
from shoal.evals.requests import ItemRequests, fresh
from shoal.types import ItemIds, ItemScore, Role


@dataclass(frozen=True)
class PlannedTask:
    """One task on the split of one role, with the requests of its items."""

    source: TaskSource
    requests: Mapping[int, ItemRequests]


class Scorer:
    """Scores `lm` (a ResidentLM, or any lm-eval model) on planned items."""

    def __init__(self, lm: Any, tasks: Mapping[tuple[str, Role], PlannedTask]) -> None:
        self.lm = lm
        self.tasks = tasks
        for planned in tasks.values():
            remember(planned.source.task)

    def score(self, items: ItemIds, generate: bool = True) -> tuple[list[ItemScore], list[str]]:
        """Rows in the order of `items`, and what there is to say of the scoring (a batch that had to be halved).

        generate: also run generation; without it generation items get their smooth objective only.

        Raises:
            EvaluationError: a log-likelihood is not finite, or memory runs out at the smallest batch.
        """
        work: list[tuple[str, Role, int, list[Any], Any | None]] = []
        for (task, role), ids in items.items():
            planned = self.tasks[task, role]
            for item in ids:
                request = planned.requests[item]
                instances = [fresh(instance) for instance in request.instances]
                if not generate and instances[0].request_type == "generate_until":
                    instances = []
                work.append(
                    (task, role, item, instances, fresh(request.gold) if request.gold is not None else None)
                )
        by_type: dict[str, list[Any]] = defaultdict(list)
        for _, _, _, instances, gold in work:
            for instance in instances + ([gold] if gold is not None else []):
                by_type[instance.request_type] += [instance] * (instance.repeats or 1)
        for kind, requests in by_type.items():
            with quiet_libraries():
                responses = getattr(self.lm, kind)(requests, disable_tqdm=True)
            for request, response in zip(requests, responses, strict=True):
                request.resps.append(response)
        return list(self._rows(work)), self.lm.told()

    def _rows(self, work: list[tuple[str, Role, int, list[Any], Any | None]]) -> Iterable[ItemScore]:
        together: dict[tuple[str, Role], list[Any]] = defaultdict(list)
        for task, role, _, instances, _ in work:
            together[task, role] += instances
        for key, instances in together.items():
            for ensemble in self.tasks[key].source.task._filters if instances else ():
                ensemble.apply(instances)
        for task, role, item, instances, gold in work:
            source = self.tasks[task, role].source
            doc = self.tasks[task, role].requests[item].doc
            logliks = _logliks(instances, gold)
            if not all(math.isfinite(value) for value in logliks):
                raise EvaluationError(
                    f"task {task!r}, item {item}: log-likelihood is not finite; the merge is broken"
                    f" ({self._broken([*instances, gold])})"
                )
            metrics = {}
            for ensemble in source.task._filters if instances else ():
                responses = [instance.filtered_resps[ensemble.name] for instance in instances]
                for name, value in source.task.process_results(doc, responses).items():
                    metrics[f"{name},{ensemble.name}"] = plain(value)
            form = form_of(self.lm, source, doc, instances, gold)
            objective, tokens = (None, 0) if form is None else (form.value(logliks), form.size)
            yield ItemScore(task, role, item, metrics, objective, logliks, tokens)

    def _broken(self, instances: list[Any]) -> str:
        """Where the numbers of this item first stop being finite."""
        tokens = next(s.tokens for i in instances if i is not None for s in self.lm.sequences(i))
        return f"first at {first_broken(self.lm.model, tokens)}"


def _logliks(instances: list[Any], gold: Any | None) -> tuple[float, ...]:
    """Log-likelihood of each request of an item in order, the gold answer's last."""
    values = []
    for instance in [*instances, *([gold] if gold is not None else [])]:
        if instance.request_type == "loglikelihood":
            values.append(float(instance.resps[0][0]))
        elif instance.request_type == "loglikelihood_rolling":
            values.append(float(instance.resps[0]))
    return tuple(values)


def plain(value: Any) -> Any:
    """A metric's value as JSON can hold it: numbers, text, lists."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, bool):
        return float(value)
    return value if isinstance(value, str) or value is None else float(value)


def restored(value: Any) -> Any:
    """A metric's journalled value as lm-eval's aggregations expect it: lists are tuples again."""
    return tuple(restored(part) for part in value) if isinstance(value, list) else value
