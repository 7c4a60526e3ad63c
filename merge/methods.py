"""The merge methods, their parameters and where a search of them starts; no torch in here.

Names and semantics are mergekit's (0.1.5): what a plan says is what the same numbers in a mergekit YAML say. Most
methods have kernels of our own (`native`); the others are done by mergekit, slower, through the same interface.
A plan that leaves out a parameter means the default written here, and `resolved` is the one place that fills it in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from shoal.errors import RecipeError, nearest
from shoal.types import MergePlan, OutputGroup, ParameterSpec

Base = Literal["required", "optional", "none"]


@dataclass(frozen=True)
class Method:
    """One way to merge tensors.

    base: whether there is a base model that is no source (`none`: every model is a source with a weight).
    min_sources, max_sources: how many sources, the base not counted; None: no limit.
    options: switches that no search touches, with their defaults. native: merged by our own kernels, as long as the
    options in native_options have the values given there.
    """

    name: str
    parameters: tuple[ParameterSpec, ...]
    base: Base
    min_sources: int = 1
    max_sources: int | None = None
    native: bool = False
    options: Mapping[str, bool | float] = field(default_factory=dict)
    native_options: Mapping[str, bool | float] = field(default_factory=dict)
    version: int = 1

    @property
    def drops(self) -> bool:
        """Whether it drops elements of the sources' deltas."""
        return any(p.name in ("density", "select_topk") for p in self.parameters)


@dataclass(frozen=True)
class Resolved:
    """All parameters of one output group: what the plan says, and defaults for what it does not say.

    per_source: one mapping per source, in plan order. shared: of the group, options included.
    """

    per_source: tuple[Mapping[str, float], ...]
    shared: Mapping[str, float | bool]


def _weight(low: float, high: float) -> ParameterSpec:
    return ParameterSpec("weight", "source", low, high, default=None)


def _fixed(
    name: str,
    scope: Literal["source", "group"],
    low: float,
    high: float,
    default: float,
    domain: tuple[float, float] | None = None,
) -> ParameterSpec:
    return ParameterSpec(name, scope, low, high, default, domain, searched=False)


_DENSITY = _fixed("density", "source", 0.1, 1.0, 0.5, domain=(0.0, 1.0))
# della draws with probabilities density +- epsilon, which must lie inside (0, 1): these bounds cannot leave it
_DELLA = (
    _weight(-0.2, 1.5),
    _fixed("density", "source", 0.3, 0.7, 0.5, domain=(0.0, 1.0)),
    _fixed("epsilon", "source", 0.01, 0.25, 0.15, domain=(0.0, 0.5)),
    _fixed("lambda", "group", 0.5, 1.5, 1.0),
)
_LAMBDA = _fixed("lambda", "group", 0.5, 1.5, 1.0)
_GAMMA = _fixed("gamma", "source", 0.0, 0.1, 0.01, domain=(0.0, 1.0))
_TASK = (_weight(-0.2, 1.5), _LAMBDA)
_SPARSE = (_weight(-0.2, 1.5), _DENSITY, _LAMBDA)
_RAM_EPSILON = _fixed("epsilon", "group", 1e-7, 1e-3, 1e-5, domain=(0.0, 1.0))
_T = ParameterSpec("t", "group", 0.0, 1.0, default=0.5, domain=(0.0, 1.0))


def _sparse(
    name: str,
    normalize: bool,
    rescale: bool,
    native: bool = False,
    parameters: tuple[ParameterSpec, ...] = _SPARSE,
) -> Method:
    options = {"normalize": normalize, "rescale": rescale}
    return Method(name, parameters, base="required", native=native, options=options)


METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method("linear", (_weight(0.0, 1.0),), base="none", native=True, options={"normalize": True}),
        Method("task_arithmetic", _TASK, base="required", native=True, options={"normalize": False}),
        Method("slerp", (_T,), base="required", max_sources=1, native=True),
        _sparse("ties", normalize=True, rescale=False, native=True),
        _sparse("dare_linear", normalize=False, rescale=True, native=True),
        _sparse("dare_ties", normalize=False, rescale=True, native=True),
        _sparse("breadcrumbs", normalize=False, rescale=False, native=True, parameters=(*_SPARSE, _GAMMA)),
        _sparse(
            "breadcrumbs_ties", normalize=False, rescale=False, native=True, parameters=(*_SPARSE, _GAMMA)
        ),
        _sparse("della", normalize=True, rescale=True, native=True, parameters=_DELLA),
        _sparse("della_linear", normalize=False, rescale=True, native=True, parameters=_DELLA),
        Method(
            "model_stock",
            (),
            base="required",
            min_sources=2,
            native=True,
            options={"filter_wise": False},
            native_options={"filter_wise": False},
        ),
        Method(
            "nuslerp",
            (_weight(0.0, 1.0),),
            base="optional",
            min_sources=2,
            max_sources=2,
            native=True,
            options={"nuslerp_row_wise": False, "nuslerp_flatten": True},
            native_options={"nuslerp_flatten": True},
        ),
        Method(
            "multislerp",
            (_weight(0.0, 1.0),),
            base="optional",
            native=True,
            options={"normalize_weights": True, "eps": 1e-8},
        ),
        Method(
            "sce",
            (ParameterSpec("select_topk", "group", 0.05, 1.0, 1.0, domain=(0.0, 1.0)),),
            base="required",
            native=True,
        ),
        Method("karcher", (), base="none", native=True, options={"max_iter": 10, "tol": 1e-5}),
        Method(
            "nearswap",
            (ParameterSpec("t", "group", 0.0, 0.01, 0.001, domain=(0.0, float("inf"))),),
            base="required",
            max_sources=1,
        ),
        Method("arcee_fusion", (), base="required", max_sources=1),
        Method("ram", (_RAM_EPSILON,), base="required"),
        Method(
            "ramplus_tl",
            (
                ParameterSpec("r", "group", 0.0, 0.5, 0.1),
                ParameterSpec("alpha", "group", 0.0, 1.0, 0.2, domain=(0.0, float("inf"))),
                _RAM_EPSILON,
            ),
            base="required",
        ),
        Method(
            "passthrough",
            (ParameterSpec("scale", "source", 0.5, 1.5, 1.0),),
            base="none",
            max_sources=1,
            native=True,
        ),
    )
}


def method(name: str) -> Method:
    """The method called `name`, or `name@version`; RecipeError with the nearest names otherwise."""
    plain, _, version = name.partition("@")
    found = METHODS.get(plain)
    if found is None:
        raise RecipeError(f"unknown merge method {plain!r}; {nearest(plain, METHODS)}")
    if version and version != str(found.version):
        raise RecipeError(
            f"merge method {plain!r} has version {found.version} here, not {version}; "
            "use the version of shoal that the lock names"
        )
    return found


def resolved(group: OutputGroup) -> Resolved:
    """Parameters of `group`, checked against its method: unknown names, domains and source counts are errors."""
    chosen = method(group.operator)
    count = len(group.sources)
    where = f"group {group.name!r}, method {chosen.name!r}"
    if count < chosen.min_sources or (chosen.max_sources is not None and count > chosen.max_sources):
        limit = "or more" if chosen.max_sources is None else f"to {chosen.max_sources}"
        raise RecipeError(f"{where}: expected {chosen.min_sources} {limit} sources, found {count}")
    by_source = {p.name: p for p in chosen.parameters if p.scope == "source"}
    by_group = {p.name: p for p in chosen.parameters if p.scope == "group"}
    per_source = []
    for source in group.sources:
        _check(source.parameters, by_source, (), where)
        filled = {n: 1.0 / count if p.default is None else p.default for n, p in by_source.items()}
        per_source.append({**filled, **{k: float(v) for k, v in source.parameters.items()}})
    _check(group.parameters, by_group, tuple(chosen.options), where)
    shared: dict[str, float | bool] = {n: p.default for n, p in by_group.items() if p.default is not None}
    return Resolved(tuple(per_source), {**shared, **chosen.options, **group.parameters})


def is_native(group: OutputGroup) -> bool:
    """Whether our own kernels make this group."""
    chosen = method(group.operator)
    return chosen.native and all(
        group.parameters.get(name, chosen.options[name]) == value
        for name, value in chosen.native_options.items()
    )


def check_plan(plan: MergePlan) -> tuple[Resolved, ...]:
    """All parameters of each group; RecipeError where a plan cannot be merged.

    Unknown methods and parameters, wrong sources, a base that is missing or a source too.
    """
    found = []
    for group in plan.groups:
        chosen = method(group.operator)
        found.append(resolved(group))
        where = f"group {group.name!r}, method {chosen.name!r}"
        if chosen.base == "required" and plan.base is None:
            raise RecipeError(f"{where}: needs a base model, and the plan names none")
        for source in group.sources:
            if not 0 <= source.model < len(plan.models):
                raise RecipeError(f"{where}: source {source.model} is none of the {len(plan.models)} models")
            if chosen.base != "none" and source.model == plan.base:
                raise RecipeError(
                    f"{where}: the base model {plan.models[source.model]!r} cannot also be a source"
                )
    return tuple(found)


def _check(
    values: Mapping[str, float | bool],
    specs: Mapping[str, ParameterSpec],
    options: tuple[str, ...],
    where: str,
) -> None:
    for name, value in values.items():
        if name in options:
            continue
        spec = specs.get(name)
        if spec is None:
            raise RecipeError(f"{where}: unknown parameter {name!r}; {nearest(name, [*specs, *options])}")
        if not math.isfinite(value):
            raise RecipeError(f"{where}: {name} must be a finite number, found {value}")
        if spec.domain and not spec.domain[0] <= value <= spec.domain[1]:
            raise RecipeError(f"{where}: {name} must lie in {list(spec.domain)}, found {value}")
