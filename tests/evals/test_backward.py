"""Gradients of the smooth objective: the scorer's values, and finite differences of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.errors import EvaluationError
from shoal.evals.backward import Backward
from shoal.evals.catalogue import Catalogue
from shoal.evals.quiet import quiet_libraries
from shoal.evals.requests import PromptSpec, build_requests
from shoal.evals.resident import ResidentLM
from shoal.evals.scorer import PlannedTask, Scorer
from shoal.merge.runtime import load_runtime
from shoal.tokenizer import load_tokenizer

ITEMS = (3, 17, 50, 51, 119)
NAMES = ("pico_choice", "pico_next", "pico_write", "pico_read")


@pytest.fixture(scope="module")
def tasks(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, PlannedTask]:
    """The tasks of pico, with two-shot prompts of differing lengths, and one that scores whole texts (rolling)."""
    folder = tmp_path_factory.mktemp("read")
    read = json.loads((pico.tasks / "pico_next.yaml").read_text()) | {
        "task": "pico_read",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{word}}:{{options[0]}} {{options[1]}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    (folder / "pico_read.yaml").write_text(json.dumps(read))
    found = {}
    for name in NAMES:
        source = Catalogue(folder if name == "pico_read" else pico.tasks).load(name)
        source.set_fewshot(0 if name == "pico_read" else 2)
        found[name, "search"] = PlannedTask(
            source, build_requests(source, source.eval_split, range(120), PromptSpec())
        )
    return found


def resident(folder: Path, dtype: str = "float32", **options: Any) -> ResidentLM:
    with quiet_libraries():
        return ResidentLM(load_runtime(folder, dtype), load_tokenizer(folder), 32, **options)


class Sums:
    """What a backward pass hands over, summed per parameter; and how often it did."""

    def __init__(self, model: Any) -> None:
        self.names = {p.data_ptr(): n for n, p in model.named_parameters()}
        self.sums: dict[str, torch.Tensor] = {}
        self.handed = 0

    def take(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        self.handed += 1
        name = self.names[parameter.data_ptr()]
        self.sums[name] = self.sums.get(name, 0) + gradient.double()


def counts_of() -> dict[int, float]:
    return {item: 0.1 + 0.2 * place for place, item in enumerate(ITEMS)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ["tree", "plain"])
def test_values_are_the_scorers(pico: Any, tasks: dict[Any, PlannedTask], name: str, engine: str) -> None:
    lm = resident(pico.model("left"), engine=engine)
    rows, _ = Scorer(lm, tasks).score({(name, "search"): ITEMS}, generate=False)
    values = Backward(lm, tasks).run((name, "search"), counts_of(), Sums(lm.model).take)
    assert values == pytest.approx({row.item: row.objective for row in rows}, abs=1e-6)
    assert all(0 < value < 1 for value in values.values())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(pico: Any, tasks: dict[Any, PlannedTask], name: str) -> None:
    """Along a random direction of every parameter alone, in a model that computes in float64."""
    lm = resident(pico.model("left"), "float64", engine="plain")
    key, counts = (name, "search"), counts_of()
    scorer, sums = Scorer(lm, tasks), Sums(lm.model)
    Backward(lm, tasks).run(key, counts, sums.take)
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for parameter_name, parameter in lm.model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        expected = float((sums.sums[parameter_name] * direction).sum())
        ends, step = [], 0.03  # the scorer's log-softmax is in float32
        for sign in (1, -1):
            parameter.add_(direction, alpha=sign * step)
            lm.forget()
            rows, _ = scorer.score({key: ITEMS}, generate=False)
            ends.append(sum(counts[row.item] * row.objective for row in rows if row.objective is not None))
            parameter.sub_(direction, alpha=sign * step)
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=2e-2, abs=3e-5)
        checked += abs(expected) > 3e-4
    assert checked > 10


def test_batches_do_not_change_the_gradient(pico: Any, tasks: dict[Any, PlannedTask]) -> None:
    lm = resident(pico.model("left"), "float64", engine="plain")
    key = ("pico_choice", "search")
    one, many = Backward(lm, tasks), Backward(lm, tasks)
    whole, parts = Sums(lm.model), Sums(lm.model)
    first = one.run(key, counts_of(), whole.take)
    while many.shrink():
        pass
    second = many.run(key, counts_of(), parts.take)
    parameters = len(list(lm.model.parameters()))
    assert whole.handed in (parameters, 2 * parameters) and parts.handed == len(ITEMS) * parameters
    assert first == pytest.approx(second, abs=1e-9)
    for name, gradient in whole.sums.items():
        assert torch.allclose(gradient, parts.sums[name], rtol=1e-6, atol=1e-9)


def test_the_model_is_left_as_it_was(pico: Any, tasks: dict[Any, PlannedTask]) -> None:
    """Also where the pass breaks off; scoring after it gives the same numbers."""
    lm = resident(pico.model("left"))
    key = ("pico_next", "search")
    before, _ = Scorer(lm, tasks).score({key: ITEMS})

    def broken(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        raise EvaluationError("enough")

    with pytest.raises(EvaluationError, match="enough"):
        Backward(lm, tasks).run(key, counts_of(), broken)
    for parameter in lm.model.parameters():
        assert (
            parameter.grad is None
            and not parameter.requires_grad
            and not parameter._post_accumulate_grad_hooks
        )
    assert Scorer(lm, tasks).score({key: ITEMS})[0] == before


def test_bfloat16_weights_have_gradients_too(pico: Any, tasks: dict[Any, PlannedTask]) -> None:
    key = ("pico_choice", "search")
    exact, rough = resident(pico.model("left")), resident(pico.model("left"), "bfloat16")
    found = []
    for lm in (exact, rough):
        sums = Sums(lm.model)
        Backward(lm, tasks).run(key, counts_of(), sums.take)
        found.append(torch.cat([sums.sums[n].reshape(-1) for n in sorted(sums.sums)]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.95


def test_an_item_that_is_not_finite_or_has_no_answer_is_an_error(
    pico: Any, tasks: dict[Any, PlannedTask]
) -> None:
    lm = resident(pico.model("left"))
    lm.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="task 'pico_next', item 119: its objective is not finite"):
        Backward(lm, tasks).run(("pico_next", "search"), {119: 1.0}, lambda parameter, gradient: None)
    write = tasks["pico_write", "search"]
    no_answer = PlannedTask(write.source, {3: replace(write.requests[3], gold=None)})
    with pytest.raises(EvaluationError, match="item 3: has no smooth objective to differentiate"):
        Backward(lm, {("pico_write", "search"): no_answer}).run(
            ("pico_write", "search"), {3: 1.0}, lambda parameter, gradient: None
        )
