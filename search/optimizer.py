"""The optimizers by name: what `search.algorithm` in a recipe may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from numpy.typing import ArrayLike

from shoal.errors import RecipeError, nearest
from shoal.search.ask_tell import Optimizer, default_popsize, default_sigma0, warm_sigma0
from shoal.search.baselines import Grid, RandomSearch, common_directions
from shoal.search.cmaes import CMAES
from shoal.search.lq import LQCMAES
from shoal.search.nsga2 import NSGA2

__all__ = [
    "CMAES",
    "GROWING",
    "LQCMAES",
    "NSGA2",
    "OPTIMIZERS",
    "Grid",
    "Optimizer",
    "RandomSearch",
    "Start",
    "common_directions",
    "default_popsize",
    "default_sigma0",
    "make_optimizer",
    "warm_sigma0",
]


@dataclass(frozen=True, eq=False)
class Start:
    """What any optimizer may need to begin; each takes what means something to it.

    low, high, x0: [N], natural units. popsize, sigma0: None for the defaults. active: see `CMAES`; off with racing.
    covariance: [N, N] of the first generation (CMA-ES), instead of sigma0. directions: [P, N] of the grid, see
    `common_directions`. objectives: M of NSGA-II. A warm start is an x0 and `sigma0=warm_sigma0(N)`; random search
    and grid know no start.
    """

    low: ArrayLike
    high: ArrayLike
    x0: ArrayLike
    seed: int
    popsize: int | None = None
    sigma0: float | None = None
    active: bool = True
    covariance: ArrayLike | None = None
    directions: ArrayLike = ()
    objectives: int = 2


def _cmaes(s: Start, diagonal: bool = False) -> Optimizer:
    return CMAES(
        s.low, s.high, s.x0, popsize=s.popsize, sigma0=s.sigma0, seed=s.seed, active=s.active,
        diagonal=diagonal, covariance=s.covariance,
    )  # fmt: skip


OPTIMIZERS: Mapping[str, Callable[[Start], Optimizer]] = {
    "cma-es": _cmaes,
    "sep-cma-es": lambda s: _cmaes(s, diagonal=True),
    "lq-cma-es": lambda s: LQCMAES(
        s.low,
        s.high,
        s.x0,
        popsize=s.popsize,
        sigma0=s.sigma0,
        seed=s.seed,
        active=s.active,
        covariance=s.covariance,
    ),
    "random": lambda s: RandomSearch(s.low, s.high, s.x0, popsize=s.popsize, seed=s.seed),
    "grid": lambda s: Grid(s.low, s.high, s.x0, popsize=s.popsize, directions=s.directions),
    "nsga2": lambda s: NSGA2(
        s.low, s.high, s.x0, objectives=s.objectives, popsize=s.popsize, sigma0=s.sigma0, seed=s.seed
    ),
}


# those that learn a mean and a covariance, which `growth.grow` carries into a finer space
GROWING = ("cma-es", "sep-cma-es", "lq-cma-es")


def make_optimizer(name: str, start: Start) -> Optimizer:
    """The optimizer of that name; RecipeError for an unknown one, ShoalError for a start that it cannot use."""
    if name not in OPTIMIZERS:
        raise RecipeError(f"search.algorithm: unknown {name!r}; {nearest(name, OPTIMIZERS)}")
    return OPTIMIZERS[name](start)
