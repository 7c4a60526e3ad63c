"""The gradient start: exact derivatives for the genes, a better start, replayed to the last bit, and none where none is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from runs import Meddler, content, recipe, stable

from shoal.errors import RecipeError
from shoal.journal import Journal
from shoal.preflight import Prepared, prepare
from shoal.run import evolve
from shoal.search.ascent import STEPS, genes_gradient, stepped
from shoal.search.optimizer import warm_sigma0
from shoal.stages.search import new_optimizer
from shoal.types import Capabilities, Completed, Failed, Job, Slope, Worker
from shoal.worker import LocalWorker

SEARCH = {"budget": 8, "popsize": 4, "items": 16, "seed": 1, "start": "gradient", "start_items": 12}


class Killed(BaseException):
    """What a test raises where a process would be killed."""


@pytest.fixture(scope="module")
def one_worker(pico: Any) -> Callable[[Prepared, str], Worker]:
    """Runs of one recipe share one loaded model."""
    loaded: list[Worker] = []

    def make(prepared: Prepared, device: str) -> Worker:
        if not loaded:
            loaded.append(LocalWorker(prepared.recipe, prepared.lock, device))
        return loaded[0]

    return make


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return Journal(run / "journal.sqlite").events(kind)


@pytest.mark.parametrize(
    "changes",
    [
        {"space": {"shape": "curve", "coefficients": 2, "tensor_types": ["attn", "mlp"]}},
        {"space": {"shape": "layers", "bounds": {"lambda": [0.5, 1.5]}}},
        {"merge": {"method": "dare_linear", "dtype": "float32", "parameters": {"density": 0.6}}},
        {
            "merge": {"method": "linear", "dtype": "float32", "parameters": {"normalize": False}},
            "base_model": None,
        },
    ],
    ids=["curve", "layers and lambda", "dare_linear", "linear"],
)
def test_the_gradient_of_the_genes_is_that_of_scored_merges(
    pico: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    tasks = [{"task": name} for name in ("pico_choice", "pico_next", "pico_write")]
    prepared = prepare(recipe(pico, search=SEARCH, tasks=tasks, **changes), tmp_path)
    space, worker = prepared.space, LocalWorker(prepared.recipe, prepared.lock, "cpu")
    items = {task.task: task.roles["search"].items[:3] for task in prepared.lock.tasks}
    shares = {"pico_choice": 0.5, "pico_next": 0.2, "pico_write": 0.3}

    def value(genome: Any) -> float:
        worker.submit(Job("x", space.decode(genome), {(t, "search"): i for t, i in items.items()}, False))
        done = worker.poll()
        assert isinstance(done, Completed)
        return math.fsum(shares[row.task] / 3 * (row.objective or 0.0) for row in done.scores)

    counts = {(t, "search"): dict.fromkeys(i, 1 / 3) for t, i in items.items()}
    start = np.array(space.x0) + 0.05 * np.random.default_rng(0).normal(size=space.size)
    worker.submit(Job("x", space.decode(start), {}, differentiate=counts))
    done = worker.poll()
    assert isinstance(done, Completed)
    assert done.scores == () and set(done.slopes) == set(items)
    gradient = genes_gradient(space, done.slopes, shares)
    largest = float(np.abs(gradient).max())
    assert largest > 1e-3
    for gene in range(space.size):
        ends, step = [], 0.005
        for sign in (1, -1):
            genome = start.copy()
            genome[gene] += sign * step
            ends.append(value(genome))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gradient[gene], abs=0.01 * largest)


def test_the_search_begins_where_the_objective_is_higher(
    pico: Any, tmp_path: Path, one_worker: Callable[[Prepared, str], Worker]
) -> None:
    result = evolve(recipe(pico, search=SEARCH), tmp_path / "run", device="cpu", worker=one_worker)
    (found,), (gradient,) = events(tmp_path / "run", "search start"), events(tmp_path / "run", "gradient")
    values = dict(map(tuple, found["tried"]))
    assert values[found["step"]] == max(values.values()) > values[0.0]
    assert found["items"] == {"pico_choice": 12, "pico_next": 12}
    # a forward pass of every point, and three for the backward pass
    assert found["item_evaluations"] == 24 * (len(found["tried"]) + 3)
    assert gradient["item_evaluations"] == 24 * 3 and gradient["error"] is None
    journal = Journal(tmp_path / "run" / "journal.sqlite")
    assert result["cost"]["item_evaluations"] == sum(row.items for row in journal.evaluations())
    prepared = prepare(recipe(pico, search=SEARCH), tmp_path)
    starts = journal.candidates("start")
    assert len(starts) == len(found["tried"])
    assert starts[0].genome == prepared.lock.search.x0
    best = next(row for row in starts if row.genome == tuple(found["genome"]))
    assert best.plan_digest == prepared.space.decode(found["genome"]).digest()
    # the first generation is drawn around it, with the small first step of a warm start
    lock = prepared.lock.model_copy(
        update={
            "search": prepared.lock.search.model_copy(update={"x0": tuple(found["genome"])}),
            "sigma0": warm_sigma0(prepared.space.size),
        }
    )
    expected = new_optimizer(replace(prepared, lock=lock)).ask()
    assert [row.genome for row in journal.candidates("search", 0)] == [tuple(x) for x in expected.tolist()]


def test_without_the_key_nothing_is_differentiated(
    pico: Any, tmp_path: Path, one_worker: Callable[[Prepared, str], Worker]
) -> None:
    plain = {key: value for key, value in SEARCH.items() if not key.startswith("start")}
    evolve(recipe(pico, search=plain), tmp_path / "run", device="cpu", worker=one_worker)
    assert events(tmp_path / "run", "gradient") == events(tmp_path / "run", "search start") == []
    assert Journal(tmp_path / "run" / "journal.sqlite").candidates("start") == []


def test_killed_between_any_two_steps_it_starts_where_it_would_have(
    pico: Any,
    tmp_path: Path,
    one_worker: Callable[[Prepared, str], Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = recipe(pico, search=SEARCH)
    whole = evolve(mine, tmp_path / "whole", device="cpu", worker=one_worker)

    def dying(write: Callable[..., None]) -> Callable[..., None]:
        def wrapped(self: Journal, *args: Any, **kwargs: Any) -> None:
            write(self, *args, **kwargs)
            if args[0] not in ("start", "loaded", "note"):  # every process writes these
                raise Killed

        return wrapped

    steps, killed = 0, tmp_path / "killed"
    with monkeypatch.context() as patch:
        for name in ("event", "ask", "complete", "tell"):
            patch.setattr(Journal, name, dying(getattr(Journal, name)))
        while True:
            try:
                result = evolve(mine, killed, device="cpu", worker=one_worker)
                break
            except Killed:
                steps += 1
    assert steps > 20
    assert stable(result) == stable(whole)
    assert content(killed) == content(tmp_path / "whole")
    assert events(killed, "search start") == events(tmp_path / "whole", "search start")
    (ours,), (theirs,) = events(killed, "gradient"), events(tmp_path / "whole", "gradient")
    assert ours["slopes"] == theirs["slopes"]


def nan_slopes(job: Job, done: Completed) -> Completed:
    broken = {task: (*found[:-1], replace(found[-1], value=math.nan)) for task, found in done.slopes.items()}
    return replace(done, slopes=broken)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (
            lambda job, done: Failed(job.candidate, "out of memory at the smallest batch", 1.5),
            "out of memory",
        ),
        (nan_slopes, "its gradient is not finite"),
        (lambda job, done: replace(done, slopes={}), "its gradient is not finite"),
        (
            lambda job, done: replace(
                done, slopes={t: tuple(replace(s, value=0.0) for s in f) for t, f in done.slopes.items()}
            ),
            "does not depend on any gene",
        ),
    ],
    ids=["out of memory", "nan", "nothing", "flat"],
)
def test_without_a_gradient_it_starts_as_always(
    pico: Any,
    tmp_path: Path,
    one_worker: Callable[[Prepared, str], Worker],
    outcome: Callable[[Job, Completed], Completed | Failed],
    reason: str,
) -> None:
    def worker(prepared: Prepared, device: str) -> Worker:
        inner = one_worker(prepared, device)

        def meddle(job: Job, count: int) -> Completed | Failed | None:
            if not job.differentiate:
                return None
            inner.submit(job)
            done = inner.poll()
            assert isinstance(done, Completed)
            return outcome(job, done)

        return Meddler(inner, meddle)

    evolve(recipe(pico, search=SEARCH), tmp_path / "run", device="cpu", worker=worker)
    (found,) = events(tmp_path / "run", "search start")
    assert found["step"] == 0 and reason in found["reason"]
    assert found["item_evaluations"] == 24 * 4  # what it cost all the same
    prepared = prepare(recipe(pico, search=SEARCH), tmp_path)
    first = Journal(tmp_path / "run" / "journal.sqlite").candidates("search", 0)
    assert [row.genome for row in first] == [tuple(x) for x in new_optimizer(prepared).ask().tolist()]


def test_a_worker_that_cannot_differentiate_is_not_asked(
    pico: Any, tmp_path: Path, one_worker: Callable[[Prepared, str], Worker]
) -> None:
    class Plain(Meddler):
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), differentiates=False)

    def refuse(job: Job, count: int) -> None:
        assert not job.differentiate

    run = tmp_path / "run"
    evolve(
        recipe(pico, search=SEARCH), run, device="cpu", worker=lambda p, d: Plain(one_worker(p, d), refuse)
    )
    (found,) = events(run, "search start")
    assert found["reason"] == "this worker does not differentiate" and found["item_evaluations"] == 0


def test_a_broken_gradient_is_a_failed_job(pico: Any, tmp_path: Path) -> None:
    prepared = prepare(recipe(pico, search=SEARCH), tmp_path)
    worker = LocalWorker(prepared.recipe, prepared.lock, "cpu")
    plan = prepared.space.decode(np.full(prepared.space.size, 1e30))
    items = prepared.lock.tasks[0].roles["search"].items[:2]
    worker.submit(Job("x", plan, {}, differentiate={("pico_choice", "search"): dict.fromkeys(items, 0.5)}))
    done = worker.poll()
    assert isinstance(done, Failed) and "not finite" in done.error


def test_where_memory_runs_out_the_pass_begins_anew_with_smaller_batches(pico: Any, tmp_path: Path) -> None:
    import torch

    prepared = prepare(recipe(pico, search=SEARCH), tmp_path)
    worker = LocalWorker(prepared.recipe, prepared.lock, "cpu")
    items = prepared.lock.tasks[0].roles["search"].items[:20]
    job = Job(
        "x",
        prepared.space.decode(prepared.space.x0),
        {},
        differentiate={("pico_choice", "search"): dict.fromkeys(items, 0.05)},
    )
    worker.submit(job)
    whole = worker.poll()
    calls: list[int] = []

    def full(module: Any, arguments: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 2:  # the first batch was handed over already
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = worker._lm.model.register_forward_pre_hook(full)
    worker.submit(job)
    again = worker.poll()
    handle.remove()
    assert isinstance(whole, Completed) and isinstance(again, Completed)
    assert whole.events == () and again.events == ("out of memory: batch halved to 256",)
    ours, theirs = ([s.value for s in done.slopes["pico_choice"]] for done in (again, whole))
    assert ours == pytest.approx(theirs, abs=1e-5 * max(map(abs, theirs)))


def test_a_warm_start_is_where_the_gradient_is_taken(
    pico: Any, tmp_path: Path, one_worker: Callable[[Prepared, str], Worker]
) -> None:
    models = [
        {"model": str(pico.model(n)), "parameters": {"weight": w}} for n, w in (("left", 0.2), ("right", 0.6))
    ]
    merged = {"merge_method": "task_arithmetic", "base_model": str(pico.model("base")), "models": models}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(merged))
    mine = recipe(pico, search=SEARCH | {"warm_start": str(tmp_path / "merge.yml")})
    evolve(mine, tmp_path / "run", device="cpu", worker=one_worker)
    journal = Journal(tmp_path / "run" / "journal.sqlite")
    first, second, *_ = journal.candidates("start")
    assert first.genome == pytest.approx([0.2, 0.0] * 2 + [0.6, 0.0] * 2)
    assert second.genome is not None and second.genome != pytest.approx(first.genome)
    (found,) = journal.events("search start")
    values = dict(map(tuple, found["tried"]))
    assert values[found["step"]] == max(values.values()) > values[0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge": {"method": "ties"}}, "search.start: gradient: .* linear in its weights, found ties;"),
        ({"merge": {"method": "linear"}, "base_model": None}, "found linear with normalize: true"),
        ({"search": SEARCH | {"optimizer": "random"}}, "'random' starts nowhere"),
        ({"search": SEARCH | {"objective": "metric"}}, "found search.objective: metric"),
    ],
)
def test_what_has_no_gradient_is_refused_before_anything_is_loaded(
    pico: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        prepare(recipe(pico, **{"search": SEARCH} | changes), tmp_path)
    assert "\n" not in str(error.value)


def test_steps_are_measured_in_ranges_and_end_at_bounds(pico: Any, tmp_path: Path) -> None:
    space = prepare(recipe(pico), tmp_path).space
    gradient = np.random.default_rng(0).normal(size=space.size)
    ranges = space.high - space.low
    for step in STEPS[:2]:
        moved = (stepped(space, space.x0, gradient, step) - space.x0) / ranges
        assert math.sqrt(float((moved**2).mean())) == pytest.approx(step)
        # steepest where genes are measured in their ranges
        assert moved / np.abs(moved).max() == pytest.approx(
            gradient * ranges / np.abs(gradient * ranges).max()
        )
    far = stepped(space, space.x0, gradient, 10.0)
    assert ((far == space.low) | (far == space.high)).all()


def test_slopes_of_several_groups_add_up_in_their_gene(pico: Any, tmp_path: Path) -> None:
    space = prepare(recipe(pico, space={"shape": "uniform"}), tmp_path).space
    groups = len(space.groups)
    slopes = {
        "a": [Slope(group, source, "weight", 1.0 + source) for group in range(groups) for source in (0, 1)],
        "b": [Slope(0, 1, "weight", 10.0)],
    }
    assert genes_gradient(space, slopes, {"a": 0.5, "b": 0.25}).tolist() == [
        0.5 * groups,
        0.5 * 2 * groups + 0.25 * 10,
    ]
