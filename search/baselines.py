"""Optimizers that learn nothing: what any search must beat at equal cost."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from shoal.errors import ShoalError
from shoal.search.ask_tell import Asked, Floats
from shoal.search.space import Space


class _BestTold:
    """Genomes from a plan made beforehand; returns the best genome told, which overstates its luck on noisy fitness."""

    def __init__(self, low: ArrayLike, high: ArrayLike, x0: ArrayLike, popsize: int | None) -> None:
        self._asked = Asked(low, high, x0, popsize)
        self._best, self._best_fitness = self._asked.x0, -math.inf

    @property
    def popsize(self) -> int:
        """Candidates per generation."""
        return self._asked.popsize

    @property
    def generation(self) -> int:
        """Generations told so far."""
        return self._asked.generation

    @property
    def mean(self) -> Floats:
        """The best genome [N] told so far (x0 before any), natural units."""
        return self._best.copy()

    def tell(self, genomes: ArrayLike, fitness: ArrayLike) -> None:
        """Fitness [popsize] of the genomes [popsize, N] asked last; see `Optimizer.tell`."""
        values = self._asked.check_tell(genomes, fitness)
        best = int(np.argmax(values))
        if values[best] > self._best_fitness:
            self._best = np.array(genomes, dtype=np.float64)[best]
            self._best_fitness = float(values[best])


class RandomSearch(_BestTold):
    """Uniform samples within the bounds. x0 is only what it returns before anything was told."""

    def __init__(
        self, low: ArrayLike, high: ArrayLike, x0: ArrayLike, *, popsize: int | None = None, seed: int
    ) -> None:
        super().__init__(low, high, x0, popsize)
        self._generator = np.random.default_rng(seed)

    def ask(self) -> Floats:
        """Genomes [popsize, N], natural units, within the bounds."""
        self._asked.check_ask()
        return self._asked.ask(self._generator.random((self.popsize, self._asked.x0.size)))


class Grid(_BestTold):
    """One common weight per parent, the same in all layers: the sweep that people do by hand. No seed, no luck.

    directions: [P, N], see `common_directions`; every genome asked is the start with the genes of each direction
    replaced by one value. Values are Halton points (Halton 1960; bases 2, 3, 5, ... per parent) of the range that
    the bounds allow. Unlike a product grid, which must know the budget beforehand and has room for k^P points only,
    they cover line, square or cube evenly at whatever number of candidates the run ends, and a larger budget
    continues them.

    Raises ShoalError where directions do not fit the bounds.
    """

    def __init__(
        self,
        low: ArrayLike,
        high: ArrayLike,
        x0: ArrayLike,
        *,
        popsize: int | None = None,
        directions: ArrayLike,
    ) -> None:
        super().__init__(low, high, x0, popsize)
        self._directions = np.array(directions, dtype=np.float64)
        n = self._asked.x0.size
        if self._directions.ndim != 2 or self._directions.shape[1] != n or not self._directions.size:
            raise ShoalError(
                f"grid: expected directions [P, {n}], P > 0, found shape {self._directions.shape}"
            )
        moved = self._directions != 0
        if (moved.sum(axis=0) > 1).any() or not moved.any(axis=1).all():
            raise ShoalError("grid: every direction needs genes, and none of them may be another's")
        low_, high_ = self._asked.low, self._asked.high
        ends = [
            (low_[m] / d[m], high_[m] / d[m]) for d, m in zip(self._directions, moved, strict=True)
        ]  # d > 0
        self._from = np.array([float(a.max()) for a, _ in ends])
        self._to = np.array([float(b.min()) for _, b in ends])
        if (self._directions < 0).any() or (self._from >= self._to).any():
            raise ShoalError(f"grid: the bounds leave no common weight, from {self._from} to {self._to}")
        self._rest = np.where(moved.any(axis=0), 0.0, self._asked.x0)

    def ask(self) -> Floats:
        """Genomes [popsize, N], natural units, within the bounds."""
        self._asked.check_ask()
        first = self.generation * self.popsize
        points = np.array([_halton(first + i, len(self._from)) for i in range(self.popsize)])
        values = self._from + points * (self._to - self._from)
        genomes = self._rest + values @ self._directions
        return self._asked.ask(self._asked.unit(genomes))


def _halton(index: int, dimensions: int) -> list[float]:
    """Point `index` of the Halton sequence in [0, 1)^dimensions, one prime base each; the first is 1/2, 1/3, 1/5, ..."""
    point, primes = [], (p for p in range(2, 1000) if all(p % q for q in range(2, p)))
    for _, base in zip(range(dimensions), primes, strict=False):
        rest, scale, value = index + 1, 1.0, 0.0
        while rest:
            scale /= base
            rest, digit = divmod(rest, base)
            value += digit * scale
        point.append(value)
    return point


def common_directions(space: Space) -> Floats:
    """[P, N]: adding w times row p to the genes gives source p the weight w more, in all groups alike.

    For the first searched parameter of the space (the weight; slerp's t, which has one row). A row is 1 at the genes
    of values and 0 at those of a curve's cosines and of other parameters.
    """
    first = space.slots[0].parameter
    places = list(dict.fromkeys(slot.source for slot in space.slots if slot.parameter == first))
    dense = np.zeros((len(space.slots), space.size))
    np.add.at(dense, (np.arange(len(space.slots))[:, None], space.columns), space.factors)
    rows = []
    for place in places:
        wanted = np.array([float((slot.source, slot.parameter) == (place, first)) for slot in space.slots])
        # constants lie in the image of every shape, at coefficients 0 and 1: take off the solver's rounding
        rows.append(np.round(np.linalg.lstsq(dense, wanted, rcond=None)[0], 9) + 0.0)
    return np.array(rows)
