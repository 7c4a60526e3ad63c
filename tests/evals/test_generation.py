"""Generation: the tokens that transformers' own generate makes, whatever runs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.errors import EvaluationError
from shoal.evals.attention import Unsupported
from shoal.evals.engine import PlainEngine, TreeEngine, compare
from shoal.evals.generation import Generator, Request, Sampling
from shoal.evals.tree import Scored

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 9},
}


def network(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **KINDS.get(kind, {}), tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # clear winners among the next tokens
    return model


def never(tokens: Sequence[int]) -> bool:
    return False


def prompts_of(count: int) -> list[tuple[int, ...]]:
    lead = tuple((7 * k) % 60 + 2 for k in range(70))
    found = []
    for i in range(count):
        tail = tuple((11 * i + 5 * k) % 60 + 2 for k in range(1 + i % 9))
        found.append((*lead, *tail) if i % 3 else (*lead[:20], *tail))
    return [*found, lead, (5,)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind: str) -> None:
    model = network(kind)
    prompts = prompts_of(12)
    requests = [Request(p, 5 + i, never) for i, p in enumerate(prompts)]
    made = Generator(model, [1], slots=4, budget=60).generate(requests)
    for prompt, request, tokens in zip(prompts, requests, made, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=request.most,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert tokens == expected


def test_end_tokens_and_stops_end_a_sequence() -> None:
    model = network("llama")
    prompt = prompts_of(1)[0]
    (free,) = Generator(model, []).generate([Request(prompt, 12, never)])
    end = next(t for n, t in enumerate(free) if n and t not in free[:n])
    at = free.index(end)
    assert Generator(model, [end]).generate([Request(prompt, 12, never)]) == [free[: at + 1]]
    stopped = Generator(model, []).generate([Request(prompt, 12, lambda tokens: end in tokens)])
    assert stopped == [free[: at + 1]]


def test_samples_do_not_depend_on_what_runs_beside_them() -> None:
    model = network("llama")
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=3)
    requests = [Request(p, 10, never, sampling, number) for p in prompts_of(6) for number in range(3)]
    together = Generator(model, [], slots=16).generate(requests)
    alone = [Generator(model, [], slots=1).generate([r])[0] for r in requests]
    assert together == alone
    assert len({tuple(t) for t in together[:3]}) == 3  # samples of one prompt differ
    other = Request(requests[0].prompt, 10, never, Sampling(temperature=1.5, seed=4))
    assert Generator(model, []).generate([other])[0] != together[0]


def test_draws_follow_the_probabilities() -> None:
    model = network("llama")
    prompt = (5, 9, 3)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    expected = torch.softmax(logits / 30, dim=-1)
    count = 3000
    requests = [Request(prompt, 1, never, Sampling(temperature=30.0, seed=1), n) for n in range(count)]
    drawn = torch.bincount(
        torch.tensor([t[0] for t in Generator(model, [], slots=500).generate(requests)]), minlength=64
    )
    error = (drawn.double() / count - expected).abs()
    assert float((error / (expected * (1 - expected) / count).sqrt()).max()) < 4.5


def test_a_repetition_penalty_is_that_of_transformers() -> None:
    model = network("llama")
    prompt = prompts_of(1)[0]
    (made,) = Generator(model, []).generate([Request(prompt, 12, never, Sampling(repetition_penalty=1.8))])
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.8,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    assert made == expected


def test_a_model_with_attention_of_its_own_is_batched_plainly() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4, use_mambapy=False
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(Unsupported, match="has attention of its own"):
        Generator(model, []).generate([Request((1, 2, 3), 2, never)])


def test_a_tree_that_gives_other_numbers_is_not_used() -> None:
    model = network("gemma2")
    sequences = [Scored((*range(2, 50), k), (3,)) for k in range(5)]
    tree, plain = TreeEngine(model), PlainEngine(model, 8)
    assert compare(tree, plain, sequences) is None
    for layer in model.model.layers:  # now the tree is told of no window, and the model still has one
        layer.self_attn.sliding_window = None
    reason = compare(TreeEngine(model), plain, sequences)
    assert reason is not None and "where plain batches give" in reason


def test_out_of_slots_memory_is_halved() -> None:
    generator = Generator(network("llama"), [], slots=4)
    assert [generator.shrink() for _ in range(3)] == [2, 1, 0]


def test_sampling_without_a_seed_is_refused(pico: Any) -> None:
    from lm_eval.api.instance import Instance

    from shoal.evals.resident import ResidentLM

    lm = ResidentLM(pretrained=str(pico.model("left")), device="cpu", dtype="float32")
    arguments = {"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0}
    request = Instance("generate_until", {}, ("a b", arguments), 0)
    with pytest.raises(EvaluationError, match="needs a seed, or nobody can repeat it"):
        lm.generate_until([request])
    arguments["seed"] = 1
    assert lm.generate_until([request]) == lm.generate_until([request])
