"""Runs for tests: pico's recipe, what of a run must not change, and workers that do something of their own."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.journal import Journal
from shoal.preflight import Prepared
from shoal.recipe import Recipe, parse_recipe
from shoal.run import evolve
from shoal.types import Capabilities, Completed, Failed, Job, Worker
from shoal.worker import LocalWorker


def recipe(pico: Any, **changes: Any) -> Recipe:
    return parse_recipe(yaml.safe_dump(pico.recipe(**changes)))


def stable(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what may differ between two runs of one lock: seconds."""
    return result | {"cost": {k: v for k, v in result["cost"].items() if k != "seconds"}}


def content(run: Path) -> dict[str, list[Any]]:
    """Everything in the journal that must be the same, interrupted or not."""
    with sqlite3.connect(run / "journal.sqlite") as database:
        return {
            "candidates": database.execute("SELECT * FROM candidates ORDER BY asked").fetchall(),
            "evaluations": database.execute(
                "SELECT id, candidate, role, rung, status, items FROM evaluations"
            ).fetchall(),
            "scores": database.execute(
                "SELECT * FROM scores ORDER BY candidate, role, task, item, rung"
            ).fetchall(),
            "courses": events(database, "course"),
            "written": [
                {key: value for key, value in event.items() if not key.startswith("seconds")}
                for event in events(database, "written")
            ],
            "disqualified": events(database, "disqualified"),
            "tells": database.execute("SELECT * FROM tells ORDER BY generation").fetchall(),
        }


def events(database: sqlite3.Connection, kind: str) -> list[dict[str, Any]]:
    rows = database.execute("SELECT data FROM events WHERE kind=? ORDER BY id", (kind,))
    return [json.loads(row[0]) for row in rows]


class Meddler:
    """A worker that does something of its own before or instead of a job; everything else is the real worker's."""

    def __init__(self, inner: Worker, meddle: Callable[[Job, int], Completed | Failed | None]) -> None:
        self.inner, self.meddle, self.jobs, self.count = inner, meddle, list[Job](), 0

    def submit(self, job: Job) -> str:
        self.jobs.append(job)
        return job.candidate

    def poll(self) -> Completed | Failed:
        job = self.jobs.pop(0)
        self.count += 1
        instead = self.meddle(job, self.count)
        if instead is not None:
            return instead
        self.inner.submit(job)
        return self.inner.poll()

    def cancel(self, candidate: str) -> None:
        self.inner.cancel(candidate)

    def capabilities(self) -> Capabilities:
        return self.inner.capabilities()

    def close(self) -> None:
        self.inner.close()


class Mute(Meddler):
    """Of a worker that does not write to the prompts of the sanity guard, which is a third of the time of a run of pico."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), writes=False)


def meddled(meddle: Callable[[Job, int], Completed | Failed | None]) -> Callable[[Prepared, str], Worker]:
    return lambda prepared, device: Meddler(LocalWorker(prepared.recipe, prepared.lock, device), meddle)


class Killed(BaseException):
    """What a test raises where a process would be killed."""


def evolve_killed_after_every_step(
    mine: Any, run: Path, worker: Callable[[Prepared, str], Worker], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], int]:
    """The result of a run whose process ends after every single step that it writes to the journal; and how many."""
    steps = 0

    def dying(write: Callable[..., None]) -> Callable[..., None]:
        def wrapped(self: Journal, *args: Any, **kwargs: Any) -> None:
            nonlocal steps
            write(self, *args, **kwargs)
            if args[0] not in ("start", "loaded", "note"):  # every process writes these
                steps += 1
                raise Killed

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("event", "ask", "complete", "tell"):
            patch.setattr(Journal, name, dying(getattr(Journal, name)))
        while True:
            before = steps
            try:
                return evolve(mine, run, device="cpu", worker=worker), steps
            except Killed:
                assert steps == before + 1
