from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.errors import CheckpointError
from shoal.merge import Adapter, Checkpoint, Merger, load_runtime, open_parent, tensor_groups, weights_sha256
from shoal.merge.adapter import BASE_HASH, WEIGHTS, low_rank

Train = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """An adapter in peft's format on a base, with random factors in place of trained ones."""

    def make(base: Path, name: str = "adapter", **settings: Any) -> Path:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(9)
        config = LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 12} | settings))
        model = get_peft_model(load_runtime(base), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key or "modules_to_save" in key:
                    parameter.normal_(std=0.05)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_runtime(base), adapter).merge_and_unload()
    return dict(merged.named_parameters())


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llamas", {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llamas", {"target_modules": ["v_proj"], "use_rslora": True}),
    "transposed": ("gpt2s", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "dora": ("llamas", {"target_modules": ["q_proj"], "use_dora": True}),
    "saved module": ("llamas", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "rank pattern": ("llamas", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}}),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_adapter_is_what_peft_makes_of_it(kind, request, train):
    family, settings = SETTINGS[kind]
    base = request.getfixturevalue(family)[0]
    adapter = train(base, **settings)
    parent = open_parent(base, adapter)
    assert isinstance(parent, Adapter)
    assert bool(parent._factors) == (kind in ("plain", "rslora", "transposed"))
    expected = by_peft(base, adapter)
    changed = 0
    for name in parent.names:
        tensor = parent.tensor(name)
        assert tensor.dtype == parent.dtype(name)
        assert tuple(tensor.shape) == parent.shape(name)
        changed += not torch.equal(tensor, Checkpoint.open(base).tensor(name))
        assert float((tensor - expected[name]).abs().max()) <= 1e-6, name
    assert changed >= 2


def test_low_rank_bits_do_not_depend_on_threads():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 300, generator=generator), torch.randn(200, 8, generator=generator)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(low_rank(a, b, 0.5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], (b.double() @ a.double()).float() * 0.5, rtol=1e-4, atol=1e-5)


def test_adapters_merge_like_models(llamas, train, make_plan):
    first = train(llamas[0], "first", target_modules=["q_proj"])
    second = train(llamas[0], "second", target_modules=["q_proj", "v_proj"], r=2)
    base = Checkpoint.open(llamas[0])
    parents = [base, open_parent(llamas[0], first), open_parent(llamas[0], second)]
    groups = tensor_groups(base)
    for operator in ("task_arithmetic", "model_stock"):
        plan = make_plan(
            groups,
            operator,
            models=3,
            source_parameters=(lambda g, s: {}) if operator == "model_stock" else None,
        )
        model = load_runtime(llamas[0])
        merger = Merger(parents, groups, model)
        assert merger.notes == []
        merger.materialize(plan)
        streamed = dict(merger.tensors(plan))
        q, k = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")
        assert not torch.equal(streamed[q], base.tensor(q))
        assert torch.equal(streamed[k], base.tensor(k))
        assert weights_sha256(model.named_parameters()) == weights_sha256(streamed.items())


def test_an_adapter_may_stand_first(llamas, train, make_plan):
    parents = [
        open_parent(llamas[0], train(llamas[0], target_modules=["q_proj"])),
        Checkpoint.open(llamas[1]),
    ]
    groups = tensor_groups(parents[0])
    merger = Merger(parents, groups, load_runtime(llamas[0]))
    assert merger.notes == []


def test_an_adapter_of_other_weights_is_refused(llamas, train):
    adapter = train(llamas[0], target_modules=["q_proj"])
    base = Checkpoint.open(llamas[0])
    trained_on = weights_sha256((n, base.tensor(n)) for n in base.names)
    (adapter / BASE_HASH).write_text(json.dumps({"weights_sha256": trained_on}))
    open_parent(llamas[0], adapter)
    with pytest.raises(
        CheckpointError, match=f"trained on a base with weights_sha256 {trained_on}, but .* has [0-9a-f]"
    ):
        open_parent(llamas[1], adapter)


def test_adapters_that_cannot_be_used(llamas, gpt2s, train, tmp_path, small_llama):
    adapter = train(llamas[0], target_modules=["q_proj"])
    with pytest.raises(
        CheckpointError, match=r"changes module 'model\.layers\.0\.self_attn\.q_proj', but .* has no tensor"
    ):
        open_parent(gpt2s[0], adapter)
    small_llama(hidden=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"make a \(32, 32\) matrix, but .* has \(64, 64\)"):
        open_parent(tmp_path / "wide", adapter)
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        open_parent(llamas[0], llamas[1])
    with pytest.raises(CheckpointError, match="no such model folder"):
        open_parent(tmp_path / "gone", adapter)
    empty = Path(shutil.copytree(adapter, tmp_path / "empty"))
    (empty / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors; only safetensors are read"):
        open_parent(llamas[0], empty)


def test_a_half_of_a_pair_is_not_ignored(llamas, train):
    adapter = train(llamas[0], target_modules=["q_proj"])
    weights = load_file(adapter / WEIGHTS)
    weights.pop(next(k for k in weights if "lora_B" in k))
    save_file(weights, adapter / WEIGHTS)
    with pytest.raises(CheckpointError, match="without its other factor"):
        open_parent(llamas[0], adapter)
