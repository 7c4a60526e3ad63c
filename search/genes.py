"""Which genes a search space has: names, bounds and start; internal to `shoal.search.space`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shoal.errors import RecipeError, nearest
from shoal.search.shapes import Basis
from shoal.types import ParameterSpec, TensorGroup

# a gene block: parameter, position among the sources (None: of the group), tensor type ("" where all share)
Key = tuple[str, int | None, str]


@dataclass
class Genes:
    """Genes in order, and where the block of each (parameter, source, tensor type) starts."""

    names: list[str] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    default: list[float] = field(default_factory=list)
    blocks: dict[Key, tuple[int, Basis]] = field(default_factory=dict)

    def add(
        self,
        spec: ParameterSpec,
        source: int | None,
        labels: tuple[str, str],
        basis: Basis,
        bounds: Mapping[str, tuple[float, float]],
        sources: int,
    ) -> None:
        """Append the block of one parameter; labels: model ("" for a group's parameter) and tensor type."""
        model, tensor_type = labels
        low, high = bounds.get(spec.name, (spec.low, spec.high))
        default = 1.0 / sources if spec.default is None else spec.default
        self.blocks[spec.name, source, tensor_type] = (len(self.names), basis)
        head = f"{spec.name}[{model}]" if model else spec.name
        for label, order in zip(basis.labels, basis.order, strict=True):
            self.names.append(".".join(part for part in (head, tensor_type, label) if part))
            if order == 0:
                # a recipe may move the bounds away from the default: then a search starts in their middle
                inside = low <= default <= high
                self._gene(low, high, default if inside else (low + high) / 2, default)
            else:
                reach = (high - low) / (4 * order)
                self._gene(*bounds.get(f"{spec.name}_curve", (-reach, reach)), 0.0, 0.0)

    def row(
        self, name: str, source: int | None, group: TensorGroup, layers: Sequence[int], types: Sequence[str]
    ) -> list[tuple[int, float]]:
        """(gene, factor) pairs whose sum of products is the parameter's value in `group`, never empty."""
        own = [group.kind] if group.layer is not None and group.kind in types else list(types)
        pairs: list[tuple[int, float]] = []
        for kind in own:
            start, basis = self.blocks[name, source, kind]
            if group.layer is None:
                factors = basis.outside
            else:
                factors = basis.matrix[layers.index(group.layer)]
            pairs += [(start + i, float(f) / len(own)) for i, f in enumerate(factors) if f != 0.0]
        return pairs

    def _gene(self, low: float, high: float, start: float, default: float) -> None:
        self.low.append(float(low))
        self.high.append(float(high))
        self.start.append(float(start))
        self.default.append(float(default))


def check_bounds(
    specs: Mapping[str, ParameterSpec], bounds: Mapping[str, tuple[float, float]], fixed: Mapping[str, object]
) -> None:
    """RecipeError for an unknown name, a bad interval, one outside the domain, or one also fixed."""
    valid = [*specs, *(f"{n}_curve" for n, s in specs.items() if s.domain is None)]
    for name, (low, high) in bounds.items():
        where = f"space.bounds.{name}"
        if name not in valid:
            raise RecipeError(f"{where}: no such parameter; {nearest(name, valid)}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise RecipeError(f"{where}: expected two finite numbers, low < high; found [{low}, {high}]")
        if name not in specs:
            if not low <= 0.0 <= high:
                raise RecipeError(f"{where}: must contain 0, where the curve is flat; found [{low}, {high}]")
            continue
        domain = specs[name].domain
        if domain is not None and not (domain[0] <= low and high <= domain[1]):
            raise RecipeError(f"{where}: [{low}, {high}] leaves the domain [{domain[0]}, {domain[1]}]")
        if name in fixed:
            raise RecipeError(f"{where}: {name!r} is also fixed; give bounds or a fixed value, not both")


def check_types(groups: Sequence[TensorGroup], types: Sequence[str]) -> None:
    """RecipeError for a tensor type that no layer has, or that is named twice."""
    kinds = {g.kind for g in groups if g.layer is not None}
    for name in types:
        if name not in kinds:
            raise RecipeError(f"space.tensor_types: no layer has {name!r} tensors; {nearest(name, kinds)}")
    if len(set(types)) != len(types):
        raise RecipeError(f"space.tensor_types: each may be named once, found {list(types)}")


def split_fixed(
    specs: Mapping[str, ParameterSpec],
    fixed: Mapping[str, float | bool | Sequence[float]],
    sources: int,
) -> tuple[dict[str, float | bool], list[dict[str, float]]]:
    """Fixed values as (parameters of every group, parameters of each source).

    A name without a spec is an option of the method (`normalize`), whose check is the method's own business.
    """
    of_group: dict[str, float | bool] = {}
    of_source: list[dict[str, float]] = [{} for _ in range(sources)]
    for name, value in fixed.items():
        where, spec = f"space.fixed.{name}", specs.get(name)
        if isinstance(value, Sequence):
            if spec is None or spec.scope != "source":
                raise RecipeError(f"{where}: a list is for parameters of sources; give one value")
            if len(value) != sources:
                raise RecipeError(f"{where}: expected {sources} values, one per source; found {len(value)}")
        if spec is None or spec.scope == "group":
            assert not isinstance(value, Sequence)
            of_group[name] = value if isinstance(value, bool) else float(value)
            found = [float(value)]
        else:
            found = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * sources
            for parameters, one in zip(of_source, found, strict=True):
                parameters[name] = one
        low, high = (spec.domain if spec is not None else None) or (-math.inf, math.inf)
        for one in found:
            if not (math.isfinite(one) and low <= one <= high):
                raise RecipeError(f"{where}: expected a finite number in [{low}, {high}], found {one}")
    return of_group, of_source
