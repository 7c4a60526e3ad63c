"""A run that grows: into which spaces, from where, the same whatever interrupts it, and readable by all that reads runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import content, recipe, stable
from safetensors.numpy import load_file
from test_stages import evolve_killed_after_every_step

from shoal.folder import RunFolder
from shoal.front import front_rows
from shoal.journal import CandidateRow, Journal
from shoal.merge_run import write_candidate
from shoal.pareto import pareto
from shoal.preflight import Prepared, restore
from shoal.report import write_plots
from shoal.run import evolve
from shoal.types import Completed, Job, Worker
from shoal.worker import LocalWorker

SPACE = {
    "shape": "uniform",
    "tensor_types": [],
    "grow": [{"shape": "curve", "coefficients": 2}, {"shape": "layers"}],
    "patience": 2,
}
# where the recipe names no popsize, every stage has its own
SEARCH = {"budget": 66, "items": 16, "seed": 1}
GENES, POPSIZE = (2, 4, 6), (6, 8, 9)


class Flat:
    """A worker by whose search scores no generation brings more than the one before; what it merges is real."""

    def __init__(self, inner: Worker) -> None:
        self.inner = inner

    def submit(self, job: Job) -> str:
        return self.inner.submit(job)

    def poll(self) -> Any:
        done = self.inner.poll()
        if not isinstance(done, Completed):
            return done
        searched = done.candidate.startswith("g0")
        value = 0.5 + (0.01 * (int(done.candidate[-1]) % 2) if searched else 0.0)
        return replace(
            done, scores=tuple(replace(s, objective=value) if s.role == "search" else s for s in done.scores)
        )

    def cancel(self, candidate: str) -> None:
        self.inner.cancel(candidate)

    def capabilities(self) -> Any:
        return self.inner.capabilities()

    def close(self) -> None:
        self.inner.close()


@pytest.fixture(scope="module")
def flat() -> Callable[[Prepared, str], Worker]:
    """Workers that share one loaded model."""
    loaded: list[Worker] = []

    def make(prepared: Prepared, device: str) -> Worker:
        if not loaded:
            loaded.append(Flat(LocalWorker(prepared.recipe, prepared.lock, device)))
        return loaded[0]

    return make


@pytest.fixture(scope="module")
def grown(
    pico: Any, flat: Callable[[Prepared, str], Worker], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("grown") / "run"
    return run, evolve(recipe(pico, space=SPACE, search=SEARCH), run, device="cpu", worker=flat)


def generations(run: Path) -> dict[int, list[CandidateRow]]:
    journal = Journal(run / "journal.sqlite")
    found: dict[int, list[CandidateRow]] = {}
    for row in journal.candidates("search"):
        assert row.generation is not None
        found.setdefault(row.generation, []).append(row)
    journal.close()
    return found


def growths(run: Path) -> list[dict[str, Any]]:
    journal = Journal(run / "journal.sqlite")
    events = list(journal.events("growth"))
    journal.close()
    return events


def test_on_a_stall_the_search_goes_on_in_the_next_space_within_its_budget(grown: tuple[Path, Any]) -> None:
    run, result = grown
    events = growths(run)
    assert [(e["stage"], e["from"], e["to"], e["popsize"]) for e in events] == [
        (1, "uniform, 2 genes", "curve, 4 genes", 8),
        (2, "curve, 4 genes", "layers, 6 genes", 9),
    ]
    # 2 * patience generations in each space before anything can be said of it
    first, second = (e["generation"] for e in events)
    assert (first, second) == (4, 8)
    for number, rows in generations(run).items():
        stage = (number >= first) + (number >= second)
        assert len(rows) == POPSIZE[stage]
        assert {len(row.genome or ()) for row in rows} == {GENES[stage]}
    asked = sum(map(len, generations(run).values()))
    assert result["cost"]["candidates"] == asked == 4 * 6 + 4 * 8 + 9
    _, lock = RunFolder(run).open()
    assert [len(stage.genes) for stage in lock.stages] == [4, 6]
    assert len({lock.seeds.search, *(stage.seed for stage in lock.stages)}) == 3


def test_the_finer_search_starts_at_the_merge_that_the_coarser_one_had_reached(
    grown: tuple[Path, Any],
) -> None:
    run, _ = grown
    recipe_, lock = RunFolder(run).open()
    prepared = restore(recipe_, lock)
    first = growths(run)[0]["generation"]
    coarse = np.array([row.genome for row in generations(run)[first - 1]])
    fine = np.array([row.genome for row in generations(run)[first]])
    # curve: s, c1 per source; s is the uniform weight. Its start is among what the last coarse generation sampled
    assert (fine[:, ::2].mean(axis=0) > coarse.min(axis=0) - 0.2).all()
    assert (fine[:, ::2].mean(axis=0) < coarse.max(axis=0) + 0.2).all()
    assert np.abs(fine[:, 1::2].mean(axis=0)).max() < 0.2 < np.ptp(fine[:, 1::2])
    for row in (*generations(run)[first - 1], *generations(run)[first]):
        assert row.genome is not None
        assert prepared.decode(row.genome).digest() == row.plan_digest


def test_the_same_lock_grows_the_same_way_killed_between_any_two_steps_or_not(
    pico: Any,
    grown: tuple[Path, dict[str, Any]],
    flat: Callable[[Prepared, str], Worker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = SEARCH | {"budget": 33}
    mine = recipe(pico, space=SPACE, search=search)
    whole = evolve(mine, tmp_path / "whole", device="cpu", worker=flat)
    assert len(growths(tmp_path / "whole")) == 1
    assert content(tmp_path / "whole")["tells"] == content(grown[0])["tells"][:5]
    result, steps = evolve_killed_after_every_step(mine, tmp_path / "killed", flat, monkeypatch)
    assert steps > 40
    assert stable(result) == stable(whole)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert growths(tmp_path / "killed") == growths(tmp_path / "whole")


@pytest.mark.parametrize("budget", [24, 30, 33])
def test_a_larger_budget_continues_as_if_it_had_been_there_from_the_start(
    pico: Any,
    grown: tuple[Path, dict[str, Any]],
    flat: Callable[[Prepared, str], Worker],
    tmp_path: Path,
    budget: int,
) -> None:
    # 24: ends where the next generation would grow; 30: one more coarse generation would fit; 33: after growing
    evolve(
        recipe(pico, space=SPACE, search=SEARCH | {"budget": budget}),
        tmp_path / "run",
        device="cpu",
        worker=flat,
    )
    assert len(growths(tmp_path / "run")) == (budget == 33)
    second = evolve(
        recipe(pico, space=SPACE, search=SEARCH),
        tmp_path / "run",
        device="cpu",
        worker=flat,
        reopen_test=True,
    )
    assert generations(tmp_path / "run") == generations(grown[0])
    assert growths(tmp_path / "run") == growths(grown[0])
    assert second["winner"] == grown[1]["winner"]


def test_candidates_of_every_stage_can_be_merged_compared_and_drawn(
    grown: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, _ = grown
    stages = [0, *(event["generation"] for event in growths(run))]
    tensors = []
    for number in stages:
        name = generations(run)[number][0].id
        assert write_candidate(run, tmp_path / name, name) == name
        tensors.append(load_file(tmp_path / name / "model.safetensors"))
    key = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(tensors[0][key], tensors[1][key])
    front = pareto(run, ["pico_choice", "pico_next"])
    assert {e.generation for e in front.entries} >= set(generations(run))
    assert front_rows(front, everyone=True)[1]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    result = json.loads((copy / "result.json").read_text())
    for number in stages:
        result["winner"]["id"] = generations(run)[number][0].id
        (copy / "result.json").write_text(json.dumps(result))
        assert [path.name for path in write_plots(copy)] == ["convergence.png", "weights.png"]


def test_without_growth_nothing_changes(pico: Any, tmp_path: Path) -> None:
    evolve(recipe(pico), tmp_path / "run", device="cpu")
    assert growths(tmp_path / "run") == []
    _, lock = RunFolder(tmp_path / "run").open()
    assert lock.stages == ()
