"""The stages of a run: racing, guards, the course of a search and its failures, each replayed to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import Mute, content, evolve_killed_after_every_step, meddled, recipe, stable

from shoal.errors import RunError
from shoal.journal import Journal
from shoal.preflight import Prepared
from shoal.run import evolve
from shoal.types import Completed, Failed, Job, Worker
from shoal.worker import LocalWorker

SEARCH = {"budget": 12, "popsize": 4, "items": 16, "seed": 1}
RACING = SEARCH | {"racing": "on", "item_choice": "disagreement", "grow_items": True}
GUARDED = [
    {"task": "pico_choice", "metric": "acc"},
    {"task": "pico_next", "metric": "acc", "max_drop": 0.001},
]


@pytest.fixture
def one_worker() -> Callable[[Prepared, str], Worker]:
    """Workers of one test share one loaded model."""
    loaded: list[Worker] = []

    def make(prepared: Prepared, device: str) -> Worker:
        if not loaded:
            loaded.append(LocalWorker(prepared.recipe, prepared.lock, device))
        return loaded[0]

    return make


def journal_of(run: Path) -> Journal:
    return Journal(run / "journal.sqlite")


def instead(
    change: Callable[[Job, Completed], Completed | Failed], wanted: Callable[[Job], bool]
) -> Callable[[Prepared, str], Worker]:
    """A worker that scores a wanted job and then hands back something else; it does not write."""

    def make(prepared: Prepared, device: str) -> Worker:
        inner = LocalWorker(prepared.recipe, prepared.lock, device)

        def meddle(job: Job, count: int) -> Completed | Failed | None:
            if not wanted(job):
                return None
            inner.submit(job)
            done = inner.poll()
            assert isinstance(done, Completed)
            return change(job, done)

        return Mute(inner, meddle)

    return make


@pytest.mark.parametrize("search", [SEARCH, RACING], ids=["plain", "racing"])
def test_killed_between_any_two_steps_a_run_ends_as_if_nothing_had_happened(
    pico: Any,
    tmp_path: Path,
    one_worker: Callable[[Prepared, str], Worker],
    monkeypatch: pytest.MonkeyPatch,
    search: dict[str, Any],
) -> None:
    mine = recipe(pico, search=search, tasks=GUARDED)
    whole = evolve(mine, tmp_path / "whole", device="cpu", worker=one_worker)
    result, steps = evolve_killed_after_every_step(mine, tmp_path / "killed", one_worker, monkeypatch)
    assert steps > 40
    assert stable(result) == stable(whole)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_in_a_race_at_least_mu_meet_all_items_and_losers_rank_below(
    pico: Any, tmp_path: Path, one_worker: Callable[[Prepared, str], Worker]
) -> None:
    search = RACING | {"budget": 24, "popsize": 8, "items": 48, "grow_items": False}
    evolve(recipe(pico, search=search), tmp_path / "run", device="cpu", worker=one_worker)
    journal = journal_of(tmp_path / "run")
    met: dict[str, list[int]] = {}
    for row in journal.evaluations():
        if row.candidate.startswith("g"):
            met.setdefault(row.candidate, []).append(row.rung)
    assert all(rungs == list(range(len(rungs))) for rungs in met.values())
    for generation, fitness in journal.tells().items():
        full = [name for name in fitness if len(met[name]) == 3]
        assert len(full) >= 4, generation
        for task in ("pico_choice", "pico_next"):
            items = [
                {score.item for score in journal.scores(name, "search") if score.task == task}
                for name in fitness
            ]
            assert max(map(len, items)) == 48
            assert all(a <= b or b <= a for a in items for b in items), "ranks are from shared items"
    assert any(len(rungs) < 3 for rungs in met.values()), "nobody ever left: the test shows nothing"
    journal.close()


def test_the_lock_says_whether_there_is_a_race_and_negative_weights_are_off_then(
    pico: Any, tmp_path: Path, one_worker: Callable[[Prepared, str], Worker]
) -> None:
    from shoal.folder import RunFolder
    from shoal.preflight import prepare
    from shoal.stages.search import new_optimizer

    for racing in (True, False):
        prepared = prepare(recipe(pico, search=SEARCH | {"racing": "on" if racing else "off"}), tmp_path)
        assert prepared.lock.search.racing is racing
        weights = new_optimizer(prepared)._es.sp.weights  # type: ignore[attr-defined]
        assert (min(weights) < 0) is not racing
    assert not RunFolder(tmp_path).started


def test_a_candidate_that_breaks_a_guard_is_never_the_best_and_ranks_last(pico: Any, tmp_path: Path) -> None:
    """One candidate does best of all on the one task and fails the guarded one throughout."""

    def spoil(job: Job, done: Completed) -> Completed:
        return replace(
            done,
            scores=tuple(replace(s, objective=1.0 if s.task == "pico_choice" else 0.0) for s in done.scores),
        )

    def wanted(job: Job) -> bool:
        return job.candidate.startswith("g") and job.candidate.endswith("c02")

    finalists = {}
    for tasks in (GUARDED, [{k: v for k, v in task.items() if k != "max_drop"} for task in GUARDED]):
        run = tmp_path / f"run{len(finalists)}"
        evolve(recipe(pico, tasks=tasks, search=SEARCH), run, device="cpu", worker=instead(spoil, wanted))
        journal = journal_of(run)
        tells = journal.tells()
        assert all(max(told, key=lambda name: told[name] or 0).endswith("c02") for told in tells.values())
        best = journal.candidate("best@3")
        assert best is not None
        finalists[run.name] = next(c.id for c in journal.candidates("search") if c.genome == best.genome)
        journal.close()
    assert not finalists["run0"].endswith("c02") and finalists["run1"].endswith("c02")


def misleading(job: Job, done: Completed) -> Completed:
    """An objective that falls where the metric rises, on one task."""
    scores = []
    for s in done.scores:
        if s.task == "pico_choice" and s.role == "search":
            s = replace(s, objective=0.9 - 0.8 * float(s.metrics["acc,none"]))
        scores.append(s)
    return replace(done, scores=tuple(scores))


def test_an_objective_that_no_longer_ranks_as_the_metric_is_given_up_and_the_switch_is_replayed(
    pico: Any, tmp_path: Path
) -> None:
    search = SEARCH | {"budget": 64, "popsize": 8, "items": 32}
    mine, worker = recipe(pico, search=search), instead(misleading, lambda job: True)
    result = evolve(mine, tmp_path / "whole", device="cpu", worker=worker)
    journal = journal_of(tmp_path / "whole")
    courses = journal.events("course")
    assert [c["generation"] for c in courses] == list(range(8))
    assert courses[-1]["objectives"] == {"pico_choice": "metric", "pico_next": "smooth"}
    switched = next(c for c in courses if c["objectives"]["pico_choice"] == "metric")
    agreed = switched["agreement"]["pico_choice"]
    assert agreed["anchors"] < 0 or (agreed["points"] >= 20 and agreed["p"] <= 0.1)
    assert agreed["tau"] < 0 < switched["agreement"]["pico_next"]["tau"]
    after = switched["generation"]
    assert all(c["objectives"]["pico_choice"] == "metric" for c in courses[after:])
    assert all("pico_choice" not in c["agreement"] for c in courses[after + 1 :])
    journal.close()

    def interrupt(job: Job, done: Completed) -> Completed:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return misleading(job, done)

    # in the generation after the switch, and once more
    for jobs in (4 + 8 * after + 2, 9):
        left = jobs
        with pytest.raises(KeyboardInterrupt):
            evolve(mine, tmp_path / "run", device="cpu", worker=instead(interrupt, lambda job: True))
    again = evolve(mine, tmp_path / "run", device="cpu", worker=worker)
    assert stable(again) == stable(result)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_generation_task_is_switched_with_its_anchors_generated_anew(pico: Any, tmp_path: Path) -> None:
    """Candidates of a generation task do not generate until its metric is searched; anchors do, on a sample."""
    tasks = [{"task": "pico_write", "metric": "exact_match"}, {"task": "pico_next", "metric": "acc"}]

    def disagree(job: Job, done: Completed) -> Completed:
        order = {"base": 0, "left": 1, "right": 2, "uniform merge": 3}.get(job.candidate)
        if order is None:
            return done
        scores = []
        for s in done.scores:
            if s.task == "pico_write" and s.role == "search":
                metrics = {k: float((s.item + order) % 4 < order) for k in s.metrics}
                s = replace(s, objective=0.9 - order / 5, metrics=metrics)
            scores.append(s)
        return replace(done, scores=tuple(scores))

    jobs: list[Job] = []

    def record(job: Job) -> bool:
        jobs.append(job)
        return True

    evolve(recipe(pico, tasks=tasks), tmp_path / "run", device="cpu", worker=instead(disagree, record))
    journal = journal_of(tmp_path / "run")
    assert journal.events("course")[0]["objectives"] == {"pico_write": "metric", "pico_next": "smooth"}
    anchor = [
        (row.rung, row.items)
        for row in journal.evaluations()
        if row.candidate == "left" and row.role == "search"
    ]
    pool = len(journal.scores("left", "search")) // 2
    assert anchor == [(0, 2 * pool), (1, min(64, pool)), (2, pool)]
    searched = [job for job in jobs if job.candidate.startswith("g")]
    assert searched and all(job.generate for job in searched)
    assert all(s.metrics for s in journal.scores("g000c00", "search"))
    journal.close()


def test_items_grow_when_halves_of_a_generation_rank_differently(pico: Any, tmp_path: Path) -> None:
    """Scores that are pure noise: no half ranks as the other."""

    def noise(job: Job, done: Completed) -> Completed:
        import hashlib

        def value(item: int) -> float:
            digest = hashlib.sha256(f"{job.candidate} {item}".encode()).digest()
            return int.from_bytes(digest[:4], "big") / 2**32

        return replace(done, scores=tuple(replace(s, objective=value(s.item)) for s in done.scores))

    search = SEARCH | {"budget": 64, "popsize": 8, "grow_items": True}
    evolve(
        recipe(pico, search=search),
        tmp_path / "run",
        device="cpu",
        worker=instead(noise, lambda job: job.candidate.startswith("g")),
    )
    journal = journal_of(tmp_path / "run")
    items = [c["items"] for c in journal.events("course")]
    assert items[:2] == [16, 16] and items[-1] > 16 and items == sorted(items)
    for generation, n in enumerate(items):
        assert len(journal.scores(f"g{generation:03d}c00", "search")) == 2 * n
    journal.close()


def nan(job: Job, done: Completed) -> Completed:
    broken = replace(done.scores[0], objective=float("nan"))
    return replace(done, scores=(broken, *done.scores[1:]))


def slow(job: Job, done: Completed) -> Completed:
    return replace(done, seconds_score=100.0)


def short_of_memory(job: Job, done: Completed) -> Failed:
    return Failed(job.candidate, "out of memory at the smallest batch", 0.1)


def unmergeable(job: Job, done: Completed) -> Failed:
    return Failed(job.candidate, "CheckpointError: tensor x: shape differs", 0.1)


@pytest.mark.parametrize("racing", ["off", "on"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nan, "its score is not finite"),
        (slow, "100 s, 50 s were left of search.max_candidate_seconds"),
        (short_of_memory, "out of memory"),
        (unmergeable, "shape differs"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_candidate_that_fails_is_recorded_and_told_as_worst_and_the_run_goes_on(
    pico: Any, tmp_path: Path, change: Any, reason: str, racing: str
) -> None:
    search = SEARCH | {"max_candidate_seconds": 50.0, "racing": racing}
    mine = recipe(pico, search=search)
    run = tmp_path / "run"
    worker = instead(change, lambda job: job.candidate in ("g000c01", "g002c03"))
    result = evolve(mine, run, device="cpu", worker=worker)
    assert result["cost"]["failed"] == 2
    journal = journal_of(run)
    for name, generation in (("g000c01", 0), ("g002c03", 2)):
        done = journal.evaluation(name, "search")
        assert done is not None and done.status == "failed" and reason in (done.error or "")
        assert journal.tells()[generation][name] is None
        assert journal.scores(name, "search") == []
        assert journal.evaluation(name, "search", 1) is None
    journal.close()


def test_a_slow_candidate_is_counted_over_its_rungs(pico: Any, tmp_path: Path) -> None:
    def thirty(job: Job, done: Completed) -> Completed:
        return replace(done, seconds_merge=0.0, seconds_score=30.0)

    search = SEARCH | {"budget": 4, "max_candidate_seconds": 50.0, "racing": "on"}
    worker = instead(thirty, lambda job: job.candidate == "g000c00")
    evolve(recipe(pico, search=search), tmp_path / "run", device="cpu", worker=worker)
    journal = journal_of(tmp_path / "run")
    assert journal.evaluation("g000c00", "search").status == "done"  # type: ignore[union-attr]
    second = journal.evaluation("g000c00", "search", 1)
    if second is not None:  # it may have lost the race before
        assert second.status == "failed" and "20 s were left" in (second.error or "")
        assert journal.tells()[0]["g000c00"] is None
    journal.close()


def test_ten_failures_in_a_row_stop_a_race_as_well(pico: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="10 candidates in a row failed, the last one with: out of memory"):
        evolve(
            recipe(pico, search=RACING),
            tmp_path / "run",
            device="cpu",
            worker=instead(short_of_memory, lambda job: job.candidate.startswith("g")),
        )


@pytest.mark.parametrize("optimizer", ["sep-cma-es", "random", "grid"])
def test_every_optimizer_makes_a_run(pico: Any, tmp_path: Path, optimizer: str) -> None:
    mine = recipe(pico, search={"budget": 8, "popsize": 4, "items": 8, "algorithm": optimizer})
    assert evolve(mine, tmp_path / "run", device="cpu")["cost"]["candidates"] == 8
    assert json.loads(json.dumps(mine.search.optimizer)) == optimizer


def test_a_warm_start_begins_at_the_winner_of_another_run(pico: Any, tmp_path: Path) -> None:
    from shoal.folder import RunFolder

    first = evolve(recipe(pico, search=SEARCH), tmp_path / "first", device="cpu")
    warm = recipe(pico, search={"budget": 4, "popsize": 4, "items": 8, "warm_start": "first"})
    evolve(warm, tmp_path / "second", base_folder=tmp_path, device="cpu")
    journal = journal_of(tmp_path / "first")
    winner = journal.candidate(first["winner"]["id"])
    journal.close()
    locks = [RunFolder(tmp_path / name).open()[1] for name in ("first", "second")]
    assert locks[1].sigma0 < locks[0].sigma0
    if winner is not None and winner.genome is not None:
        assert locks[1].search.x0 == pytest.approx(winner.genome, abs=1e-9)
    else:
        assert locks[1].search.x0 != locks[0].search.x0


def test_a_race_scores_no_item_of_a_candidate_twice(pico: Any, tmp_path: Path) -> None:
    """Rungs are parts of a generation's items, not repetitions."""
    seen: dict[str, list[int]] = {}

    def watch(job: Job, count: int) -> None:
        if job.candidate.startswith("g"):
            for (task, _), items in job.items.items():
                seen.setdefault(f"{job.candidate} {task}", []).extend(items)

    evolve(recipe(pico, search=RACING), tmp_path / "run", device="cpu", worker=meddled(watch))
    assert seen and all(len(set(items)) == len(items) for items in seen.values())
