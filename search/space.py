"""The search space: genome <-> merge plan. No clamps, no folds: the genome told is the genome merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shoal.errors import RecipeError, ShoalError
from shoal.search.genes import Genes, check_bounds, check_types, split_fixed
from shoal.search.plans import fixed_difference, parameter
from shoal.search.shapes import Floats, Shape, layer_basis
from shoal.types import MergePlan, OutputGroup, ParameterSpec, Source, TensorGroup

EXACT = 1e-12  # encode(decode(x)) and decode(encode(p)) agree to this, relative to values above 1


class Slot(NamedTuple):
    """One number of a plan that genes decide: of a group (source None) or of its source at a position."""

    group: int
    source: int | None
    parameter: str


@dataclass(frozen=True)
class Table:
    """Values of searched parameters for a heat map: one row per (parameter, model, tensor type).

    columns: "0" to "L-1" for the layers, then the groups outside of them (embed, norm, head, other).
    values: [rows, columns], natural units; nan where the model has no such group.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Floats


@dataclass(frozen=True, eq=False)
class Space:
    """Genes and what they mean; build it with `make_space`.

    names: of the genes, e.g. `weight[model2].attn.c1`. low, high, x0: float64 [genes], bounds and start,
    natural units. uniform_genome: float64 [genes], every parameter at its default for all sources and layers
    (the uniform merge). groups: tensor groups in plan order. tensor_types: each with genes of its own; ()
    where all share. slots, columns, factors: value of slot i = sum over j of factors[i, j] *
    genome[columns[i, j]].
    """

    shape: Shape
    names: tuple[str, ...]
    low: Floats
    high: Floats
    x0: Floats
    uniform_genome: Floats
    groups: tuple[TensorGroup, ...]
    tensor_types: tuple[str, ...]
    template: MergePlan
    slots: tuple[Slot, ...]
    columns: NDArray[np.intp]
    factors: Floats

    @property
    def size(self) -> int:
        """Number of genes."""
        return len(self.names)

    def decode(self, genome: ArrayLike) -> MergePlan:
        """The plan of `genome` [genes], natural units, not clamped. ShoalError for a wrong shape or nan."""
        return self._fill(self._slot_values(genome))

    def encode(self, plan: MergePlan) -> Floats:
        """The genome of `plan`, bounds aside; ShoalError, with the residual, where the space has none."""
        if (plan.dtype, plan.seed) != (self.template.dtype, self.template.seed):
            raise ShoalError(
                f"plan is not of this space: dtype and seed {plan.dtype}, {plan.seed}; "
                f"expected {self.template.dtype}, {self.template.seed}"
            )
        genome, residual = self.project(plan)
        if not residual <= EXACT * max(1.0, float(np.abs(genome).max())):
            raise ShoalError(
                f"plan is not in the image of this {self.shape} space: the nearest one differs by "
                f"{residual:.3g} in some parameter; use project() to accept that, or a finer shape"
            )
        return genome

    def project(self, plan: MergePlan) -> tuple[Floats, float]:
        """The least-squares nearest genome [genes] and the largest difference left in any parameter.

        Fixed parameters count in the residual; dtype and seed do not. ShoalError where models, operators,
        groups, sources, or the names of parameters differ: such a plan has no place in this space.
        """
        fixed = fixed_difference(self.decode(self.x0), plan, set(self.slots))
        wanted = np.array([parameter(plan, slot) for slot in self.slots], dtype=np.float64)
        dense = np.zeros((len(self.slots), self.size))
        np.add.at(dense, (np.arange(len(self.slots))[:, None], self.columns), self.factors)
        genome: Floats = np.linalg.lstsq(dense, wanted, rcond=None)[0].astype(np.float64)
        left = np.abs(self._slot_values(genome) - wanted).max()
        return genome, max(fixed, float(left))

    def ranges(self) -> list[tuple[str, str, float, float]]:
        """(parameter, model, low, high): the range of any group's value that the genes' bounds imply.

        Natural units; model is "" for parameters of a group.
        """
        ends = (self.factors * self.low[self.columns], self.factors * self.high[self.columns])
        lows, highs = np.minimum(*ends).sum(axis=1), np.maximum(*ends).sum(axis=1)
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for slot, low, high in zip(self.slots, lows.tolist(), highs.tolist(), strict=True):
            key = (slot.parameter, self._model(slot.source))
            before = found.get(key, (math.inf, -math.inf))
            found[key] = (min(before[0], low), max(before[1], high))
        return [(*key, *bounds) for key, bounds in found.items()]

    def values(self, genome: ArrayLike) -> Table:
        """What `genome` means per layer, as a table for heat maps."""
        layers = sorted({g.layer for g in self.groups if g.layer is not None})
        columns = [*map(str, layers), *(g.name for g in self.groups if g.layer is None)]
        types = self.tensor_types or ("",)
        rows: dict[str, list[float]] = {}
        for slot, value in zip(self.slots, self._slot_values(genome).tolist(), strict=True):
            group, model = self.groups[slot.group], self._model(slot.source)
            head = f"{slot.parameter}[{model}]" if model else slot.parameter
            for kind in types:
                row = rows.setdefault(f"{head}.{kind}" if kind else head, [math.nan] * len(columns))
                if group.layer is None:
                    row[columns.index(group.name)] = value
                elif kind in ("", group.kind):
                    row[layers.index(group.layer)] = value
        return Table(tuple(rows), tuple(columns), np.array(list(rows.values())))

    def _model(self, source: int | None) -> str:
        return "" if source is None else self.template.models[self.template.groups[0].sources[source].model]

    def _slot_values(self, genome: ArrayLike) -> Floats:
        genes = np.asarray(genome, dtype=np.float64)
        if genes.shape != (self.size,) or not np.isfinite(genes).all():
            raise ShoalError(
                f"genome: expected {self.size} finite numbers, found shape {genes.shape}: {genes}"
            )
        total = np.zeros(len(self.slots))
        for j in range(self.columns.shape[1]):  # in this order, not by BLAS: the same bits on every machine
            total += self.factors[:, j] * genes[self.columns[:, j]]
        return total

    def _fill(self, values: Floats) -> MergePlan:
        of_group: list[dict[str, float | bool]] = [dict(g.parameters) for g in self.template.groups]
        of_source = [[dict(s.parameters) for s in g.sources] for g in self.template.groups]
        for slot, value in zip(self.slots, values.tolist(), strict=True):
            if slot.source is None:
                of_group[slot.group][slot.parameter] = value
            else:
                of_source[slot.group][slot.source][slot.parameter] = value
        groups = []
        for group, parameters, per_source in zip(self.template.groups, of_group, of_source, strict=True):
            sources = tuple(replace(s, parameters=p) for s, p in zip(group.sources, per_source, strict=True))
            groups.append(replace(group, sources=sources, parameters=parameters))
        return replace(self.template, groups=tuple(groups))


