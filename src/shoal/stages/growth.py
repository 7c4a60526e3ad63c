"""Growth: the search goes on in a finer space once the one that it is in brings no more."""

from __future__ import annotations

import math
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from shoal.search.growth import grow, level, stalled
from shoal.search.optimizer import Optimizer, Start, make_optimizer
from shoal.search.space import Space
from shoal.spaces import space_words
from shoal.stages.evaluator import Evaluator
from shoal.stages.generation import Ranking


class _Learnt(Protocol):
    """What of an optimizer is carried over; those of `GROWING` have it."""

    @property
    def mean(self) -> NDArray[np.float64]: ...

    @property
    def covariance(self) -> NDArray[np.float64]: ...


class Growth:
    """Which space a search is in, and when it goes on in the next one.

    A function of the lock and of what was told: a resumed run grows where it grew. The journal's event `growth` is for
    readers: generation, stage (1 the first finer space), from, to, popsize, and moved: how far bounds pushed the start
    from the mean that was reached, in units of a parameter.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self._journal, self._seen = evaluator.journal, evaluator.seen
        self._lock, self._patience = evaluator.lock, evaluator.recipe.space.patience
        self._spaces: tuple[Space, ...] = (evaluator.prepared.space, *evaluator.prepared.finer)
        self._stage = 0
        self._levels: list[float] = []

    @property
    def popsize(self) -> int:
        """Candidates per generation of the next finer space."""
        return self._lock.stages[self._stage].popsize

    def learn(self, ranking: Ranking) -> None:
        """Take in a generation that was told; where nobody kept the guards, its fitness says nothing."""
        self._levels.append(math.nan if ranking.best is None else level(ranking.fitness.values()))

    def restart(self) -> None:
        """Forget the generations so far: they were told another objective."""
        self._levels = []

    def due(self) -> bool:
        """Whether there is a finer space, and the search has stalled in this one."""
        return self._stage < len(self._lock.stages) and stalled(self._levels, self._patience)

    def grown(self, number: int, optimizer: Optimizer) -> Optimizer:
        """The optimizer of the next finer space, from generation `number` on; journalled if it is new."""
        lock, coarser, finer = self._lock, self._spaces[self._stage], self._spaces[self._stage + 1]
        stage, learnt = lock.stages[self._stage], cast(_Learnt, optimizer)
        start = grow(coarser, finer, learnt.mean, learnt.covariance, sigma0=stage.sigma0)
        self._stage += 1
        self._levels = []
        if not any(event["stage"] == self._stage for event in self._journal.events("growth")):
            self._journal.event(
                "growth",
                generation=number,
                stage=self._stage,
                popsize=stage.popsize,
                moved=start.moved,
                **{"from": space_words(coarser), "to": space_words(finer)},
            )
            moved = f"; its bounds moved the mean by up to {start.moved:.3g}" if start.moved > 0 else ""
            self._seen.say(
                f"note: {self._patience} generations brought nothing beyond noise in {space_words(coarser)}; from"
                f" generation {number} on: {space_words(finer)}, {stage.popsize} candidates each{moved}"
            )
        return make_optimizer(
            lock.search.optimizer,
            Start(
                finer.low,
                finer.high,
                start.x0,
                seed=stage.seed,
                popsize=stage.popsize,
                active=not lock.search.racing,
                covariance=start.covariance,
            ),
        )
