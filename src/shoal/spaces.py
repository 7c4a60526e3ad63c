"""The spaces of a run: the one that its search starts in, and the finer ones that it may grow into."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from shoal.errors import RecipeError, ShoalError
from shoal.lock import StageLock
from shoal.merge.methods import Method
from shoal.recipe import Recipe, SpaceSpec
from shoal.search.growth import lift_map
from shoal.search.items import fraction
from shoal.search.optimizer import GROWING, default_popsize, default_sigma0
from shoal.search.space import Space, make_space
from shoal.types import TensorGroup

TYPES = ("attn", "mlp")
COEFFICIENTS = 4
NESTING = (
    "a search goes on exactly where it was only in a space that contains the one before: uniform grows into any shape,"
    " blocks into a multiple of their number or layers, curve into more coefficients or layers, no tensor types into some"
)


def make_spaces(
    recipe: Recipe,
    chosen: Method,
    groups: tuple[TensorGroup, ...],
    names: Sequence[str],
    base: int | None,
    sources: Sequence[int],
    dtype: str,
) -> tuple[Space, ...]:
    """The space of a recipe and the finer ones of `space.grow`, each of which contains the one before it.

    Every space has more genes than the one before, so the length of a genome says whose it is.

    Raises:
        RecipeError: a space that cannot be, or finer ones that do not nest.
    """
    fixed: Mapping[str, Any] = {**chosen.options, **recipe.merge.parameters}
    stages, kinds = recipe.space.stages(), {group.kind for group in groups}
    types = _tensor_types(stages[0], kinds)
    layers = len({group.layer for group in groups if group.layer is not None})
    spaces = tuple(
        make_space(
            spec.shape,
            groups,
            names,
            base,
            sources,
            f"{chosen.name}@{chosen.version}",
            chosen.parameters,
            tensor_types=types if spec.tensor_types is None else spec.tensor_types,
            blocks=spec.blocks,
            coefficients=spec.coefficients or max(1, min(COEFFICIENTS, layers)),
            bounds=spec.bounds,
            fixed=fixed,
            dtype=dtype,
            seed=recipe.search.seed,
        )
        for spec in stages
    )
    for number, (coarser, finer) in enumerate(pairwise(spaces), start=1):
        where = f"space.grow.{number - 1}: {space_words(finer)}"
        if finer.size <= coarser.size:
            raise RecipeError(f"{where}: expected more genes than {space_words(coarser)} before it")
        try:
            lift_map(coarser, finer)
        except ShoalError:
            raise RecipeError(f"{where}: does not contain {space_words(coarser)}; {NESTING}") from None
    return spaces


def _tensor_types(spec: SpaceSpec, kinds: Collection[str]) -> tuple[str, ...]:
    """Where a recipe names none: attention and MLP apart in a curve, of layers that have both."""
    return TYPES if spec.shape == "curve" and set(TYPES) <= set(kinds) else ()


def space_words(space: Space) -> str:
    """`curve per attn and mlp, 18 genes`."""
    types = f" per {' and '.join(space.tensor_types)}" if space.tensor_types else ""
    return f"{space.shape}{types}, {space.size} genes"


def check_growth(space: SpaceSpec, optimizer: str) -> None:
    """RecipeError for an optimizer that has no mean and covariance to carry into a finer space."""
    if space.grow and optimizer not in GROWING:
        raise RecipeError(
            f"space.grow: {optimizer!r} has no covariance to carry into a finer space; search.optimizer is to be one of"
            f" {', '.join(GROWING)}"
        )


def stage_locks(recipe: Recipe, finer: Sequence[Space]) -> tuple[StageLock, ...]:
    """What the lock holds of the finer spaces; every stage has a random stream of its own."""
    spec = recipe.search
    return tuple(
        StageLock(
            genes=space.names,
            popsize=spec.popsize or default_popsize(space.size),
            sigma0=spec.sigma0 or default_sigma0(space.size),
            seed=int(fraction([spec.seed, "stage", number]) * 2**32),
        )
        for number, space in enumerate(finer, start=1)
    )
