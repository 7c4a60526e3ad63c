"""What a user interface hears of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from shoal.journal import EvaluationRow
from shoal.preflight import Prepared


class Observer(Protocol):
    """What a user interface hears of a run; it never changes one."""

    def say(self, text: str) -> None: ...

    def begin(self, prepared: Prepared, done: int) -> None: ...

    def stage(self, name: str, total: int) -> None: ...

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None: ...

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None: ...


class Silent:
    """An observer that says nothing."""

    def say(self, text: str) -> None: ...

    def begin(self, prepared: Prepared, done: int) -> None: ...

    def stage(self, name: str, total: int) -> None: ...

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None: ...

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None: ...