def make_space(
    shape: Shape,
    groups: Sequence[TensorGroup],
    models: Sequence[str],
    base: int | None,
    sources: Sequence[int],
    operator: str,
    parameters: Sequence[ParameterSpec],
    *,
    tensor_types: Sequence[str] = (),
    blocks: int = 4,
    coefficients: int = 3,
    bounds: Mapping[str, tuple[float, float]] = {},
    fixed: Mapping[str, float | bool | Sequence[float]] = {},
    dtype: str,
    seed: int,
) -> Space:
    """The space of all plans that merge `sources` (indices into `models`) with `operator`, in one of four
    shapes.

    Searched is every parameter with `searched` or with an entry in `bounds`, unless `fixed`: once per source
    (scope `source`) or once (scope `group`), and per tensor type where `tensor_types` names some. Per such
    set: `uniform` 1 gene; `blocks` one per contiguous block of layers; `layers` one per layer; `curve` s, c1,
    ... of lambda(z) = s + sum over k>=1 of c_k cos(pi k z) at z = (l + 1/2)/L, `coefficients` genes in all. A
    parameter with a domain is `uniform` where the others are `curve`: a curve between legal values can be
    illegal.

    Groups outside the layers, and kinds that are no tensor type (say, norms), take the mean over tensor
    types: of their layer's value, or outside of the mean over layers (for a curve that is s).

    bounds are of genes: `name` for values, `name_curve` for every c_k (default +-(high - low)/(4k)). fixed:
    numbers, switches, or one number per source. A parameter neither searched nor fixed is left to the
    operator's default. Start: the default (None: 1/number of sources; the middle where bounds exclude it),
    c_k = 0.

    Raises RecipeError for whatever does not fit together, and where nothing is left to search.
    """
    specs = {p.name: p for p in parameters}
    check_bounds(specs, bounds, fixed)
    check_types(groups, tensor_types)
    if not groups or not sources:
        raise RecipeError(f"space: expected groups and sources, found {len(groups)} and {len(sources)}")
    if not set(sources) <= set(range(len(models))):
        raise RecipeError(f"space: sources {list(sources)} are not all among the {len(models)} models")
    of_group, of_source = split_fixed(specs, fixed, len(sources))
    template = MergePlan(
        models=tuple(models),
        base=base,
        groups=tuple(
            OutputGroup(
                name=group.name,
                operator=operator,
                sources=tuple(Source(m, group.name, p) for m, p in zip(sources, of_source, strict=True)),
                tensors=tuple(group.tensors),
                parameters=of_group,
            )
            for group in groups
        ),
        dtype=dtype,
        seed=seed,
    )
    searched = [p for p in parameters if (p.searched or p.name in bounds) and p.name not in fixed]
    layers = sorted({g.layer for g in groups if g.layer is not None})
    types = tuple(tensor_types) or ("",)
    genes = Genes()
    for spec in searched:
        own_shape: Shape = "uniform" if shape == "curve" and spec.domain is not None else shape
        basis = layer_basis(own_shape, len(layers), blocks=blocks, coefficients=coefficients)
        for kind in types:
            has = [
                i for i, l in enumerate(layers) if any(g.layer == l and kind in ("", g.kind) for g in groups)
            ]
            if own_shape != "uniform" and np.linalg.matrix_rank(basis.matrix[has]) < len(basis.labels):
                raise RecipeError(
                    f"space.tensor_types: only {len(has)} of {len(layers)} layers have {kind!r} tensors, "
                    f"too few for {len(basis.labels)} genes of shape {own_shape!r}; "
                    "use fewer genes, or no tensor types"
                )
        for position in _positions(spec, len(sources)):
            model = "" if position is None else models[sources[position]]
            for kind in types:
                genes.add(spec, position, (model, kind), basis, bounds, len(sources))
    if not genes.names:
        raise RecipeError(
            f"space: {operator} has nothing to search here: every parameter is fixed or has none"
        )
    slots, columns, factors = _slots(genes, groups, searched, len(sources), layers, types)
    return Space(
        shape=shape,
        names=tuple(genes.names),
        low=_frozen(genes.low),
        high=_frozen(genes.high),
        x0=_frozen(genes.start),
        uniform_genome=_frozen(genes.default),
        groups=tuple(groups),
        tensor_types=tuple(tensor_types),
        template=template,
        slots=slots,
        columns=columns,
        factors=factors,
    )


