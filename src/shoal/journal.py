"""The journal of a run: RUN/journal.sqlite, one writer, every step durable before the next one starts.

It holds candidates in ask order (with the order in which they completed), one row per (candidate, role, task, item,
rung), the fitness of each generation, and events (starts, device, disturbances, the course of each generation, stops,
openings of the test items).
Nothing in it is ever unpickled or executed; genomes are JSON numbers, which round-trip float64 exactly.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shoal.errors import RunError
from shoal.types import ItemScore, Role

SCHEMA_VERSION = 2

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE candidates (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, generation INTEGER, position INTEGER,
    genome TEXT, plan_digest TEXT NOT NULL, asked INTEGER NOT NULL);
CREATE TABLE evaluations (
    id INTEGER PRIMARY KEY, candidate TEXT NOT NULL REFERENCES candidates, role TEXT NOT NULL,
    status TEXT NOT NULL, error TEXT, seconds_merge REAL NOT NULL, seconds_score REAL NOT NULL,
    seconds_rest REAL NOT NULL, items INTEGER NOT NULL, rung INTEGER NOT NULL, UNIQUE (candidate, role, rung));
CREATE TABLE scores (
    candidate TEXT NOT NULL REFERENCES candidates, role TEXT NOT NULL, task TEXT NOT NULL, item INTEGER NOT NULL,
    objective REAL, metrics TEXT NOT NULL, logliks TEXT NOT NULL, tokens INTEGER NOT NULL, rung INTEGER NOT NULL,
    PRIMARY KEY (candidate, role, task, item, rung)) WITHOUT ROWID;
CREATE TABLE tells (generation INTEGER PRIMARY KEY, candidates TEXT NOT NULL, fitness TEXT NOT NULL);
"""

Kind = Literal["parent", "uniform", "start", "search", "finalist"]


@dataclass(frozen=True)
class CandidateRow:
    """A candidate as journalled; generation, position and genome are None for baselines."""

    id: str
    kind: Kind
    generation: int | None
    position: int | None
    genome: tuple[float, ...] | None
    plan_digest: str


@dataclass(frozen=True)
class EvaluationRow:
    """One finished piece of work: a candidate on items of one role. status: done or failed.

    rung: 0, or which part of a candidate's items this was (racing; what anchors were scored on once more).
    """

    candidate: str
    role: Role
    status: str
    error: str | None
    seconds_merge: float
    seconds_score: float
    seconds_rest: float
    items: int
    rung: int = 0


