"""Ask/tell optimizers: CMA-ES on pycma, and random search as the baseline that it must beat.

People see fitness, higher is better; the sign flips in exactly one line of this module. Resuming is
replaying: build the optimizer from the same arguments, ask, tell what was recorded; the next genomes are
bitwise the same.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shoal.errors import ShoalError

Floats = NDArray[np.float64]


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

        RuntimeError where nothing was asked; ShoalError for genomes other than those asked, bit for bit, or
        for a wrong shape.
        """


def default_popsize(n: int) -> int:
    """Candidates per generation for n genes: 4 + floor(3 ln n) (Hansen 2016, arXiv:1604.00772, table 1)."""
    return 4 + math.floor(3 * math.log(n))


def default_sigma0(n: int) -> float:
    """First step size for n genes as a fraction of their range: min(1/6, 0.5/sqrt(n)) (DESIGN, "search/")."""
    return min(1 / 6, 0.5 / math.sqrt(n))


class _Asked:
    """Order and shapes of ask and tell, for both optimizers."""

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
        self.waiting: Floats | None = None

    def natural(self, unit: Floats) -> Floats:
        """[0, 1] -> natural units; minimum and maximum take off the last rounding, no more."""
        scaled: Floats = self.low + unit * (self.high - self.low)
        return np.minimum(np.maximum(scaled, self.low), self.high)

    def ask(self, unit: Floats) -> Floats:
        self.waiting = self.natural(unit)
        return self.waiting.copy()

    def check_ask(self) -> None:
        if self.waiting is not None:
            raise RuntimeError("ask: the genomes asked last were not told yet")

    def check_tell(self, genomes: ArrayLike, fitness: ArrayLike) -> Floats:
        """The fitness as [popsize], failed candidates as -inf."""
        if self.waiting is None:
            raise RuntimeError("tell: nothing was asked; call ask first")
        told, values = np.asarray(genomes, dtype=np.float64), np.asarray(fitness, dtype=np.float64)
        if told.shape != self.waiting.shape or values.shape != (self.popsize,):
            raise ShoalError(
                f"tell: expected genomes {self.waiting.shape} and fitness ({self.popsize},), "
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
        return np.where(np.isnan(values), -np.inf, values)


class _Randn:
    """cma's source of normal numbers, private to one optimizer: numpy.random is not touched."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> Floats:
        return self.generator.standard_normal(shape)


class CMAES:
    """CMA-ES (Hansen 2016, arXiv:1604.00772), pycma's implementation, over genes scaled to [0, 1].

    low, high, x0: [N], natural units. popsize: None for `default_popsize`. sigma0: as a fraction of the
    range, None for `default_sigma0`. active: negative weights for the worst candidates; off where their order
    is not known (racing). The seed and the fitness told decide every genome.

    cma is told ranks, not values: CMA-ES uses nothing else, and so ties are broken by ask order on every
    machine (numpy's default argsort is unstable, differently per CPU), and a failed candidate is behind the
    worst of its generation by construction. A generation that failed as a whole says nothing: the
    distribution stays, and the next ask draws again from it. No stop criterion of cma is ever consulted; runs
    stop by our rules only.

    Raises ShoalError for bounds, x0, popsize or sigma0 that cannot be searched.
    """

    def __init__(
        self,
        low: ArrayLike,
        high: ArrayLike,
        x0: ArrayLike,
        *,
        popsize: int | None = None,
        sigma0: float | None = None,
        seed: int,
        active: bool = True,
    ) -> None:
        self._asked = _Asked(low, high, x0, popsize)
        n = self._asked.x0.size
        self.sigma0 = default_sigma0(n) if sigma0 is None else float(sigma0)
        if not 0 < self.sigma0 <= 1:
            raise ShoalError(f"sigma0: expected a fraction of the range in (0, 1], found {self.sigma0}")
        self._generation = 0
        self._solutions: list[Floats] = []
        start = (self._asked.x0 - self._asked.low) / (self._asked.high - self._asked.low)
        if n == 1:
            # cma 4.5.0 breaks in one dimension once minstd or maxstd is reached: add a gene, cut off in ask
            start = np.append(start, 0.5)
        self._es = _strategy(start, self.sigma0, self._asked.popsize, seed, active)

    @property
    def popsize(self) -> int:
        """Candidates per generation."""
        return self._asked.popsize

    @property
    def generation(self) -> int:
        """Generations told so far, failed ones included."""
        return self._generation

    @property
    def mean(self) -> Floats:
        """Mean [N] of the search distribution, natural units: the one to return, not a lucky sample."""
        unit: Floats = np.asarray(self._es.result.xfavorite, dtype=np.float64)
        return self._asked.natural(unit[: self._asked.x0.size])

    @property
    def stds(self) -> Floats:
        """Standard deviations [N] of the search distribution, natural units, bounds aside."""
        unit: Floats = np.asarray(self._es.stds, dtype=np.float64)[: self._asked.x0.size]
        return unit * (self._asked.high - self._asked.low)

    def ask(self) -> Floats:
        """Genomes [popsize, N], natural units, within the bounds."""
        self._asked.check_ask()
        self._solutions = self._es.ask()
        return self._asked.ask(np.array(self._solutions, dtype=np.float64)[:, : self._asked.x0.size])

    def tell(self, genomes: ArrayLike, fitness: ArrayLike) -> None:
        """Fitness [popsize] of the genomes [popsize, N] asked last; see `Optimizer.tell`."""
        values = self._asked.check_tell(genomes, fitness)
        self._generation += 1
        if np.isneginf(values).all():
            return
        order = np.argsort(-values, kind="stable")  # cma minimises: here, and only here, the sign flips
        ranks = np.empty(self.popsize)
        ranks[order] = np.arange(self.popsize)
        self._es.tell(self._solutions, ranks.tolist())


def _strategy(start: Floats, sigma0: float, popsize: int, seed: int, active: bool) -> Any:
    """cma's evolution strategy with every choice made: the one place that knows cma."""
    import cma  # 1.5 s: only for those who search
    from cma.sigma_adaptation import CMAAdaptSigmaCSA

    n = start.size
    options = {
        "randn": _Randn(seed),
        "seed": math.nan,  # "do not touch numpy.random"; 0 and None would mean the time
        "bounds": [[0.0] * n, [1.0] * n],
        "BoundaryHandler": cma.BoundTransform,
        "popsize": popsize,
        "CMA_active": active,
        # mirrors and mean-shift samples are injected into the next ask only: asking again after a failed
        # generation would lose them
        "CMA_mirrors": 0,
        "AdaptSigma": CMAAdaptSigmaCSA,
        # of the range: below what any score can tell apart; keeps a flat or finished search alive
        "minstd": 1e-6,
        "verbose": -10,  # also ignores a cma_signals.in in the working directory
        "verb_disp": 0,
        "verb_log": 0,  # no outcmaes/ folder
        # stop() is never called; were it called by mistake, this is what it may not stop for
        "ftarget": -math.inf,
        "maxfevals": math.inf,
        "maxiter": math.inf,
        "timeout": math.inf,
        "tolconditioncov": 0,
        "tolfacupx": math.inf,
        "tolupsigma": math.inf,
        "tolflatfitness": math.inf,
        "tolfun": 0,
        "tolfunhist": 0,
        "tolfunrel": 0,
        "tolstagnation": 0,
        "tolxstagnation": False,
        "tolx": 0,
    }
    with warnings.catch_warnings():  # cma adds a filter of its own to the process's
        return cma.CMAEvolutionStrategy(start, sigma0, options)


class RandomSearch:
    """Uniform samples within the bounds, with the same protocol: what a search without learning would find.

    Its `mean` is the best genome told so far (x0 before any), which overstates its luck on noisy fitness.
    """

    def __init__(
        self, low: ArrayLike, high: ArrayLike, x0: ArrayLike, *, popsize: int | None = None, seed: int
    ) -> None:
        self._asked = _Asked(low, high, x0, popsize)
        self._generator = np.random.default_rng(seed)
        self._generation = 0
        self._best, self._best_fitness = self._asked.x0, -math.inf

    @property
    def popsize(self) -> int:
        """Candidates per generation."""
        return self._asked.popsize

    @property
    def generation(self) -> int:
        """Generations told so far."""
        return self._generation

    @property
    def mean(self) -> Floats:
        """The best genome [N] told so far, natural units."""
        return self._best.copy()

    def ask(self) -> Floats:
        """Genomes [popsize, N], natural units, within the bounds."""
        self._asked.check_ask()
        return self._asked.ask(self._generator.random((self.popsize, self._asked.x0.size)))

    def tell(self, genomes: ArrayLike, fitness: ArrayLike) -> None:
        """Fitness [popsize] of the genomes [popsize, N] asked last; see `Optimizer.tell`."""
        values = self._asked.check_tell(genomes, fitness)
        self._generation += 1
        best = int(np.argmax(values))
        if values[best] > self._best_fitness:
            self._best = np.array(genomes, dtype=np.float64)[best]
            self._best_fitness = float(values[best])
