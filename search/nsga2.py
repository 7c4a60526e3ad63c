"""NSGA-II for two or more objectives, by pymoo (the extra `shoal[pareto]`); the one module that knows it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from shoal.errors import ShoalError
from shoal.search.ask_tell import Asked, Floats, default_sigma0

FAILED = 1e300  # of an objective, minimised: finite, so that crowding distances of the others stay numbers


class NSGA2:
    """NSGA-II (Deb et al. 2002), pymoo's implementation with its defaults (SBX, polynomial mutation).

    objectives: M >= 2, higher is better. The first generation is x0 and normal samples around it with step `sigma0`
    (a fraction of the range, None for twice `default_sigma0`: a front is wider than an optimum, and what the first
    generation does not span crossover finds slowly); for a warm start `warm_sigma0(N)`. The seed and the objectives
    told decide every genome; numpy.random is not touched.

    `front` holds what no other survivor dominates, by scores that are noisy: test them again on other items.

    Raises ShoalError without pymoo, naming the extra, and for what cannot be searched.
    """

    def __init__(
        self,
        low: ArrayLike,
        high: ArrayLike,
        x0: ArrayLike,
        *,
        objectives: int,
        popsize: int | None = None,
        sigma0: float | None = None,
        seed: int,
    ) -> None:
        if objectives < 2:
            raise ShoalError(
                f"nsga2: expected two or more objectives, found {objectives}; use cma-es for one"
            )
        self._asked = Asked(low, high, x0, popsize)
        n = self._asked.x0.size
        self.sigma0 = min(1.0, 2 * default_sigma0(n)) if sigma0 is None else float(sigma0)
        if not 0 < self.sigma0 <= 1:
            raise ShoalError(f"sigma0: expected a fraction of the range in (0, 1], found {self.sigma0}")
        self.objectives = objectives
        generator = np.random.default_rng([seed, 1])
        start = self._asked.unit(self._asked.x0)
        first = start + self.sigma0 * generator.standard_normal((self.popsize, n))
        first[0] = start
        self._algorithm = _algorithm(np.clip(first, 0.0, 1.0), objectives, seed)
        self._spare = generator
        self._infills: Any = None

    @property
    def popsize(self) -> int:
        """Candidates per generation."""
        return self._asked.popsize

    @property
    def generation(self) -> int:
        """Generations told so far, failed ones included."""
        return self._asked.generation

    @property
    def front(self) -> tuple[Floats, Floats]:
        """Genomes [K, N] that no other survivor dominates, natural units, and their objectives [K, M]; K may be 0."""
        found = self._algorithm.opt
        if found is None:
            return np.empty((0, self._asked.x0.size)), np.empty((0, self.objectives))
        unit, values = np.array(found.get("X"), dtype=np.float64), -np.array(found.get("F"), dtype=np.float64)
        alive = (values > -FAILED).all(axis=1)
        return self._asked.natural(unit[alive]), values[alive]

    @property
    def mean(self) -> Floats:
        """The genome [N] of the front with the largest sum of objectives; x0 where there is none."""
        genomes, values = self.front
        return self._asked.x0.copy() if not len(genomes) else genomes[int(np.argmax(values.sum(axis=1)))]

    def ask(self) -> Floats:
        """Genomes [popsize, N], natural units, within the bounds."""
        self._asked.check_ask()
        self._infills = self._algorithm.ask()
        unit = np.array(self._infills.get("X"), dtype=np.float64)
        # duplicates are dropped, at last even without replacement: then uniform samples fill the generation
        missing = self.popsize - len(unit)
        filled = np.vstack([unit, self._spare.random((missing, unit.shape[1]))]) if missing else unit
        if missing:
            self._infills = type(self._infills).new("X", filled)
        return self._asked.ask(filled)

    def tell(self, genomes: ArrayLike, fitness: ArrayLike) -> None:
        """Objectives [popsize, M] of the genomes asked last; a row with a nan failed, and everything dominates it."""
        values = self._asked.check_tell(genomes, fitness, self.objectives)
        self._infills.set("F", np.where(np.isneginf(values), FAILED, -values))
        self._algorithm.tell(infills=self._infills)


def _algorithm(first: Floats, objectives: int, seed: int) -> Any:
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2 as PymooNSGA2
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination
    except ModuleNotFoundError as error:
        if error.name != "pymoo":
            raise
        raise ShoalError("nsga2 needs pymoo: pip install 'shoal[pareto]'") from None
    popsize, n = first.shape
    problem = Problem(n_var=n, n_obj=objectives, xl=np.zeros(n), xu=np.ones(n))
    algorithm = PymooNSGA2(pop_size=popsize, sampling=first)
    algorithm.setup(problem, termination=NoTermination(), seed=seed, verbose=False)
    return algorithm
