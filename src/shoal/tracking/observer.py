"""Sends a run to trackers while it goes on: an observer in front of another one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shoal.errors import RunError
from shoal.folder import RunFolder
from shoal.hub.portable import Names, recipe_here
from shoal.hub.privacy import Scrubber, Secrets
from shoal.journal import EvaluationRow, Journal
from shoal.lock import Lock
from shoal.preflight import Prepared
from shoal.recipe import Recipe, TrackerName
from shoal.report import load_result
from shoal.stages.observer import Observer, Warned
from shoal.tracking.ending import Ending, ending_of
from shoal.tracking.marks import Marks
from shoal.tracking.points import Point, points_of, weights_summary
from shoal.tracking.registry import TRACKERS
from shoal.tracking.tracker import About, Tracker, Unsent

Mean = Callable[[], NDArray[np.float64]]


class Tracking:
    """An observer that passes everything on to `seen`, and sends every generation; as a context, the result as well.

    What the journal has and a tracker has not is sent, be it of an earlier process; what a tracker has is not sent twice.
    A tracker that fails is said once, and gets nothing more from this process. warn: told of that, as no progress but
    what somebody must know; by default `seen` is, by its `warn` where it has one.
    """

    def __init__(
        self,
        run: Path,
        trackers: Sequence[TrackerName],
        seen: Observer,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._folder, self._names, self._seen = RunFolder(run), tuple(trackers), seen
        self._warn = warn or (seen.warn if isinstance(seen, Warned) else seen.say)
        self._open: dict[TrackerName, Tracker] = {}
        self._before: dict[TrackerName, int] = {}
        self._points: dict[int, Point] = {}
        self._total = 0
        self._prepared: Prepared | None = None
        self._mean: Mean | None = None
        self._marks: Marks | None = None
        self._scrubber: Scrubber | None = None

    def say(self, text: str) -> None:
        self._seen.say(text)

    def begin(self, prepared: Prepared, done: int) -> None:
        self._prepared = prepared
        self._seen.begin(prepared, done)
        if self._names:
            self._open_all(self._names, prepared.recipe, prepared.lock)

    def stage(self, name: str, total: int) -> None:
        self._seen.stage(name, total)

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None:
        self._seen.evaluated(row, fitness)

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None:
        self._seen.told(generation, fitness)
        if self._open:
            self._shielded(lambda: self._send(generation))

    def follow(self, mean: Mean) -> None:
        """See `stages.observer.Follower`."""
        self._mean = mean

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Sends what a finished run found; one that stopped goes on in the same trackers' runs later."""
        if kind is None and self._names:
            try:
                with self._folder.held():
                    self._shielded(self._finish)
            except RunError as problem:
                self._warn(f"note: nothing more is sent to {', '.join(self._names)}: {problem}")
        for name in list(self._open):
            self._close(name, kind is None)

    # --- sending

    def _open_all(self, names: Sequence[TrackerName], recipe: Recipe, lock: Lock) -> None:
        try:
            self._marks = Marks(self._folder.path)
            self._scrubber = _scrubber(self._folder.path, recipe, lock)
            about = _about(recipe, lock, self._scrubber)
        except Exception as error:  # noqa: BLE001
            self._warn(f"note: nothing is sent to {', '.join(names)}: {_words(error)}")
            return
        for name in names:
            try:
                tracker = TRACKERS[name].open(self._folder.path, about, self._marks)
            except Exception as error:  # noqa: BLE001
                self._lost(name, error)
            else:
                self._open[name], self._before[name] = tracker, tracker.last
                self._seen.say(f"{name}: {tracker.words}")

    def _send(self, generation: int) -> None:
        """A generation, to every tracker that lacks it."""
        if generation not in self._points:
            self._read()
        point = self._points.get(generation)
        if point is None:
            return
        values: dict[str, float] | None = None
        for name, tracker in list(self._open.items()):
            if point.step <= tracker.last:
                continue
            if values is None:
                values = {**point.values, **self._weights()}
            self._point(name, point.step, values)

    def _point(self, name: TrackerName, step: int, values: Mapping[str, float]) -> None:
        self._take(name, step, lambda tracker: tracker.point(step, values))

    def _end(self, name: TrackerName, ending: Ending) -> None:
        self._take(name, ending.step, lambda tracker: tracker.end(ending))

    def _take(self, name: TrackerName, step: int, send: Callable[[Tracker], None]) -> None:
        """Send something, then mark it: a process that ends in between sends it again, in its place."""
        assert self._marks is not None  # a tracker is open
        tracker = self._open[name]
        try:
            send(tracker)
            tracker.last = step
            self._marks.sent(name, step)
        except Exception as error:  # noqa: BLE001
            self._drop(name, error)

    def _weights(self) -> dict[str, float]:
        """Of the search's answer so far; none of generations that this process has not replayed."""
        if self._mean is None or self._prepared is None:
            return {}
        return weights_summary(self._prepared.decode(self._mean()), self._clean)

    def _finish(self) -> None:
        """The result, and generations that were told to nobody here: of a run that had ended before it was tracked."""
        result, points, total = load_result(self._folder.path), self._read(), self._total
        step = max(total, (points[-1].step if points else 0) + 1)
        if not self._open and self._prepared is None:
            marks = Marks(self._folder.path)
            lacking = [n for n in self._names if (mark := marks.get(n)) is None or mark.step < step]
            if lacking:
                self._open_all(lacking, *self._folder.open())
        ending: Ending | None = None
        for name, tracker in list(self._open.items()):
            for point in points:
                if point.step > tracker.last and name in self._open:
                    self._point(name, point.step, point.values)
            if step > tracker.last and name in self._open:
                ending = ending or ending_of(result, step, self._clean)
                self._end(name, ending)

    def _read(self) -> tuple[Point, ...]:
        """All generations that the journal has."""
        journal = Journal(self._folder.journal)
        try:
            evaluations = journal.evaluations()
            points = points_of(evaluations, journal.tells(), journal.events("course"))
        finally:
            journal.close()
        self._total = sum(row.items for row in evaluations)
        self._points = {point.generation: point for point in points}
        return points

    def _close(self, name: TrackerName, finished: bool) -> None:
        tracker = self._open.pop(name)
        try:
            tracker.close(finished)
        except Exception as error:  # noqa: BLE001
            self._lost(name, error)
            if self._marks is not None:
                # what it took may not have arrived: the next process asks it, or sends it again
                self._marks.sent(name, self._before[name])

    def _shielded(self, do: Callable[[], None]) -> None:
        """Whatever is wrong with what is sent, the run is worth more."""
        try:
            do()
        except Exception as error:  # noqa: BLE001
            if not self._open:  # of a finished run, before any was opened
                self._warn(f"note: nothing is sent to {', '.join(self._names)}: {_words(error)}")
            for name in list(self._open):
                self._drop(name, error)

    def _drop(self, name: TrackerName, error: Exception) -> None:
        self._lost(name, error)
        with contextlib.suppress(Exception):
            self._open.pop(name).close(False)

    def _lost(self, name: TrackerName, error: Exception) -> None:
        self._warn(
            f"note: {name} fails and gets nothing more for now, the run goes on; the same command sends later what is"
            f" missing: {_words(error)}"
        )

    def _clean(self, text: str) -> str:
        assert self._scrubber is not None  # a tracker is open
        return self._scrubber.text(text)


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Unsent) else f"{type(error).__name__}: {text}"


def _scrubber(run: Path, recipe: Recipe, lock: Lock) -> Scrubber:
    """Takes folders, host, user and tokens out of every text; names that tables show are kept."""
    names = Names(lock.models)
    keep = [recipe.name, *(m.name for m in lock.models), *(t.task for t in lock.tasks), *lock.libraries]
    keep += [names.reference(model) for model in lock.models]
    places = [run.absolute(), *(Path(f) for m in lock.models for f in (m.folder, m.adapter) if f)]
    if lock.include_path is not None:
        places.append(Path(lock.include_path))
    return Scrubber(Secrets.of_machine([p for p in places if p.is_absolute()], keep))


def _about(recipe: Recipe, lock: Lock, scrubber: Scrubber) -> About:
    shown, _ = recipe_here(recipe, lock, scrubber)
    config: dict[str, Any] = {
        "recipe": shown.model_dump(mode="json"),
        "shoal": lock.shoal,
        "libraries": dict(lock.libraries),
        "genes": len(lock.genes),
        "popsize": lock.popsize,
    }
    return About(shown.name, shown.to_yaml(), config)
