"""Merge plans that need no genome: the baselines of every claim; and how two plans differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from shoal.errors import ShoalError
from shoal.types import MergePlan, OutputGroup, Source, TensorGroup

Parameters = Mapping[str, float | bool]
Place = tuple[int, int | None, str]  # group, position among its sources (None: the group itself), parameter


def constant_plan(
    groups: Sequence[TensorGroup],
    models: Sequence[str],
    weights: Mapping[int, float],
    dtype: str,
    seed: int = 0,
) -> MergePlan:
    """`linear@1` with the same weight per model (index -> weight) in every group, normalised to sum 1."""
    for index in weights:
        if not 0 <= index < len(models):
            raise ShoalError(f"constant plan: no model {index}, there are {len(models)}")
    if not weights:
        raise ShoalError("constant plan: expected at least one model, found none")
    return MergePlan(
        models=tuple(models),
        base=None,
        groups=tuple(
            OutputGroup(
                name=group.name,
                operator="linear@1",
                sources=tuple(Source(m, group.name, {"weight": w}) for m, w in weights.items()),
                tensors=tuple(group.tensors),
                parameters={"normalize": True},
            )
            for group in groups
        ),
        dtype=dtype,
        seed=seed,
    )


def uniform_merge_plan(
    groups: Sequence[TensorGroup], models: Sequence[str], sources: Sequence[int], dtype: str, seed: int = 0
) -> MergePlan:
    """The plain average of the source models: the baseline that every search must beat."""
    return constant_plan(groups, models, {m: 1.0 / len(sources) for m in sources}, dtype, seed)


def parent_plan(groups: Sequence[TensorGroup], models: Sequence[str], index: int, dtype: str) -> MergePlan:
    """One model as it is: a single source of weight 1, bitwise that model where `dtype` is its own."""
    return constant_plan(groups, models, {index: 1.0}, dtype)


def parameter(plan: MergePlan, place: Place) -> float | bool:
    """The value of one parameter of a plan that has it (see `fixed_difference`)."""
    group, source, name = place
    owner = plan.groups[group] if source is None else plan.groups[group].sources[source]
    return owner.parameters[name]


def fixed_difference(expected: MergePlan, found: MergePlan, searched: AbstractSet[Place]) -> float:
    """Largest difference between two plans in what is not `searched`; dtype and seed are not compared.

    ShoalError where they differ in anything but numbers: models, groups, tensors, operators, sources,
    switches.
    """
    for what in ("models", "base"):
        _same(what, getattr(expected, what), getattr(found, what))
    _same("groups", [g.name for g in expected.groups], [g.name for g in found.groups])
    largest = 0.0
    for i, (a, b) in enumerate(zip(expected.groups, found.groups, strict=True)):
        _same(f"operator of {a.name}", a.operator, b.operator)
        _same(f"tensors of {a.name}", a.tensors, b.tensors)
        _same(
            f"sources of {a.name}",
            [(s.model, s.group) for s in a.sources],
            [(s.model, s.group) for s in b.sources],
        )
        pairs: list[tuple[int | None, Parameters, Parameters]] = [(None, a.parameters, b.parameters)]
        for position, (s, t) in enumerate(zip(a.sources, b.sources, strict=True)):
            pairs.append((position, s.parameters, t.parameters))
        for j, ours, theirs in pairs:
            _same(f"parameters of {a.name}", sorted(ours), sorted(theirs))
            for name, value in ours.items():
                other = theirs[name]
                if isinstance(value, bool) or isinstance(other, bool):
                    _same(f"{name} of {a.name}", value, other)
                elif (i, j, name) not in searched:
                    largest = max(largest, abs(value - other))
    return largest


def _same(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise ShoalError(f"plan is not of this space: {what}: expected {expected}, found {found}")