def _slots(
    genes: Genes,
    groups: Sequence[TensorGroup],
    searched: Sequence[ParameterSpec],
    sources: int,
    layers: Sequence[int],
    types: Sequence[str],
) -> tuple[tuple[Slot, ...], NDArray[np.intp], Floats]:
    """Every searched number of a plan, and the genes and factors that make it, both [slots, width]."""
    slots, rows = [], []
    for index, group in enumerate(groups):
        for spec in searched:
            for position in _positions(spec, sources):
                slots.append(Slot(index, position, spec.name))
                rows.append(genes.row(spec.name, position, group, layers, types))
    width = max(map(len, rows))
    columns = np.zeros((len(rows), width), dtype=np.intp)
    factors = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        columns[i, : len(row)], factors[i, : len(row)] = zip(*row, strict=True)
    columns.flags.writeable = factors.flags.writeable = False
    return tuple(slots), columns, factors


def _positions(spec: ParameterSpec, sources: int) -> Sequence[int | None]:
    return range(sources) if spec.scope == "source" else (None,)


def _frozen(values: Sequence[float]) -> Floats:
    array = np.array(values, dtype=np.float64)
    array.flags.writeable = False
    return array


def lift(space_from: Space, space_to: Space, genome: ArrayLike) -> Floats:
    """The genome of `space_to` with exactly the plan that `genome` has in `space_from`.

    Exact from uniform to anything, blocks to multiples of blocks and to layers, curve to more coefficients
    and to layers, no tensor types to some. ShoalError, with the residual, where the spaces do not nest.
    """
    return space_to.encode(space_from.decode(genome))
