"""The sanity guard in a run: merges that no longer end are the best by their scores, and are turned away for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import Meddler, content, evolve_killed_after_every_step, meddled, recipe, stable
from safetensors.torch import load_file, save_file

from shoal.errors import EvaluationError
from shoal.journal import Journal
from shoal.preflight import Prepared
from shoal.report import result_words
from shoal.run import evolve
from shoal.sanity import MAX_TOKENS, PROMPTS, read_written
from shoal.types import Capabilities, Completed, Failed, Job, Worker
from shoal.worker import LocalWorker

END = 2  # pico's end token
PARENTS = ["plus", "minus"]
BY_PERPLEXITY = [{"task": "pico_next", "metric": "perplexity"}]


@pytest.fixture(scope="module")
def opposites(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that end every text, by opposite means: half of each has no means left.

    Every token carries the same sign in the first place of the hidden state, and the end token's logit is high where
    that sign is. So a parent finds the end token likely after anything, and predicts a letter badly; their mean does
    neither.
    """
    folder = tmp_path_factory.mktemp("opposites")
    for name, source, sign in (("plus", "left", 1.0), ("minus", "right", -1.0)):
        shutil.copytree(pico.model(source), folder / name)
        weights = load_file(folder / name / "model.safetensors")
        weights["model.embed_tokens.weight"][:, 0] = 3.0 * sign
        weights["lm_head.weight"][:, 0] = 0.0
        weights["lm_head.weight"][END] = 0.0
        weights["lm_head.weight"][END, 0] = sign
        save_file(weights, folder / name / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def broken(pico: Any, opposites: Path) -> Callable[..., Any]:
    """A recipe whose bounds leave nothing but merges about halfway between the two."""

    def make(**changes: Any) -> Any:
        return recipe(
            pico,
            **{
                "base_model": None,
                "models": [str(opposites / name) for name in PARENTS],
                "merge": {"method": "linear", "dtype": "float32"},
                "space": {"shape": "uniform", "bounds": {"weight": [0.4, 0.6]}},
                "tasks": BY_PERPLEXITY,
                "search": {"budget": 8, "popsize": 4, "items": 16, "seed": 1},
            }
            | changes,
        )

    return make


@pytest.fixture(scope="module")
def guarded(broken: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    run = tmp_path_factory.mktemp("guarded") / "run"
    return run, evolve(broken(), run, device="cpu")


def test_merges_that_no_longer_end_are_turned_away(guarded: tuple[Path, dict[str, Any]]) -> None:
    result = guarded[1]
    merges = {"mean@2", "best@2", "uniform merge"}
    assert set(result["sanity"]["disqualified"]) == merges
    assert all(
        "ends 0 of 16 texts, parents 16" in reason for reason in result["sanity"]["disqualified"].values()
    )
    scores = {entry["id"]: entry["select_score"] for entry in result["finalists"]}
    # without the guard the best of them would have won by far
    assert max(scores, key=scores.get) in merges  # type: ignore[arg-type]
    assert result["winner"]["id"] in PARENTS
    assert result["verdict"] == "ties"
    assert (
        "no merge among the finalists that could be chosen did better there (disqualified: "
        in result["claim"]
    )
    # a baseline that must be beaten, whatever it writes
    assert "uniform merge" in {c["against"] for c in result["comparisons"]}
    words = [line for line in result_words(result) if line.startswith("disqualified")]
    assert len(words) == 3
    assert words[0].startswith(
        "disqualified by what it writes to fixed prompts: mean@2: ends 0 of 16 texts, parents 16"
    )
    assert json.loads((guarded[0] / "result.json").read_text()) == result


def test_the_texts_are_in_the_journal(guarded: tuple[Path, dict[str, Any]]) -> None:
    journal = Journal(guarded[0] / "journal.sqlite")
    events = journal.events("written")
    journal.close()
    assert [event["candidate"] for event in events] == ["mean@2", "best@2", "uniform merge", *PARENTS]
    found = read_written(events)
    assert all(len(one.texts) == len(one.ended) == len(PROMPTS) for one in found.values())
    assert set(found["plus"].texts) == {""} and all(found["plus"].ended)
    assert all(len(text) >= 32 for text in found["mean@2"].texts)
    assert events[0]["texts"].keys() == {str(number) for number in range(16)}
    other = [event | {"prompts": "others"} for event in events]
    assert read_written(other) == {}


def test_what_is_written_does_not_depend_on_interruptions(
    broken: Callable[..., Any],
    guarded: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[Worker] = []

    def one_worker(prepared: Prepared, device: str) -> Worker:
        if not loaded:
            loaded.append(LocalWorker(prepared.recipe, prepared.lock, device))
        return loaded[0]

    result, _ = evolve_killed_after_every_step(broken(), tmp_path / "killed", one_worker, monkeypatch)
    assert stable(result) == stable(guarded[1])
    assert content(tmp_path / "killed") == content(guarded[0])


def test_writing_touches_no_items_and_is_never_done_twice(broken: Callable[..., Any], tmp_path: Path) -> None:
    jobs: list[Job] = []

    def stop(job: Job, count: int) -> None:
        jobs.append(job)
        if job.prompts and job.candidate == "uniform merge":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve(broken(), tmp_path / "run", device="cpu", worker=meddled(stop))

    def watch(job: Job, count: int) -> None:
        jobs.append(job)

    jobs = jobs[:-1]  # the one that was interrupted
    evolve(broken(), tmp_path / "run", device="cpu", worker=meddled(watch))
    writing = [job for job in jobs if job.prompts]
    assert [job.candidate for job in writing] == ["mean@2", "best@2", "uniform merge", *PARENTS]
    assert all(job.prompts == PROMPTS and job.max_tokens == MAX_TOKENS for job in writing)
    assert all(job.canonical and not job.items for job in writing)
    tested = [any(role == "test" for _, role in job.items) for job in jobs]
    assert jobs.index(writing[-1]) < tested.index(True)


def test_a_finalist_that_cannot_write_is_not_chosen(pico: Any, tmp_path: Path) -> None:
    def fail(job: Job, count: int) -> Failed | None:
        return Failed(job.candidate, "no memory", 0.0) if job.prompts and "@" in job.candidate else None

    result = evolve(recipe(pico), tmp_path / "run", device="cpu", worker=meddled(fail))
    assert result["sanity"]["disqualified"] == {
        name: "could not write: no memory" for name in ("mean@3", "best@3")
    }
    assert result["sanity"]["written"]["mean@3"] is None
    assert "@" not in result["winner"]["id"]


def test_a_parent_that_cannot_write_is_tried_again(pico: Any, tmp_path: Path) -> None:
    def fail(job: Job, count: int) -> Failed | None:
        return Failed(job.candidate, "no memory", 0.0) if job.prompts and job.candidate == "left" else None

    with pytest.raises(
        EvaluationError, match="left cannot write to the prompts of the sanity guard: no memory"
    ):
        evolve(recipe(pico), tmp_path / "run", device="cpu", worker=meddled(fail))
    result = evolve(recipe(pico), tmp_path / "run", device="cpu")
    assert result["sanity"]["unchecked"] == {} and "left" in result["sanity"]["written"]


class Mute(Meddler):
    """A worker that scores and does not generate."""

    def capabilities(self) -> Capabilities:
        return Capabilities(device=self.inner.capabilities().device)


def test_a_worker_that_cannot_generate_is_said_to_check_nothing(
    broken: Callable[..., Any], tmp_path: Path
) -> None:
    def refuse(job: Job, count: int) -> Completed | Failed | None:
        assert not job.prompts
        return None

    def make(prepared: Prepared, device: str) -> Worker:
        return Mute(LocalWorker(prepared.recipe, prepared.lock, device), refuse)

    result = evolve(broken(), tmp_path / "run", device="cpu", worker=make)
    assert result["winner"]["id"] not in PARENTS
    assert result["sanity"]["written"] == result["sanity"]["disqualified"] == {}
    assert set(result["sanity"]["unchecked"]) == {"mean@2", "best@2", "uniform merge", *PARENTS}
    (line,) = [line for line in result_words(result) if line.startswith("sanity guard")]
    assert line.endswith("were not asked to write: the worker cannot generate")
