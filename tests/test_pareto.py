"""`shoal pareto`: the candidates that no other one beats on every task, from the journal alone."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from shoal.cli import app
from shoal.folder import RunFolder
from shoal.front import PLOT, front_rows, front_words, scale_of
from shoal.journal import Journal
from shoal.output import winner_sha256
from shoal.pareto import non_dominated, pareto
from shoal.preflight import restore
from shoal.recipe import parse_recipe
from shoal.run import evolve

TASKS = ("pico_choice", "pico_next")


@pytest.fixture(scope="module")
def run(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three generations, with a third task that is generated."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    tasks = [{"task": task, "metric": "acc"} for task in TASKS] + [{"task": "pico_write"}]
    recipe = pico.recipe(tasks=tasks)
    recipe["search"]["item_choice"] = "uniform"  # another test has weights
    evolve(parse_recipe(yaml.safe_dump(recipe)), folder, device="cpu")
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def metrics(run: Path, candidate: str, task: str, role: str = "search") -> dict[int, float]:
    with sqlite3.connect(run / "journal.sqlite") as database:
        rows = database.execute(
            "SELECT item, metrics FROM scores WHERE candidate=? AND task=? AND role=?",
            (candidate, task, role),
        ).fetchall()
    return {item: json.loads(text)["acc,none"] for item, text in rows}


def set_scores(run: Path, candidate: str, value: float) -> None:
    with sqlite3.connect(run / "journal.sqlite") as database:
        database.execute(
            "UPDATE scores SET metrics=? WHERE candidate=? AND role='search' AND task IN (?, ?)",
            (json.dumps({"acc,none": value}), candidate, *TASKS),
        )


def test_places_are_paired_differences_to_the_anchor(run: Path) -> None:
    front = pareto(run, TASKS)
    with sqlite3.connect(run / "journal.sqlite") as database:
        asked = database.execute("SELECT id FROM candidates WHERE kind='search'").fetchall()
    ids = {entry.id for entry in front.entries}
    # the best sample may be listed as best@3, which has scores on all items
    missing = {name for (name,) in asked} - ids
    assert len(asked) == 12 and (not missing or (len(missing) == 1 and "best@3" in ids))
    assert {"base", "left", "right", "uniform merge"} <= ids
    for entry in front.entries:
        for task in TASKS:
            ours, theirs = metrics(run, entry.id, task), metrics(run, front.anchor, task)
            gain = np.mean([ours[item] - theirs[item] for item in ours])
            place = entry.places[task]
            assert place.gain == pytest.approx(gain, abs=1e-12)
            assert place.score == pytest.approx(np.mean(list(theirs.values())) + gain, abs=1e-12)
            assert place.low <= place.gain <= place.high and place.items == len(ours)
            if entry.id != front.anchor:
                assert place.low < place.high
    order = [entry.places["pico_choice"].gain for entry in front.entries]
    assert order == sorted(order, reverse=True)


def test_the_front_is_what_no_other_candidate_dominates(run: Path) -> None:
    front = pareto(run, TASKS)
    members = front.members()
    assert members and {e.id for e in members} <= {e.id for e in front.possible()}
    points = {e.id: np.array([e.places[t].gain for t in TASKS]) for e in front.entries}
    for entry in front.entries:
        dominators = [
            o for o, p in points.items() if (p >= points[entry.id]).all() and (p > points[entry.id]).any()
        ]
        assert entry.front == (not dominators)


def test_dominated_with_confidence_is_told_apart_from_noise(copy: Path) -> None:
    before = pareto(copy, TASKS)
    raced = [entry for entry in before.entries if entry.kind == "search"]
    good, bad = [e.id for e in sorted(raced, key=lambda e: -e.places["pico_next"].items)][:2]
    set_scores(copy, good, 1.0)
    set_scores(copy, bad, 0.0)
    front = pareto(copy, TASKS)
    entries = {entry.id: entry for entry in front.entries}
    assert [entry.id for entry in front.members()] == [good]
    worst = entries[bad]
    assert not worst.possible and worst.dominated_by == good
    for entry in front.entries:
        above = any(
            all(o.places[t].low > entry.places[t].high for t in TASKS)
            for o in front.entries
            if o is not entry
        )
        assert entry.possible == (entry.front or not above)
        assert (entry.dominated_by is not None) == (not entry.possible)
    assert len(front.possible()) < len(before.possible())
    counts = front_words(front)[0]
    assert counts.startswith("1 of ") and f"{len(front.possible())} could be" in counts
    header, rows = front_rows(front, everyone=True)
    assert len(rows) == len(entries) and {len(row) for row in rows} == {len(header)}
    assert next(row for row in rows if row[0] == bad)[-1] == f"no ({good})"
    assert [row[0] for row in front_rows(front)[1]] == [good]


def test_a_disqualified_finalist_is_on_no_front(copy: Path) -> None:
    set_scores(copy, "mean@3", 1.0)
    with closing(Journal(copy / "journal.sqlite")) as journal:
        journal.event("disqualified", candidate="mean@3", reason="it never ends")
    for role in ("search", "select"):
        front = pareto(copy, TASKS, role)
        entry = next((e for e in front.entries if e.id == "mean@3"), None)
        if role == "search" and entry is None:
            continue  # its merge has no genome's scores there
        assert entry is not None
        assert entry.disqualified == "it never ends" and not entry.front and not entry.possible
        assert "mean@3" not in {e.dominated_by for e in front.entries}
        assert front.members()
        row = next(r for r in front_rows(front, everyone=True)[1] if r[0] == "mean@3")
        assert row[-1] == "disqualified"
        assert any("mean@3 is disqualified by what it writes: it never ends" in w for w in front_words(front))


def test_the_same_journal_gives_the_same_front_and_is_left_as_it_was(run: Path) -> None:
    before = (run / "journal.sqlite").read_bytes()
    assert pareto(run, TASKS) == pareto(run, TASKS)
    assert (run / "journal.sqlite").read_bytes() == before


def test_finalists_are_compared_on_select_items(run: Path) -> None:
    select = pareto(run, TASKS, "select")
    assert {"mean@3", "best@3", "base", "left", "right", "uniform merge"} == {e.id for e in select.entries}
    assert select.anchor == pareto(run, TASKS).anchor
    assert {place.items for entry in select.entries for place in entry.places.values()} == {34}
    assert any("looks better than it is" in line for line in front_words(pareto(run, TASKS)))
    assert not any("looks better than it is" in line for line in front_words(select))


def test_a_look_at_test_items_has_its_price(copy: Path) -> None:
    with sqlite3.connect(copy / "journal.sqlite") as database:
        # as if the mean had won, with the scores of a parent
        for table in ("scores", "evaluations"):
            names = [row[1] for row in database.execute(f"PRAGMA table_info({table})") if row[1] != "id"]
            chosen = ", ".join("'mean@3'" if name == "candidate" else name for name in names)
            database.execute(f"DELETE FROM {table} WHERE candidate = 'mean@3' AND role = 'test'")
            database.execute(
                f"INSERT INTO {table} ({', '.join(names)}) SELECT {chosen} FROM {table}"
                " WHERE candidate = 'left' AND role = 'test'"
            )
    front = pareto(copy, TASKS, "test")
    assert {"mean@3", "left", "right", "base", "uniform merge"} <= {entry.id for entry in front.entries}
    places = {entry.id: entry.places for entry in front.entries}
    assert places["mean@3"] == places["left"]
    assert any("uses the test items up" in line for line in front_words(front))


def test_a_generation_task_is_judged_by_what_was_measured(run: Path) -> None:
    front = pareto(run, ["pico_write", "pico_next"])
    assert front.measures == {"pico_write": "smooth objective", "pico_next": "acc,none"}
    assert pareto(run, ["pico_write", "pico_next"], "select").measures["pico_write"] == "exact_match,none"


def test_a_metric_where_lower_is_better_that_is_no_mean(pico: Any, tmp_path: Path) -> None:
    tasks = [{"task": "pico_choice", "metric": "acc"}, {"task": "pico_next", "metric": "perplexity"}]
    search = {"budget": 4, "popsize": 4, "items": 16}
    evolve(
        parse_recipe(yaml.safe_dump(pico.recipe(tasks=tasks, search=search))), tmp_path / "run", device="cpu"
    )
    front = pareto(tmp_path / "run", TASKS, "select")
    anchor = next(e for e in front.entries if e.id == front.anchor).places["pico_next"].score
    for entry in front.entries:
        place = entry.places["pico_next"]
        assert place.score == pytest.approx(anchor - place.gain) and place.score > 1
    assert not front.higher["pico_next"] and scale_of(front, "pico_next") == 1.0
    result = CliRunner().invoke(app, ["pareto", str(tmp_path / "run"), "--tasks", ",".join(TASKS)])
    assert result.exit_code == 0 and (tmp_path / "run" / PLOT).is_file()


def test_items_drawn_where_anchors_disagree_are_weighted(pico: Any, tmp_path: Path) -> None:
    search = {"budget": 4, "popsize": 4, "items": 40, "item_choice": "disagreement", "uniform_share": 0.2}
    recipe = parse_recipe(yaml.safe_dump(pico.recipe(search=search)))
    evolve(recipe, tmp_path / "run", device="cpu")
    front = pareto(tmp_path / "run", TASKS)
    journal = Journal(tmp_path / "run" / "journal.sqlite")
    try:
        told = journal.tells()[0]
    finally:
        journal.close()
    with sqlite3.connect(tmp_path / "run" / "journal.sqlite") as database:
        # the metric in place of what was searched: then the search's own gains are what the table must show
        database.execute(
            "UPDATE scores SET metrics = json_object('acc,none', objective) WHERE role = 'search'"
        )
    shown = {entry.id: entry for entry in pareto(tmp_path / "run", TASKS).entries}
    assert shown[front.anchor].places["pico_next"].gain == 0
    fitness = {
        name: np.mean([shown[name].places[task].gain for task in TASKS]) for name in told if name in shown
    }
    assert len(fitness) >= 3  # one may be listed as best@1, on all items
    assert fitness == pytest.approx({name: told[name] for name in fitness}, abs=1e-12)


def test_a_candidate_of_the_front_is_merged_by_its_id(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from shoal.merge.hashing import weights_sha256

    front = pareto(run, TASKS)
    chosen = next(entry for entry in front.entries if entry.kind == "search")
    result = CliRunner().invoke(
        app, ["merge", str(run), "--candidate", chosen.id, "-o", str(tmp_path / "model")]
    )
    assert result.exit_code == 0, result.output
    recipe, lock = RunFolder(run).open()
    journal = Journal(run / "journal.sqlite")
    row = journal.candidate(chosen.id)
    journal.close()
    assert row is not None and row.genome is not None
    plan = restore(recipe, lock).space.decode(np.array(row.genome))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert weights_sha256(sorted(tensors.items())) == weights_sha256(sorted(plan_tensors(lock, plan)))
    assert winner_sha256(lock, plan) != json.loads((run / "result.json").read_text())["weights_sha256"]
    # parents and the uniform merge can be on the front as well
    for entry in front.entries:
        if entry.kind in ("parent", "uniform"):
            out = tmp_path / entry.id
            done = CliRunner().invoke(app, ["merge", str(run), "--candidate", entry.id, "-o", str(out)])
            assert done.exit_code == 0, done.output


def plan_tensors(lock: Any, plan: Any) -> Any:
    from shoal.output import plan_tensors as tensors

    return tensors(lock, plan)


def test_the_command_prints_a_table_and_draws_two_tasks(copy: Path) -> None:
    result = CliRunner().invoke(app, ["pareto", str(copy), "--tasks", ",".join(TASKS)])
    assert result.exit_code == 0, result.output
    for member in pareto(copy, TASKS).members():
        assert member.id in result.stdout
    assert "could be" in result.stdout and f"shoal merge {copy} --candidate ID -o DIR" in result.stdout
    assert (copy / PLOT).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (copy / PLOT).unlink()
    result = CliRunner().invoke(
        app, ["pareto", str(copy), "--tasks", "pico_choice,pico_next,pico_write", "--all"]
    )
    assert result.exit_code == 0 and "a plot shows two" in result.stdout
    assert not (copy / PLOT).exists()
    assert all(entry.id in result.stdout for entry in pareto(copy, TASKS).entries)


def test_as_json(copy: Path) -> None:
    result = CliRunner().invoke(app, ["pareto", str(copy), "--tasks", ",".join(TASKS), "--json"])
    assert result.exit_code == 0, result.output
    data, front = json.loads(result.stdout), pareto(copy, TASKS)
    assert data["front"] == [entry.id for entry in front.members()]
    assert set(data["front"]) <= set(data["possible"])
    assert len(data["candidates"]) == len(front.entries)
    first = data["candidates"][0]["places"]["pico_choice"]
    assert set(first) == {"score", "gain", "low", "high", "items"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "pico_choice,pico_nxt"], "no task 'pico_nxt' in this run; did you mean 'pico_next'"),
        (
            ["--tasks", "pico_choice"],
            "at least two different tasks, found pico_choice; this run has pico_choice",
        ),
        (["--tasks", "pico_choice,pico_choice"], "at least two different tasks"),
        (["--tasks", ","], "at least two different tasks, found none"),
        (["--tasks", "pico_choice,pico_next", "--role", "serch"], "no role 'serch'; did you mean 'search'"),
    ],
)
def test_a_wrong_question_is_one_clear_line(run: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["pareto", str(run), *arguments])
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_run_without_candidates_is_one_clear_line(copy: Path, tmp_path: Path) -> None:
    question = ["--tasks", ",".join(TASKS)]
    result = CliRunner().invoke(app, ["pareto", str(tmp_path / "none"), *question])
    assert result.exit_code == 2 and "no run here" in result.stderr
    with sqlite3.connect(copy / "journal.sqlite") as database:
        database.execute("PRAGMA foreign_keys=OFF")
        for table in ("scores", "evaluations"):
            database.execute(f"DELETE FROM {table} WHERE candidate LIKE 'g0%' OR candidate LIKE '%@%'")
    result = CliRunner().invoke(app, ["pareto", str(copy), *question])
    assert result.exit_code == 2 and "no candidate was scored on search items, only" in result.stderr
    for path in copy.glob("journal.sqlite*"):
        path.unlink()
    result = CliRunner().invoke(app, ["pareto", str(copy), *question])
    assert result.exit_code == 2 and "nothing was scored yet" in result.stderr
    assert not (copy / "journal.sqlite").exists()


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_non_dominated_is_its_definition(rows: list[tuple[int, int, int]]) -> None:
    found = non_dominated(np.array(rows, dtype=float))
    for index, row in enumerate(rows):
        beaten = any(all(a >= b for a, b in zip(o, row, strict=True)) and o != row for o in rows)
        assert found[index] == (not beaten)
    assert found.any()
