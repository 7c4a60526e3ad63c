"""lm-eval's model `shoal`: known by a light import, and taking what `hf` takes."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.evals import registry
from shoal.evals.quiet import quiet_libraries

TASKS = ["pico_choice", "pico_next", "pico_write"]


def evaluated(pico: Any, model: str, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    with quiet_libraries():
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=TASKS,
            device="cpu",
            limit=40,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(pico.tasks), include_defaults=False),
            **options,
        )
    return dict(results or {})


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for task in TASKS:
        metrics = {k: v for k, v in expected["results"][task].items() if "," in k}
        assert {k: found["results"][task][k] for k in metrics} == pytest.approx(metrics, abs=1e-4)
        for ours, theirs in zip(found["samples"][task], expected["samples"][task], strict=True):
            assert ours["prompt_hash"] == theirs["prompt_hash"]
            if task == "pico_write":
                assert ours["resps"] == theirs["resps"]
            else:
                values = [r[0][0] for r in theirs["resps"]]
                assert [r[0][0] for r in ours["resps"]] == pytest.approx(values, abs=1e-4)


def test_importing_the_package_registers_the_model_and_nothing_heavy() -> None:
    code = (
        "import sys, shoal.evals; from lm_eval.api.registry import model_registry as known;"
        "print({'shoal', 'hf', 'vllm'} <= set(known), [m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"


def test_registering_again_changes_nothing() -> None:
    from lm_eval.api.registry import get_model, model_registry

    registry.register()
    found = get_model("shoal")
    registry.register()
    assert model_registry["shoal"] is found
    assert f"{found.__module__}:{found.__name__}" == registry.TARGET


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "max_length": 24, "add_bos_token": True, "revision": "main"},
        {"dtype": "float32", "trust_remote_code": False, "logits_cache": False, "truncation": True},
    ],
)
def test_it_takes_the_arguments_of_hf_and_gives_its_numbers(pico: Any, arguments: dict[str, Any]) -> None:
    arguments = {"pretrained": str(pico.model("left")), **arguments}
    expected = evaluated(pico, "hf", arguments, batch_size=16, num_fewshot=1)
    assert_same(evaluated(pico, "shoal", arguments, batch_size=16, num_fewshot=1), expected)


def test_a_model_object_and_its_tokenizer(pico: Any) -> None:
    from shoal.merge.runtime import load_runtime
    from shoal.tokenizer import load_tokenizer

    folder = pico.model("left")
    objects = {"pretrained": load_runtime(folder), "tokenizer": load_tokenizer(folder)}
    expected = evaluated(pico, "hf", {"pretrained": str(folder), "dtype": "float32"}, batch_size=16)
    assert_same(evaluated(pico, "shoal", objects, batch_size=16), expected)


def test_a_lora_adapter(pico: Any, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from shoal.merge.runtime import load_runtime

    torch.manual_seed(0)
    model = get_peft_model(
        load_runtime(pico.model("left")),  # type: ignore[arg-type]
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    model.save_pretrained(str(tmp_path))
    arguments = {"pretrained": str(pico.model("left")), "peft": str(tmp_path), "dtype": "float32"}
    expected = evaluated(pico, "hf", arguments, batch_size=16)
    assert_same(evaluated(pico, "shoal", arguments, batch_size=16), expected)
    plain = evaluated(pico, "shoal", arguments | {"peft": None}, batch_size=16)
    assert plain["samples"]["pico_choice"][0]["resps"] != expected["samples"]["pico_choice"][0]["resps"]


def test_batch_size_auto_halves_when_memory_runs_out(pico: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    arguments = {"pretrained": str(pico.model("left")), "dtype": "float32", "max_batch_size": 32}
    expected = evaluated(pico, "shoal", arguments, batch_size=4)
    forward: Any = LlamaForCausalLM.forward
    refused: list[int] = []

    @functools.wraps(forward)
    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        size = kwargs["input_ids"].numel()
        if size > 128:
            refused.append(size)
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", limited)
    assert_same(evaluated(pico, "shoal", arguments, batch_size="auto"), expected)
    assert refused
