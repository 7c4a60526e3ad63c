"""Keeps RUN/report.html fresh while a run goes on: an observer in front of another one.

A page is written after a generation or a stage, at the earliest PAUSE seconds after the last one, and later where
writing takes long: at most one part in SHARE of the run's time goes into it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from shoal.errors import ShoalError
from shoal.journal import EvaluationRow
from shoal.page.render import write_page
from shoal.preflight import Prepared
from shoal.stages.observer import Observer
from shoal.types import MergePlan

PAUSE = 5.0  # seconds
SHARE = 50


class Live:
    """An observer that passes everything on to `seen`; as a context, it writes the last page as well.

    A page that cannot be written is said once and never stops the run.
    """

    def __init__(self, run: Path, seen: Observer, pause: float = PAUSE, share: float = SHARE) -> None:
        self._run, self._seen, self._pause, self._share = run, seen, pause, share
        self._prepared: Prepared | None = None
        self._next = 0.0
        self._broken = False

    def say(self, text: str) -> None:
        self._seen.say(text)

    def begin(self, prepared: Prepared, done: int) -> None:
        self._prepared = prepared
        self._seen.begin(prepared, done)
        self._refresh()

    def stage(self, name: str, total: int) -> None:
        self._seen.stage(name, total)
        self._refresh()

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None:
        self._seen.evaluated(row, fitness)

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None:
        self._seen.told(generation, fitness)
        self._refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The page of a finished run, or of one that stopped with `error`; none where it never began, since the folder
        may be another process's."""
        if kind is None:
            self._write(None)
        elif self._prepared is not None:
            self._write(_reason(error))

    def _refresh(self) -> None:
        started = time.monotonic()
        if started < self._next or self._broken:
            return
        self._write("", running=True)
        ended = time.monotonic()
        self._next = ended + max(self._pause, self._share * (ended - started))

    def _write(self, reason: str | None, running: bool = False) -> None:
        try:
            write_page(self._run, running=running, reason=reason or "", decode=self._decode)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with a page, the run is worth more)
            if not self._broken:
                self._broken = True
                self._seen.say(f"note: the report cannot be written: {type(error).__name__}: {error}")

    def _decode(self, genome: Sequence[float]) -> MergePlan:
        if self._prepared is None:
            raise ShoalError("the run has not begun")
        return self._prepared.decode(genome)


def _reason(error: BaseException | None) -> str:
    if error is None or isinstance(error, KeyboardInterrupt):
        return "interrupted by its user"
    return str(error) if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}"
