"""What a merge is made of: its parameters by layer and tensor type, one table per parameter and parent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.types import MergePlan

_LAYER = re.compile(r"layers\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class WeightMap:
    """One parameter of one parent (model "": of all together) in natural units.

    values: [types][layers], None where the model has no such group. outside: (group, value) of what is in no layer.
    """

    parameter: str
    model: str
    types: tuple[str, ...]
    layers: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    outside: tuple[tuple[str, float], ...]

    @property
    def constant(self) -> float | None:
        """Its value where it is the same everywhere."""
        found = {v for row in self.values for v in row if v is not None} | {v for _, v in self.outside}
        return found.pop() if len(found) == 1 else None


def weight_maps(plan: MergePlan) -> tuple[WeightMap, ...]:
    """Every numeric parameter of the plan, in the order of its first tensor group."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for group in plan.groups:
        _add(found, group.parameters, "", group.name)
        for source in group.sources:
            _add(found, source.parameters, plan.models[source.model], group.name)
    return tuple(_map(parameter, model, values) for (parameter, model), values in found.items())


def _add(
    found: dict[tuple[str, str], dict[str, float]],
    parameters: Mapping[str, float | bool],
    model: str,
    group: str,
) -> None:
    for name, value in parameters.items():
        if not isinstance(value, bool):
            found.setdefault((name, model), {})[group] = float(value)


def _map(parameter: str, model: str, values: Mapping[str, float]) -> WeightMap:
    inside: dict[tuple[str, int], float] = {}
    outside = []
    for group, value in values.items():
        match = _LAYER.fullmatch(group)
        if match is None:
            outside.append((group, value))
        else:
            inside[match[2], int(match[1])] = value
    types = tuple(dict.fromkeys(kind for kind, _ in inside))
    layers = tuple(sorted({layer for _, layer in inside}))
    rows = tuple(tuple(inside.get((kind, layer)) for layer in layers) for kind in types)
    return WeightMap(parameter, model, types, layers, rows, tuple(outside))
