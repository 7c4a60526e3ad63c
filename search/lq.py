"""CMA-ES that scores what a model of fitness expects most of: `lq-cma-es`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from shoal.search.ask_tell import Floats
from shoal.search.cmaes import CMAES
from shoal.search.surrogate import LQModel

Archive = tuple[Floats, Floats, list[int]]  # genomes [n, N], fitness [n], generations

ARCHIVE = 240  # candidates told last that the model knows
LEAST = 3  # candidates of a generation that did not fail, for it to be learnt from
MORE = 1  # times popsize: genomes that are drawn beside, for the model to choose from
TRUSTED = 0.0  # Kendall's tau of forecasts, mean of the last generations, above which the model chooses
WINDOW = 3  # those generations


class LQCMAES:
    """CMA-ES with a linear-quadratic surrogate that preselects candidates (after lq-CMA-ES: Hansen 2019, GECCO).

    Arguments as `CMAES`. In lq-CMA-ES a model that orders the scored part of a population as its scores do (Kendall's
    tau) gives the values of the rest, and candidates are scored one by one until it does. Here a generation is scored as
    a whole, on its items, with noise; and the errors of a model, unlike noise, stay the same from one generation to the
    next, so that a search that ranks by it may follow them. So the model only chooses: (1 + MORE) popsize genomes are drawn, the popsize of which it expects most
    are scored, and the update of CMA-ES ranks true scores only, as in preselection (Ulmer, Streichert & Zell 2003, CEC,
    "Evolution strategies assisted by Gaussian processes with improved pre-selection criterion"). What is told is then no plain sample of the distribution: it lies towards where the model
    points, so the mean goes there faster, by scores that can object, and variance in that direction shrinks earlier.

    The model chooses while its forecasts of the last WINDOW generations, made before they were scored, agreed with
    their scores: a mean tau above TRUSTED. Else a generation is one of CMA-ES. Nothing but what was told enters the
    model, so a replay asks the same genomes. chosen: generations in which the model chose.
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
        covariance: ArrayLike | None = None,
    ) -> None:
        self._cma = CMAES(
            low, high, x0, popsize=popsize, sigma0=sigma0, seed=seed, active=active, covariance=covariance
        )
        self._archive: Archive = np.empty((0, self.mean.size)), np.empty(0), []
        self._model: Callable[[Floats], Floats] | None = None
        self._taus: list[float] = []
        self.chosen = 0

    @property
    def popsize(self) -> int:
        """Candidates per generation."""
        return self._cma.popsize

    @property
    def generation(self) -> int:
        """Generations told so far, failed ones included."""
        return self._cma.generation

    @property
    def mean(self) -> Floats:
        """Mean [N] of the search distribution, natural units."""
        return self._cma.mean

    @property
    def covariance(self) -> Floats:
        """Covariance [N, N] of the search distribution, natural units, bounds aside."""
        return self._cma.covariance

    @property
    def tau(self) -> float:
        """Mean of Kendall's tau between forecasts and scores over the last WINDOW generations."""
        recent = self._taus[-WINDOW:]
        return math.fsum(recent) / len(recent) if recent else math.nan

    def ask(self) -> Floats:
        """Genomes [popsize, N], natural units, within the bounds."""
        if len(self._taus) < WINDOW or not self.tau > TRUSTED:
            return self._cma.ask()
        genomes = self._cma.ask(self._model, MORE * self.popsize)
        self.chosen += 1
        return genomes

    def tell(self, genomes: ArrayLike, fitness: ArrayLike) -> None:
        """Fitness [popsize] of the genomes [popsize, N] asked last; see `Optimizer.tell`."""
        told, values = np.array(genomes, dtype=np.float64), np.array(fitness, dtype=np.float64)
        known = np.isfinite(values) if values.shape == told.shape[:1] else np.zeros(0, dtype=bool)
        if known.sum() < LEAST or told.shape != (self.popsize, self.mean.size):
            self._cma.tell(genomes, fitness)  # too few to learn from, or an error
            return
        now = self.generation
        self._cma.tell(genomes, fitness)
        told, values = told[known], values[known]
        if self._model is not None:
            self._taus.append(_tau(self._model(told), values))
        self._archive = (
            np.concatenate([self._archive[0], told])[-ARCHIVE:],
            np.concatenate([self._archive[1], values])[-ARCHIVE:],
            [*self._archive[2], *[now] * len(told)][-ARCHIVE:],
        )
        self._model = _fitted(self._archive, self.mean, self.covariance)


def _fitted(archive: Archive, mean: Floats, covariance: Floats) -> Callable[[Floats], Floats]:
    """The model of genomes [m, N] in natural units, fitted where the search stands and by its steps."""
    inverse = np.linalg.inv(np.linalg.cholesky(covariance)).T
    genomes, fitness, generations = archive
    model = LQModel((genomes - mean) @ inverse, fitness, generations)
    return lambda x: model((x - mean) @ inverse)


def _tau(forecast: Floats, values: Floats) -> float:
    """Kendall's tau-b; 0 where one of them is the same for all."""
    from scipy.stats import kendalltau  # a second to import, so not with the package

    if np.ptp(forecast) == 0 or np.ptp(values) == 0:
        return 0.0
    return float(kendalltau(forecast, values).statistic)
