"""What is sent of each generation, from the journal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.journal import EvaluationRow
from shoal.page.weights import weight_maps
from shoal.types import MergePlan


@dataclass(frozen=True)
class Point:
    """A generation that was told. step: item evaluations that the run had spent when its last candidate was scored.

    A generation that scored nothing, since all its candidates failed, counts one, so that steps differ.
    """

    generation: int
    step: int
    values: Mapping[str, float]


def points_of(
    evaluations: Sequence[EvaluationRow],
    tells: Mapping[int, Mapping[str, float | None]],
    courses: Sequence[Mapping[str, Any]],
) -> tuple[Point, ...]:
    """Every generation that was told, in order; the same for each process that reads the same journal.

    evaluations: in completion order. courses: the journal's events of this kind.
    """
    generation_of = {name: generation for generation, told in tells.items() for name in told}
    spent, seconds, total = dict[int, int](), dict.fromkeys(tells, 0.0), 0
    for row in evaluations:
        total += row.items
        generation = generation_of.get(row.candidate)
        if generation is not None and row.role == "search":
            spent[generation] = total
            seconds[generation] += row.seconds_merge + row.seconds_score + row.seconds_rest
    items = {event["generation"]: event["items"] for event in courses}
    points: list[Point] = []
    for generation, told in tells.items():
        before = points[-1].step if points else 0
        step = max(spent.get(generation, 0), before + 1)
        values: dict[str, float] = {
            "search/generation": generation,
            "search/item_evaluations": step,
            "search/candidates": len(told),
            "search/failed": sum(value is None for value in told.values()),
            "search/seconds": seconds[generation],
        }
        if generation in items:
            values["search/items_per_task"] = items[generation]
        points.append(Point(generation, step, values | _fitness(told)))
    return tuple(points)


def _fitness(told: Mapping[str, float | None]) -> dict[str, float]:
    """Best, mean and standard deviation over the candidates; nothing where all failed."""
    found = [value for value in told.values() if value is not None]
    if not found:
        return {}
    mean = math.fsum(found) / len(found)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / len(found))
    return {"fitness/best": max(found), "fitness/mean": mean, "fitness/spread": spread}


def weights_summary(plan: MergePlan, clean: Callable[[str], str] = str) -> dict[str, float]:
    """Each numeric parameter of a merge by model and tensor type: its mean over layers, and its range where it has one.

    clean: what names of models go through.
    """
    summary: dict[str, float] = {}
    for found in weight_maps(plan):
        for kind, row in zip(found.types, found.values, strict=True):
            values = [value for value in row if value is not None]
            name = "/".join(filter(None, ("weights", clean(found.model), kind, found.parameter)))
            summary[name] = math.fsum(values) / len(values)
            if min(values) < max(values):
                summary |= {f"{name}/lowest": min(values), f"{name}/highest": max(values)}
    return summary
