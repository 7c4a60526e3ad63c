"""The ask/tell protocol of all optimizers, its defaults, and the checks that they share.

People see fitness, higher is better. Resuming is replaying: build the optimizer from the same arguments, ask, tell what was
recorded; the next genomes are bitwise the same.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shoal.errors import ShoalError

Floats = NDArray[np.float64]

WARM = 0.3  # of the default first step: what a warm start begins with, see `warm_sigma0`


class Optimizer(Protocol):
    """What a run needs of a search algorithm. Genomes are float64 in natural units (not scaled to [0, 1])."""

    @property
    def popsize(self) -> int:
        """Candidates per generation."""

    @property
    def generation(self) -> int:
        """Generations told so far."""

    @property
    def mean(self) -> Floats:
        """The genome [N] that the optimizer would return now."""

    def ask(self) -> Floats:
        """Genomes [popsize, N] to score next; RuntimeError before those asked last are told."""

    def tell(self, genomes: ArrayLike, fitness: ArrayLike) -> None:
        """Fitness [popsize] of the genomes asked last, higher is better, nan for failed candidates.

        NSGA-II takes [popsize, M], one column per objective; a row with a nan failed.
        RuntimeError where nothing was asked; ShoalError for genomes other than those asked, bit for bit, or
        for a wrong shape.
        """


def default_popsize(n: int) -> int:
    """Candidates per generation for n genes: 4 + floor(3 ln n) (Hansen 2016, arXiv:1604.00772, table 1)."""
    return 4 + math.floor(3 * math.log(n))


def default_sigma0(n: int) -> float:
    """First step size for n genes as a fraction of their range: min(1/6, 0.5/sqrt(n)) (DESIGN, "search/")."""
    return min(1 / 6, 0.5 / math.sqrt(n))


def warm_sigma0(n: int) -> float:
    """First step size where x0 is a merge that is known to be good: WARM = 0.3 times `default_sigma0`.

    Small enough that the first generation stays near what is known, large enough that CMA-ES's own step-size control,
    which doubles sigma within a handful of generations, can leave it.
    """
    return WARM * default_sigma0(n)


class Asked:
    """Order and shapes of ask and tell, scaling and bounds: what every optimizer checks in the same words."""

    def __init__(self, low: ArrayLike, high: ArrayLike, x0: ArrayLike, popsize: int | None) -> None:
        self.low, self.high, self.x0 = (np.array(a, dtype=np.float64) for a in (low, high, x0))
        n = self.x0.size
        if n == 0 or not self.low.shape == self.high.shape == self.x0.shape == (n,):
            raise ShoalError(
                "low, high, x0: expected three arrays [N], N > 0, "
                f"found {self.low.shape}, {self.high.shape}, {self.x0.shape}"
            )
        if not (np.isfinite(self.low) & np.isfinite(self.high) & (self.low < self.high)).all():
            raise ShoalError(f"bounds: expected finite low < high, found {self.low} and {self.high}")
        if not ((self.low <= self.x0) & (self.x0 <= self.high)).all():
            raise ShoalError(
                f"x0: expected a point within the bounds, found {self.x0} in {self.low}..{self.high}"
            )
        self.popsize = default_popsize(n) if popsize is None else popsize
        if self.popsize < 4:
            raise ShoalError(f"popsize: expected at least 4, found {self.popsize}")
        self.generation = 0
        self.waiting: Floats | None = None

    def natural(self, unit: Floats) -> Floats:
        """[0, 1] -> natural units; minimum and maximum take off the last rounding, no more."""
        scaled: Floats = self.low + unit * (self.high - self.low)
        return np.minimum(np.maximum(scaled, self.low), self.high)

    def unit(self, natural: Floats) -> Floats:
        """Natural units -> [0, 1]."""
        return np.asarray((natural - self.low) / (self.high - self.low))

    def ask(self, unit: Floats) -> Floats:
        """Remember and return the genomes of `unit` [popsize, N]."""
        self.waiting = self.natural(unit)
        return self.waiting.copy()

    def check_ask(self) -> None:
        if self.waiting is not None:
            raise RuntimeError("ask: the genomes asked last were not told yet")

    def check_tell(self, genomes: ArrayLike, fitness: ArrayLike, objectives: int | None = None) -> Floats:
        """The fitness as [popsize], or [popsize, objectives]; failed candidates as -inf, in all objectives."""
        if self.waiting is None:
            raise RuntimeError("tell: nothing was asked; call ask first")
        told, values = np.asarray(genomes, dtype=np.float64), np.asarray(fitness, dtype=np.float64)
        expected = (self.popsize,) if objectives is None else (self.popsize, objectives)
        if told.shape != self.waiting.shape or values.shape != expected:
            raise ShoalError(
                f"tell: expected genomes {self.waiting.shape} and fitness {expected}, "
                f"found {told.shape} and {values.shape} (ask gave {self.popsize} genomes)"
            )
        if not np.array_equal(told, self.waiting):
            row = int(np.flatnonzero((told != self.waiting).any(axis=1))[0])
            raise ShoalError(
                f"tell: genome {row} is not the one asked: {told[row]} instead of {self.waiting[row]}; "
                "a journal replays only on the seed, space and library versions that it was written with"
            )
        if np.isposinf(values).any():
            raise ShoalError("tell: a fitness of +inf is no score; tell nan for a failed candidate")
        self.waiting = None
        self.generation += 1
        failed = ~np.isfinite(values.reshape(self.popsize, -1)).all(axis=1)
        values = values.copy()
        values[failed] = -np.inf
        return values
