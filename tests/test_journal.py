"""The journal: all or nothing, in order, and exact numbers."""

from __future__ import annotations

import math
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.errors import RunError
from shoal.journal import CandidateRow, EvaluationRow, Journal
from shoal.types import ItemScore

GENOME = (0.1, 1 / 3, math.pi, 5e-324, -1.7976931348623157e308)


def rows(generation: int) -> list[CandidateRow]:
    return [CandidateRow(f"g{generation}c{i}", "search", generation, i, GENOME, "digest") for i in range(3)]


def done(candidate: str) -> EvaluationRow:
    return EvaluationRow(candidate, "search", "done", None, 0.1, 0.2, 0.3, 1)


def score(item: int = 7, value: float = -0.1) -> ItemScore:
    return ItemScore("task", "search", item, {"acc,none": 1.0, "f1,none": [1, 0]}, value, (-0.25, -1e-17), 3)


def test_what_is_written_is_read_by_the_next_process(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    journal.ask(rows(0))
    journal.complete(done("g0c1"), [score()])
    journal.tell(0, {"g0c0": 0.5, "g0c1": None})
    journal.event("start", device="cpu")
    journal.close()
    again = Journal(tmp_path / "j.sqlite")
    assert again.candidates("search", 0) == rows(0)
    assert again.candidate("g0c2") == rows(0)[2]
    assert again.candidate("g0c2").genome == GENOME  # type: ignore[union-attr]
    assert again.evaluation("g0c1", "search") == done("g0c1")
    assert again.evaluation("g0c1", "test") is None
    assert again.scores("g0c1", "search") == [score()]
    assert again.tells() == {0: {"g0c0": 0.5, "g0c1": None}}
    assert again.events("start") == [{"device": "cpu"}]


def test_a_generation_is_asked_whole_or_not_at_all(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    with pytest.raises(sqlite3.IntegrityError):
        journal.ask([*rows(0), rows(0)[0]])
    assert journal.candidates() == []


def test_an_evaluation_and_its_scores_are_written_together(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    journal.ask(rows(0))
    with pytest.raises(sqlite3.IntegrityError):
        journal.complete(done("g0c0"), [score(), score()])
    assert journal.evaluation("g0c0", "search") is None
    assert journal.scores("g0c0", "search") == []


def test_rungs_are_evaluations_of_their_own_and_the_last_score_of_an_item_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    journal.ask(rows(0))
    first, second = done("g0c0"), replace(done("g0c0"), rung=1)
    journal.complete(first, [score(7, 0.1), score(8, 0.2)])
    assert journal.evaluation("g0c0", "search", 1) is None
    journal.complete(second, [score(8, 0.3), score(9, 0.4)])
    assert journal.evaluations() == [first, second]
    assert journal.evaluation("g0c0", "search", 1) == second

    def values(*rungs: int) -> dict[int, float | None]:
        return {s.item: s.objective for s in journal.scores("g0c0", "search", *rungs)}

    assert values() == {7: 0.1, 8: 0.3, 9: 0.4}
    assert values(0, 0) == {7: 0.1, 8: 0.2} and values(1) == values(1, 1) == {8: 0.3, 9: 0.4}


def test_a_foreign_file_or_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.sqlite").write_text("no database at all, but long enough to be taken for one" * 50)
    with pytest.raises(RunError, match="not a journal that can be read"):
        Journal(tmp_path / "text.sqlite")
    Journal(tmp_path / "j.sqlite").close()
    with sqlite3.connect(tmp_path / "j.sqlite") as database:
        database.execute("UPDATE meta SET value='99'")
    database.close()
    with pytest.raises(RunError, match="journal schema 99"):
        Journal(tmp_path / "j.sqlite")
