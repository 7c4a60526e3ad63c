"""Passes abreast: the same numbers, trunks that are waited for, and no thread left behind when one fails."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from shoal.evals import abreast
from shoal.evals.abreast import Abandoned, Trunks, run
from shoal.evals.engine import PlainEngine, TreeEngine, compare
from shoal.evals.tree import Scored


def model_of(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def requests(count: int = 40) -> list[Scored]:
    """Items of different lengths after one long prompt."""
    draw = torch.Generator().manual_seed(1)

    def tokens(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 64, (size,), generator=draw).tolist())

    prompt = tokens(200)
    items = [(*prompt, *tokens(20 + 3 * number)) for number in range(count)]
    return [Scored((*item, option), (option, 5)) for item in items for option in (7, 9)]


def test_the_numbers_are_those_of_one_pass_after_the_other() -> None:
    model, sequences = model_of(), requests()
    one, two = TreeEngine(model, 4096, most=1), TreeEngine(model, 4096, most=2)
    assert (one.abreast, two.abreast) == (1, 2)
    assert two.plan(sequences).batches % 2 == 0
    alone, beside = one.score(sequences), two.score(sequences)
    assert [x.value for x in beside] == pytest.approx([x.value for x in alone], abs=1e-4)
    assert [x.greedy for x in beside] == [x.greedy for x in alone]
    again = two.score(sequences)
    assert again == beside  # to the last bit: who is first decides nothing
    assert compare(two, PlainEngine(model, 4), sequences) is None
    assert model.config._attn_implementation != "shoal_tree"
    assert "forward" not in model.lm_head.__dict__


def test_a_smaller_budget_means_fewer_passes_at_once() -> None:
    engine = TreeEngine(model_of(), most=2)
    assert engine.budget == 2 * abreast.PASS
    assert engine.shrink() == abreast.PASS
    assert engine.abreast == 1
    assert "at once" not in engine.words()


def test_small_models_and_rotations_with_a_state_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert abreast.useful(model_of()) == 1
    monkeypatch.setattr(abreast, "LEAST_FLOP", 1.0)
    assert abreast.useful(model_of()) == 4
    scaled = model_of(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert abreast.useful(scaled) == 1


def key_values() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1), torch.ones(1)


def test_what_a_pass_beside_computes_is_waited_for() -> None:
    trunks = Trunks()

    def compute(number: int) -> float:
        if number == 0:
            time.sleep(0.05)  # the other one asks before
            trunks[0, 7] = key_values()
            return 0.0
        return float(trunks[0, 7][0])

    assert list(run(compute, [0, 1], trunks, 2)) == [0.0, 1.0]


@pytest.mark.parametrize("passes", [[0], [0, 1], [0, 1, 2]])
def test_what_nobody_computes_is_not_waited_for(passes: list[int]) -> None:
    trunks = Trunks()
    with pytest.raises(Abandoned, match="no pass computes trunk 7"):
        list(run(lambda _: trunks[0, 7], passes, trunks, 2))


def test_the_first_error_is_raised_and_no_thread_stays() -> None:
    trunks = Trunks()
    threads = torch.get_num_threads()

    def compute(number: int) -> int:
        if number == 1:
            raise MemoryError("out of memory")
        if number > 1:
            return int(trunks[0, 7][0])  # of pass 1
        return number

    found = run(compute, [0, 1, 2, 3], trunks, 2)
    assert next(found) == 0
    with pytest.raises(MemoryError):
        next(found)
    assert not [t for t in threading.enumerate() if t.name.startswith("shoal-pass")]
    assert torch.get_num_threads() == threads
    # and the next candidate is computed
    trunks.clear()
    assert list(run(lambda number: number, [0, 1], trunks, 2)) == [0, 1]
