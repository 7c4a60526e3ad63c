"""Scores against stock lm-eval on the same model, tasks, seeds: the same numbers, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shoal.errors import EvaluationError, RecipeError
from shoal.evals.catalogue import Catalogue, doc_hash
from shoal.evals.limits import MemoryLimit, forward_bytes
from shoal.evals.quiet import quiet_libraries
from shoal.evals.requests import PromptSpec, build_requests
from shoal.evals.resident import ResidentLM
from shoal.evals.scorer import PlannedTask, Scorer
from shoal.merge.runtime import load_runtime
from shoal.tokenizer import load_tokenizer

TASKS = ("pico_choice", "pico_next", "pico_write")


def resident(folder: Path, rows: int = 32, **options: Any) -> ResidentLM:
    with quiet_libraries():
        return ResidentLM(load_runtime(folder), load_tokenizer(folder), rows, **options)


def planned(pico: Any, name: str, items: Sequence[int], shots: int = 0) -> PlannedTask:
    source = Catalogue(pico.tasks).load(name)
    source.set_fewshot(shots)
    return PlannedTask(source, build_requests(source, source.eval_split, items, PromptSpec()))


def stock(pico: Any, shots: int) -> dict[str, list[dict[str, Any]]]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    with quiet_libraries():
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(pico.model("left")), "dtype": "float32"},
            tasks=list(TASKS),
            num_fewshot=shots,
            batch_size=16,
            device="cpu",
            log_samples=True,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(pico.tasks), include_defaults=False),
        )
    assert results is not None
    return dict(results["samples"])


@pytest.mark.parametrize("shots", [0, 2])
def test_items_score_as_in_stock_lm_eval(pico: Any, shots: int) -> None:
    samples = stock(pico, shots)
    everything = range(120)
    tasks = {(name, "test"): planned(pico, name, everything, shots) for name in TASKS}
    rows, events = Scorer(resident(pico.model("left")), tasks).score({key: everything for key in tasks})  # type: ignore[arg-type]
    assert events == []
    found = {(row.task, row.item): row for row in rows}
    assert len(found) == 3 * 120
    for name, metric in (("pico_choice", "acc"), ("pico_next", "acc"), ("pico_write", "exact_match")):
        for sample in samples[name]:
            row = found[name, sample["doc_id"]]
            assert row.metrics[f"{metric},none"] == sample[metric]
            if name != "pico_write":
                expected = [response[0][0] for response in sample["resps"]]
                assert row.logliks == pytest.approx(expected, abs=1e-4)
            doc = tasks[name, "test"].requests[sample["doc_id"]].doc
            assert doc_hash(doc) == sample["doc_hash"]


def test_a_subset_scores_as_within_the_whole(pico: Any) -> None:
    lm = resident(pico.model("left"))
    subset = [3, 50, 119]
    tasks = {(name, "test"): planned(pico, name, range(120), 2) for name in TASKS}
    scorer = Scorer(lm, tasks)  # type: ignore[arg-type]
    whole, _ = scorer.score({key: range(120) for key in tasks})  # type: ignore[misc]
    part, _ = scorer.score({key: subset for key in tasks})  # type: ignore[misc]
    expected = {(row.task, row.item): row for row in whole}
    for row in part:
        assert row.logliks == pytest.approx(expected[row.task, row.item].logliks, abs=1e-5)
        assert dict(row.metrics) == pytest.approx(dict(expected[row.task, row.item].metrics), abs=1e-5)
    assert [row.item for row in part] == subset * 3


def test_scoring_twice_gives_the_same_bits(pico: Any) -> None:
    tasks = {("pico_choice", "test"): planned(pico, "pico_choice", range(40))}
    scorer = Scorer(resident(pico.model("left")), tasks)  # type: ignore[arg-type]
    items = {("pico_choice", "test"): range(40)}
    assert scorer.score(items) == scorer.score(items)  # type: ignore[arg-type]


def test_generation_without_generating_has_an_objective_and_no_metric(pico: Any) -> None:
    tasks = {("pico_write", "test"): planned(pico, "pico_write", range(5))}
    scorer = Scorer(resident(pico.model("left")), tasks)  # type: ignore[arg-type]
    rows, _ = scorer.score({("pico_write", "test"): range(5)}, generate=False)
    assert all(row.metrics == {} and row.objective is not None and 0 < row.objective < 1 for row in rows)


@pytest.mark.parametrize("engine", ["tree", "plain"])
def test_out_of_memory_halves_the_batch_and_goes_on(
    engine: str, pico: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = resident(pico.model("left"), rows=32, engine=engine, max_tokens=256)
    tasks = {("pico_choice", "test"): planned(pico, "pico_choice", range(40))}
    scorer = Scorer(lm, tasks)  # type: ignore[arg-type]
    items = {("pico_choice", "test"): range(40)}
    expected, _ = scorer.score(items)  # type: ignore[arg-type]
    forward = lm.model.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        shape = kwargs["input_ids"].shape
        if shape[0] > 8 or shape[1] > 64:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", limited)
    rows, events = scorer.score(items)  # type: ignore[arg-type]
    halved = {"tree": ["128", "64"], "plain": ["16", "8"]}[engine]
    assert [e.split(" (")[0] for e in events] == [f"out of memory: batch halved to {n}" for n in halved]
    assert [row.metrics for row in rows] == [row.metrics for row in expected]


def test_a_broken_model_is_an_error_that_names_the_item(pico: Any) -> None:
    import torch

    lm = resident(pico.model("left"))
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    tasks = {("pico_choice", "test"): planned(pico, "pico_choice", range(4))}
    with pytest.raises(
        EvaluationError,
        match=r"task 'pico_choice', item 0: log-likelihood is not finite.*first at layer 1 \(mlp\.up_proj",
    ):
        Scorer(lm, tasks).score({("pico_choice", "test"): range(4)})  # type: ignore[arg-type]


def test_a_changed_data_set_is_noticed(pico: Any) -> None:
    source = Catalogue(pico.tasks).load("pico_choice")
    source.set_fewshot(0)
    with pytest.raises(EvaluationError, match="item 0 is not the one that the lock names"):
        build_requests(source, "test", [0], PromptSpec(), {0: "0" * 64})
    with pytest.raises(EvaluationError, match="item 500 does not exist; the split has 120 items"):
        build_requests(source, "test", [500], PromptSpec())


def test_names_that_do_not_exist_are_refused_with_the_nearest(pico: Any) -> None:
    source = Catalogue(pico.tasks).load("pico_choice")
    with pytest.raises(RecipeError, match=r"does not produce metric 'accuracy'; .*valid: acc, acc,none"):
        source.metric("accuracy")
    with pytest.raises(RecipeError, match="has no split 'tset'; did you mean 'test'"):
        source.docs("tset")
    with pytest.raises(RecipeError, match="no such folder"):
        Catalogue(pico.folder / "missing")


def test_what_a_task_says_of_an_item_is_asked_once(pico: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.utils

    tasks = {("pico_choice", "test"): planned(pico, "pico_choice", range(20))}
    scorer = Scorer(resident(pico.model("left")), tasks)  # type: ignore[arg-type]
    items = {("pico_choice", "test"): range(20)}
    expected = scorer.score(items)  # type: ignore[arg-type]

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("a template is rendered again")

    monkeypatch.setattr(lm_eval.utils, "apply_template", refuse)
    assert scorer.score(items) == expected  # type: ignore[arg-type]
    task = tasks["pico_choice", "test"].source.task
    choices = task.doc_to_choice(tasks["pico_choice", "test"].requests[0].doc)
    choices.clear()  # an answer that somebody changes is theirs alone
    assert scorer.score(items) == expected  # type: ignore[arg-type]


def test_generation_is_counted_as_work(pico: Any) -> None:
    tasks = {("pico_write", "test"): planned(pico, "pico_write", range(5))}
    scorer = Scorer(resident(pico.model("left")), tasks)  # type: ignore[arg-type]
    scorer.score({("pico_write", "test"): range(5)}, generate=False)
    before = scorer.lm.work.tokens
    scorer.score({("pico_write", "test"): range(5)}, generate=False)
    teacher_forced = scorer.lm.work.tokens - before
    before = scorer.lm.work.tokens
    scorer.score({("pico_write", "test"): range(5)})
    assert scorer.lm.work.tokens - before >= teacher_forced + 5


def test_a_memory_limit_makes_passes_small_and_changes_no_metric(
    pico: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {("pico_choice", "test"): planned(pico, "pico_choice", range(40))}
    items = {("pico_choice", "test"): range(40)}
    expected, _ = Scorer(resident(pico.model("left")), tasks).score(items)  # type: ignore[arg-type]
    # what is left of a real limit moves by more than a pico model needs, so that number alone is given
    left = forward_bytes(pico_config(pico), torch.float32, 40, 40, logit_bytes=4)
    monkeypatch.setattr(MemoryLimit, "left", lambda limit: left)
    tight = resident(pico.model("left"), memory_limit=1 << 40)
    assert ", 40 tokens" in tight.engine_words()
    found, _ = Scorer(tight, tasks).score(items)  # type: ignore[arg-type]
    assert [row.metrics for row in found] == [row.metrics for row in expected]


def test_a_memory_limit_that_is_used_up_is_an_error(pico: Any) -> None:
    with pytest.raises(EvaluationError, match=r"memory limit of .*raise the limit"):
        resident(pico.model("left"), memory_limit=1 << 20)


def pico_config(pico: Any) -> Any:
    return transformers.AutoConfig.from_pretrained(pico.model("left"))
