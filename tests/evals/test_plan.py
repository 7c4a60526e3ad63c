"""The evaluation plan: saved once, used again, made anew when anything that decides token ids has changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.evals.catalogue import Catalogue
from shoal.evals.plan import cost, instances, prepare
from shoal.evals.quiet import quiet_libraries
from shoal.evals.requests import PromptSpec, build_requests
from shoal.evals.resident import ResidentLM
from shoal.evals.scorer import PlannedTask, Scorer

NAMES = ("pico_choice", "pico_next", "pico_write")


def model(pico: Any, **options: Any) -> ResidentLM:
    with quiet_libraries():
        return ResidentLM(pretrained=str(pico.model("left")), device="cpu", dtype="float32", **options)


def planned(pico: Any, items: Sequence[int], shots: int = 2) -> Any:
    tasks = {}
    for name in NAMES:
        source = Catalogue(pico.tasks).load(name)
        source.set_fewshot(shots)
        tasks[name, "test"] = PlannedTask(
            source, build_requests(source, source.eval_split, items, PromptSpec())
        )
    return tasks


def test_a_template_is_compiled_once_for_all_items(pico: Any, monkeypatch: Any) -> None:
    from lm_eval.utils import env

    source = Catalogue(pico.tasks).load("pico_choice")
    made, before = list[str](), env.from_string
    monkeypatch.setattr(env, "compile", _counting(env.compile, made))
    assert len(build_requests(source, source.eval_split, range(20), PromptSpec())) == 20
    assert len(made) == len(set(made)) > 0
    assert env.from_string == before


def _counting(function: Any, given: list[str]) -> Any:
    def counted(source: str, *args: Any, **kwargs: Any) -> Any:
        given.append(source)
        return function(source, *args, **kwargs)

    return counted


def test_a_plan_is_written_once_and_used_again(pico: Any, tmp_path: Path, monkeypatch: Any) -> None:
    tasks, file = planned(pico, range(20)), tmp_path / "plan.safetensors"
    items = {key: range(20) for key in tasks}
    first = model(pico)
    assert prepare(first, tasks, file) is False
    written = file.read_bytes()
    expected = Scorer(first, tasks).score(items)  # type: ignore[arg-type]

    again = model(pico)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(again, "_encode_pair", refuse)
        patch.setattr(again, "tok_batch_encode", refuse)
        assert prepare(again, tasks, file) is True
        again.settle(list(instances(tasks)))
        assert Scorer(again, tasks).score(items) == expected  # type: ignore[arg-type]
    assert file.read_bytes() == written


def test_other_texts_or_another_tokenisation_make_a_new_plan(pico: Any, tmp_path: Path) -> None:
    file = tmp_path / "plan.safetensors"
    prepare(model(pico), planned(pico, range(20)), file)
    written = file.read_bytes()
    assert prepare(model(pico), planned(pico, range(20), shots=1), file) is False
    assert file.read_bytes() != written
    assert prepare(model(pico, add_bos_token=True), planned(pico, range(20), shots=1), file) is False
    file.write_bytes(file.read_bytes()[:100])  # cut off
    assert prepare(model(pico), planned(pico, range(20), shots=1), file) is False
    assert prepare(model(pico), planned(pico, range(20), shots=1), file) is True


def test_what_a_candidate_costs(pico: Any) -> None:
    tasks, lm = planned(pico, range(20)), model(pico)
    items: Any = {key: range(20) for key in tasks}
    lm.settle(list(instances(tasks)))
    found = cost(lm, tasks, items)
    before = lm.work.tokens
    lm.loglikelihood([i for i in instances(tasks) if i.request_type == "loglikelihood"])
    assert found.tokens == lm.work.tokens - before
    # two shots and options are shared; what is short is cheaper computed again in so small a model
    assert found.shared > found.tokens // 2
    assert found.generated > 0
    assert cost(lm, tasks, items, generate=False).generated == 0
    plain = cost(model(pico, engine="plain"), tasks, items)
    assert plain.shared == 0 and plain.tokens > found.tokens
