"""CMA-ES with a full or a diagonal covariance, by pycma; the one module that knows it.

The sign flips, for cma minimises, in exactly one line of this module.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from shoal.errors import ShoalError
from shoal.search.ask_tell import Asked, Floats, default_sigma0


class _Randn:
    """cma's source of normal numbers, private to one optimizer: numpy.random is not touched."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> Floats:
        return self.generator.standard_normal(shape)


class CMAES:
    """CMA-ES (Hansen 2016, arXiv:1604.00772), pycma's implementation, over genes scaled to [0, 1].

    low, high, x0: [N], natural units. popsize: None for `default_popsize`. sigma0: as a fraction of the
    range, None for `default_sigma0`; for a warm start `warm_sigma0(N)`. active: negative weights for the worst
    candidates; off where their order is not known (racing). diagonal: sep-CMA-ES (Ros & Hansen 2008): variances only,
    learnt about (N + 2)/3 times faster, blind to interactions. covariance: [N, N], natural units, of the first
    generation, e.g. that of a coarser space (`growth.grow`); then sigma0 must be None. The seed and the fitness told
    decide every genome.

    cma is told ranks, not values: CMA-ES uses nothing else, and so ties are broken by ask order on every
    machine (numpy's default argsort is unstable, differently per CPU). A failed candidate is behind the worst of its
    generation, and takes no part in the negative update: it says where not to be, but not how the landscape is
    shaped. Where fewer than mu candidates are left, failed ones count as the old mean, so that nothing moves towards
    them. A generation that failed as a whole says nothing: the distribution stays, and the next ask draws again from
    it. No stop criterion of cma is ever consulted; runs stop by our rules only.

    Raises ShoalError for bounds, x0, popsize, sigma0 or a covariance that cannot be searched.
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
        diagonal: bool = False,
        covariance: ArrayLike | None = None,
    ) -> None:
        self._asked = Asked(low, high, x0, popsize)
        n = self._asked.x0.size
        shape = None if covariance is None else self._unit_covariance(covariance, sigma0)
        if shape is not None:
            # the mean variance is the step size, what is left the matrix
            sigma0 = min(1.0, math.sqrt(float(np.trace(shape)) / n))
            shape = shape / sigma0**2
        self.sigma0 = default_sigma0(n) if sigma0 is None else float(sigma0)
        if not 0 < self.sigma0 <= 1:
            raise ShoalError(f"sigma0: expected a fraction of the range in (0, 1], found {self.sigma0}")
        self._solutions: list[Floats] = []
        start = self._asked.unit(self._asked.x0)
        if n == 1:
            # cma 4.5.0 breaks in one dimension once minstd or maxstd is reached: add a gene, cut off in ask
            start = np.append(start, 0.5)
            shape = None if shape is None else np.eye(2) * shape[0, 0]
        self._es = _strategy(start, self.sigma0, self._asked.popsize, seed, active, diagonal, shape)

    @property
    def popsize(self) -> int:
        """Candidates per generation."""
        return self._asked.popsize

    @property
    def generation(self) -> int:
        """Generations told so far, failed ones included."""
        return self._asked.generation

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

    @property
    def covariance(self) -> Floats:
        """Covariance [N, N] of the search distribution, natural units, bounds aside."""
        n = self._asked.x0.size
        stds = self.stds
        correlation: Floats = np.asarray(self._es.sm.correlation_matrix, dtype=np.float64)
        if correlation.shape != (n, n):  # one gene has a second, idle one; a diagonal sampler has no matrix
            correlation = np.eye(n) if correlation.ndim != 2 else correlation[:n, :n]
        return np.outer(stds, stds) * correlation

    def ask(self, model: Callable[[Floats], Floats] | None = None, more: int = 0) -> Floats:
        """Genomes [popsize, N], natural units, within the bounds.

        model: genomes [m, N] -> fitness [m], higher is better. Where it is given, `more` further genomes are drawn, and
        those popsize are asked that it expects most of, in the order in which they were drawn.
        """
        self._asked.check_ask()
        self._solutions = self._es.ask(self.popsize + more)
        genomes = np.array(self._solutions, dtype=np.float64)[:, : self._asked.x0.size]
        if model is not None:
            kept = np.sort(np.argsort(-model(self._asked.natural(genomes)), kind="stable")[: self.popsize])
            self._solutions, genomes = [self._solutions[i] for i in kept], genomes[kept]
        return self._asked.ask(genomes)

    def tell(self, genomes: ArrayLike, fitness: ArrayLike) -> None:
        """Fitness [popsize] of the genomes [popsize, N] asked last; see `Optimizer.tell`."""
        values = self._asked.check_tell(genomes, fitness)
        failed = np.isneginf(values)
        if failed.all():
            return
        order = np.argsort(-values, kind="stable")  # cma minimises: here, and only here, the sign flips
        ranks = np.empty(self.popsize)
        ranks[order] = np.arange(self.popsize)
        weights = self._es.sp.weights
        kept, first_failed = list(weights), self.popsize - int(failed.sum())
        for rank in range(first_failed, self.popsize):
            if rank < weights.mu:
                self._solutions[order[rank]] = np.array(self._es.result.xfavorite)
            else:
                weights[rank] = 0.0
        try:
            self._es.tell(self._solutions, ranks.tolist())
        finally:
            weights[:] = kept

    def _unit_covariance(self, covariance: ArrayLike, sigma0: float | None) -> Floats:
        """`covariance` for genes in [0, 1], checked."""
        n = self._asked.x0.size
        found = np.asarray(covariance, dtype=np.float64)
        if sigma0 is not None:
            raise ShoalError("sigma0: a covariance says how large the first step is; give one of the two")
        symmetric = found.shape == (n, n) and bool(np.isfinite(found).all()) and np.allclose(found, found.T)
        if not symmetric or np.linalg.eigvalsh(found)[0] <= 0:
            raise ShoalError(
                f"covariance: expected a symmetric positive definite matrix ({n}, {n}), found shape {found.shape}"
            )
        width = self._asked.high - self._asked.low
        return np.asarray(found / np.outer(width, width))


def _strategy(
    start: Floats,
    sigma0: float,
    popsize: int,
    seed: int,
    active: bool,
    diagonal: bool,
    shape: Floats | None,
) -> Any:
    """cma's evolution strategy with every choice made."""
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
        "CMA_diagonal": diagonal,
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
    if shape is not None and diagonal:
        options["CMA_stds"] = np.sqrt(np.diag(shape)).tolist()
    with warnings.catch_warnings():  # cma adds a filter of its own to the process's
        strategy = cma.CMAEvolutionStrategy(start, sigma0, options)
    if shape is not None and not diagonal:
        # cma has no option for a whole matrix; this is what its own (private) _set_C_from does
        strategy.sm.C = shape.copy()
        strategy.sm.update_now(-1)
        strategy._updateBDfromSM()
    return strategy