class Journal:
    """The open journal of one run. Only one process may hold it; see `run.claim_folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        new = not path.exists()
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            if new or not self._db.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone():
                with self._transaction():
                    for statement in _SCHEMA.strip().split(";"):
                        if statement.strip():
                            self._db.execute(statement)
                    self._db.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
            found = self._db.execute("SELECT value FROM meta WHERE key='schema_version'").fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise RunError(f"{path}: not a journal that can be read: {error}") from None
        if found != str(SCHEMA_VERSION):
            raise RunError(f"{path}: journal schema {found}, this version of shoal reads {SCHEMA_VERSION}")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # --- events

    def event(self, kind: str, **data: Any) -> None:
        self._db.execute(
            "INSERT INTO events (time, kind, data) VALUES (?, ?, ?)", (time.time(), kind, json.dumps(data))
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        rows = self._db.execute("SELECT data FROM events WHERE kind=? ORDER BY id", (kind,))
        return [json.loads(row[0]) for row in rows]

    # --- candidates

    def ask(self, candidates: Iterable[CandidateRow]) -> None:
        """Record candidates before any work on them starts; all or none."""
        with self._transaction():
            (count,) = self._db.execute("SELECT COUNT(*) FROM candidates").fetchone()
            for order, row in enumerate(candidates, start=count):
                genome = None if row.genome is None else json.dumps(list(row.genome))
                self._db.execute(
                    "INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (row.id, row.kind, row.generation, row.position, genome, row.plan_digest, order),
                )

    def candidates(self, kind: Kind | None = None, generation: int | None = None) -> list[CandidateRow]:
        """In ask order."""
        wanted = {"kind": kind, "generation": generation}
        given = {name: value for name, value in wanted.items() if value is not None}
        return self._candidates(" AND ".join(["1", *(f"{name}=?" for name in given)]), tuple(given.values()))

    def _candidates(self, where: str, values: tuple[str | int, ...]) -> list[CandidateRow]:
        query = "SELECT id, kind, generation, position, genome, plan_digest FROM candidates"
        return [
            CandidateRow(i, k, g, p, None if x is None else tuple(json.loads(x)), d)
            for i, k, g, p, x, d in self._db.execute(f"{query} WHERE {where} ORDER BY asked", values)
        ]

    def candidate(self, candidate: str) -> CandidateRow | None:
        return next(iter(self._candidates("id=?", (candidate,))), None)

    # --- evaluations

    def complete(self, row: EvaluationRow, scores: Sequence[ItemScore]) -> None:
        """Record the end of one evaluation with all its item scores; all or none."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO evaluations (candidate, role, status, error, seconds_merge, seconds_score, seconds_rest,"
                " items, rung) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row.candidate,
                    row.role,
                    row.status,
                    row.error,
                    row.seconds_merge,
                    row.seconds_score,
                    row.seconds_rest,
                    row.items,
                    row.rung,
                ),
            )
            self._db.executemany(
                "INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        row.candidate,
                        row.role,
                        score.task,
                        score.item,
                        score.objective,
                        json.dumps(dict(score.metrics)),
                        json.dumps(list(score.logliks)),
                        score.tokens,
                        row.rung,
                    )
                    for score in scores
                ],
            )

    def evaluations(self) -> list[EvaluationRow]:
        """In completion order."""
        return self._evaluations("1", ())

    def evaluation(self, candidate: str, role: Role, rung: int = 0) -> EvaluationRow | None:
        found = self._evaluations("candidate=? AND role=? AND rung=?", (candidate, role, rung))
        return found[0] if found else None

    def _evaluations(self, where: str, values: tuple[str | int, ...]) -> list[EvaluationRow]:
        rows = self._db.execute(
            "SELECT candidate, role, status, error, seconds_merge, seconds_score, seconds_rest, items, rung"
            f" FROM evaluations WHERE {where} ORDER BY id",
            values,
        )
        return [EvaluationRow(*row) for row in rows]

    def scores(
        self, candidate: str, role: Role, first_rung: int = 0, last_rung: int | None = None
    ) -> list[ItemScore]:
        """Of these rungs (default: all), ordered by task, then item; of an item scored in several the last one."""
        last = -1 if last_rung is None else last_rung
        rows = self._db.execute(
            "SELECT task, item, metrics, objective, logliks, tokens FROM scores WHERE candidate=? AND role=?"
            " AND rung>=? AND (rung<=? OR ?<0) ORDER BY task, item, rung",
            (candidate, role, first_rung, last, last),
        )
        found = {
            (task, item): ItemScore(
                task, role, item, json.loads(metrics), objective, tuple(json.loads(logliks)), tokens
            )
            for task, item, metrics, objective, logliks, tokens in rows
        }
        return list(found.values())

    # --- generations

    def tell(self, generation: int, fitness: Mapping[str, float | None]) -> None:
        """Record the fitness of a generation, which the optimizer's ranks follow from; None: a failed candidate."""
        self._db.execute(
            "INSERT INTO tells VALUES (?, ?, ?)",
            (generation, json.dumps(list(fitness)), json.dumps(list(fitness.values()))),
        )

    def tells(self) -> dict[int, dict[str, float | None]]:
        rows = self._db.execute("SELECT generation, candidates, fitness FROM tells ORDER BY generation")
        return {g: dict(zip(json.loads(c), json.loads(f), strict=True)) for g, c, f in rows}
