"""Runs: resumable at any moment, refusing what would mix two runs, and surviving broken candidates."""

from __future__ import annotations

import fcntl
import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import content, meddled, recipe, stable

from shoal.errors import EvaluationError, RunError
from shoal.folder import RunFolder
from shoal.journal import Journal
from shoal.run import evolve
from shoal.types import Failed, Job


@pytest.fixture(scope="module")
def finished(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run and its result."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    return run, evolve(recipe(pico), run, device="cpu")


def test_the_result_holds_what_was_promised(finished: tuple[Path, dict[str, Any]]) -> None:
    run, result = finished
    assert json.loads((run / "result.json").read_text()) == result
    assert result["verdict"] in ("beats", "ties", "worse", "underpowered")
    assert [b["kind"] for b in result["baselines"]] == ["parent", "parent", "parent", "uniform"]
    overall = [c for c in result["comparisons"] if "task" not in c]
    assert [c["against"] for c in overall] == [b["name"] for b in result["baselines"]]
    for c in overall:
        assert c["low"] <= c["difference"] <= c["high"]
        assert c["n"] == 240
        score = next(b["score"] for b in result["baselines"] if b["name"] == c["against"])
        assert result["winner"]["score"] - score == pytest.approx(c["difference"], abs=1e-12)
    per_task = [c for c in result["comparisons"] if "task" in c]
    assert len(per_task) == 2 * len(overall)
    cost = result["cost"]
    assert cost["candidates"] == 12
    assert cost["seconds"]["total"] == pytest.approx(
        sum(cost["seconds"][k] for k in ("merge", "score", "rest"))
    )
    assert len(result["weights_sha256"]) == 64
    assert (run / "DONE").read_text().strip() == result["verdict"]
    assert "merge_method" in yaml.safe_load((run / "best" / "mergekit_config.yml").read_text())


def test_the_same_lock_gives_the_same_run(
    pico: Any, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    again = evolve(recipe(pico), tmp_path / "again", device="cpu")
    assert stable(again) == stable(finished[1])
    assert content(tmp_path / "again") == content(finished[0])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from runs import meddled
from shoal.recipe import load_recipe
from shoal.run import evolve

def meddle(job, count):
    if count == {count}:
        if {before}:
            os.kill(os.getpid(), signal.SIGKILL)
        import shoal.journal
        shoal.journal.Journal.complete = lambda self, row, scores: os.kill(os.getpid(), signal.SIGKILL)

evolve(load_recipe({recipe!r}), Path({run!r}), device="cpu", worker=meddled(meddle))
"""


def test_killed_three_times_a_run_ends_as_if_nothing_had_happened(
    pico: Any, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, path = tmp_path / "killed", tmp_path / "recipe.yaml"
    path.write_text(recipe(pico).to_yaml())
    # among the anchors; scored but not yet journalled in the second generation; with the test items just opened
    for count, before in ((3, True), (7, False), (21, True)):
        script = KILLED.format(
            tests=str(Path(__file__).parent), count=count, before=before, recipe=str(path), run=str(run)
        )
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not (run / "DONE").exists()
    journal = Journal(run / "journal.sqlite")
    assert len(journal.events("test opened")) == 1 and len(journal.evaluations()) == 22
    journal.close()
    assert stable(evolve(recipe(pico), run, device="cpu")) == stable(finished[1])
    assert content(run) == content(finished[0])
    journal = Journal(run / "journal.sqlite")
    assert len(journal.events("start")) >= 3
    assert len(journal.events("test opened")) == 1
    journal.close()


def test_ctrl_c_keeps_what_was_finished(
    pico: Any, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    def interrupt(job: Job, count: int) -> None:
        if count == 8:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        evolve(recipe(pico), run, device="cpu", worker=meddled(interrupt))
    assert len(content(run)["evaluations"]) == 7
    assert stable(evolve(recipe(pico), run, device="cpu")) == stable(finished[1])


def test_a_second_process_is_refused(pico: Any, tmp_path: Path) -> None:
    tmp_path.joinpath("run").mkdir()
    with (tmp_path / "run" / ".held").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process"):
            evolve(recipe(pico), tmp_path / "run", device="cpu")
    assert not RunFolder(tmp_path / "run").started


def test_another_recipe_is_refused_with_the_difference(
    pico: Any, finished: tuple[Path, dict[str, Any]]
) -> None:
    before = content(finished[0])
    with pytest.raises(RunError, match=r"different recipe.*\n(.*\n)*-  seed: 1\n\+  seed: 2"):
        evolve(
            recipe(pico, search={"budget": 12, "popsize": 4, "items": 16, "seed": 2}),
            finished[0],
            device="cpu",
        )
    with pytest.raises(RunError, match="the budget can only grow"):
        evolve(
            recipe(pico, search={"budget": 8, "popsize": 4, "items": 16, "seed": 1}),
            finished[0],
            device="cpu",
        )
    assert content(finished[0]) == before


def test_a_folder_with_other_things_is_refused(pico: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"not empty and no run \(notes.txt"):
        evolve(recipe(pico), tmp_path, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".held", "notes.txt"]


def test_a_larger_budget_continues_and_openings_are_counted(pico: Any, tmp_path: Path) -> None:
    small = {"budget": 4, "popsize": 4, "items": 16, "seed": 1}
    run = tmp_path / "run"
    first = evolve(recipe(pico, search=small), run, device="cpu")
    assert first["test_openings"] == 1
    with pytest.raises(RunError, match="--reopen-test"):
        evolve(recipe(pico, search=small | {"budget": 12}), run, device="cpu")
    second = evolve(recipe(pico, search=small | {"budget": 12}), run, device="cpu", reopen_test=True)
    assert second["cost"]["candidates"] == 12
    assert second["test_openings"] == 2 and "opened 2 times" in second["claim"]
    whole = evolve(recipe(pico, search=small | {"budget": 12}), tmp_path / "whole", device="cpu")
    asked = [row[:6] for row in content(run)["candidates"] if row[1] == "search"]
    assert asked == [row[:6] for row in content(tmp_path / "whole")["candidates"] if row[1] == "search"]
    assert second["winner"] == whole["winner"]
    assert second["cost"]["ended"] == "search.budget (12 candidates)"
    journal = Journal(run / "journal.sqlite")
    ends = [
        {"reason": f"search.budget ({n} candidates)", "generations": n // 4, "candidates": n} for n in (4, 12)
    ]
    assert journal.events("search ended") == ends
    journal.close()


def test_a_failed_candidate_is_told_as_worst_and_the_run_goes_on(pico: Any, tmp_path: Path) -> None:
    def fail(job: Job, count: int) -> Failed | None:
        return (
            Failed(job.candidate, "broken on purpose", 0.0)
            if job.candidate in ("g000c01", "g001c03")
            else None
        )

    result = evolve(recipe(pico), tmp_path / "run", device="cpu", worker=meddled(fail))
    assert result["cost"]["failed"] == 2
    journal = Journal(tmp_path / "run" / "journal.sqlite")
    assert journal.tells()[0]["g000c01"] is None
    assert journal.evaluation("g000c01", "search").error == "broken on purpose"  # type: ignore[union-attr]
    journal.close()


def test_ten_failures_in_a_row_stop_the_run_with_one_explanation(pico: Any, tmp_path: Path) -> None:
    def fail(job: Job, count: int) -> Failed | None:
        return Failed(job.candidate, "no memory left", 0.0) if job.candidate.startswith("g") else None

    with pytest.raises(RunError, match="10 candidates in a row failed, the last one with: no memory left"):
        evolve(recipe(pico), tmp_path / "run", device="cpu", worker=meddled(fail))


def test_a_winner_that_is_a_baseline_ties(pico: Any, tmp_path: Path) -> None:
    def fail(job: Job, count: int) -> Failed | None:
        return Failed(job.candidate, "out", 0.0) if "@" in job.candidate else None

    result = evolve(recipe(pico), tmp_path / "run", device="cpu", worker=meddled(fail))
    assert result["verdict"] == "ties"
    assert result["winner"]["id"] in {b["name"] for b in result["baselines"]}
    itself = next(
        c for c in result["comparisons"] if c["against"] == result["winner"]["id"] and "task" not in c
    )
    assert (itself["difference"], itself["low"], itself["high"]) == (0.0, 0.0, 0.0)
    assert "no improvement" in result["claim"]


def test_a_model_that_changed_under_a_run_is_noticed(pico: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from shoal.errors import CheckpointError

    shutil.copytree(pico.model("left"), tmp_path / "left")
    mine = recipe(pico, models=[str(tmp_path / "left"), str(pico.model("right"))])

    def interrupt(job: Job, count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve(mine, tmp_path / "run", device="cpu", worker=meddled(interrupt))
    weights = load_file(tmp_path / "left" / "model.safetensors")
    save_file(
        {k: v + 1 for k, v in weights.items()}, tmp_path / "left" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"model.safetensors has sha256 .*, the run started with"):
        evolve(mine, tmp_path / "run", device="cpu")


def test_a_time_limit_ends_the_search_and_is_replayed(pico: Any, tmp_path: Path) -> None:
    limited = recipe(pico, search={"budget": 400, "popsize": 4, "items": 16, "seed": 1, "max_seconds": 0.001})
    result = evolve(limited, tmp_path / "run", device="cpu")
    assert result["cost"]["candidates"] == 0
    assert result["cost"]["ended"] == "search.max_seconds (0.001 s)"
    assert result["winner"]["id"] in {b["name"] for b in result["baselines"]}


def test_a_generation_that_was_begun_is_finished_whatever_the_time(pico: Any, tmp_path: Path) -> None:
    limited = recipe(pico, search={"budget": 400, "popsize": 4, "items": 16, "seed": 1, "max_seconds": 600.0})

    def interrupt(job: Job, count: int) -> None:
        if count == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve(limited, tmp_path / "run", device="cpu", worker=meddled(interrupt))
    with sqlite3.connect(tmp_path / "run" / "journal.sqlite") as database:
        database.execute("UPDATE evaluations SET seconds_score = 1000")  # as if it had taken that long
    result = evolve(limited, tmp_path / "run", device="cpu")
    assert result["cost"]["candidates"] == 4
    assert [row[0] for row in content(tmp_path / "run")["tells"]] == [0]


def test_a_start_that_was_killed_can_be_tried_again(pico: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("half")
    (run / ".lock.yaml.abc").write_text("half")

    def interrupt(job: Job, count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve(recipe(pico), run, device="cpu", worker=meddled(interrupt))
    assert RunFolder(run).started


def test_an_anchor_that_cannot_be_scored_is_tried_again(pico: Any, tmp_path: Path) -> None:
    def fail(job: Job, count: int) -> Failed | None:
        return Failed(job.candidate, "memory was short", 0.0) if job.candidate == "left" else None

    with pytest.raises(EvaluationError, match="left cannot be scored on search items: memory was short"):
        evolve(recipe(pico), tmp_path / "run", device="cpu", worker=meddled(fail))
    assert evolve(recipe(pico), tmp_path / "run", device="cpu")["cost"]["failed"] == 0


@pytest.mark.gpu
def test_a_run_goes_on_on_another_device(pico: Any, tmp_path: Path) -> None:
    def interrupt(job: Job, count: int) -> None:
        if count == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve(recipe(pico), tmp_path / "run", device="cpu", worker=meddled(interrupt))
    result = evolve(recipe(pico), tmp_path / "run", device="cuda")
    assert len(result["devices"]) == 2
