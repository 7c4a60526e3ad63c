"""What a user interface hears of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shoal.journal import EvaluationRow
from shoal.preflight import Prepared


class Observer(Protocol):
    """What a user interface hears of a run; it never changes one."""

    def say(self, text: str) -> None: ...

    def begin(self, prepared: Prepared, done: int) -> None: ...

    def stage(self, name: str, total: int) -> None: ...

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None: ...

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None: ...


@runtime_checkable
class Follower(Protocol):
    """An observer that also follows where the search is."""

    def follow(self, mean: Callable[[], NDArray[np.float64]]) -> None:
        """Hear before the search how to ask for its answer so far: a genome [genes] of the space that it is in then."""


@runtime_checkable
class Warned(Protocol):
    """An observer that tells what somebody must know apart from progress, which may be hidden."""

    def warn(self, text: str) -> None: ...


class Silent:
    """An observer that says nothing."""

    def say(self, text: str) -> None: ...

    def begin(self, prepared: Prepared, done: int) -> None: ...

    def stage(self, name: str, total: int) -> None: ...

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None: ...

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None: ...
