from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shoal.merge import Checkpoint, tensor_groups


def test_llama_groups_in_order(llamas):
    notes: list[str] = []
    groups = tensor_groups(Checkpoint.open(llamas[0]), notes)
    assert [g.name for g in groups] == [
        "embed",
        *(f"layers.{i}.{kind}" for i in range(2) for kind in ("attn", "mlp", "norm")),
        "norm",
        "head",
    ]
    by_name = {g.name: g for g in groups}
    assert by_name["layers.1.norm"].tensors == (
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    )
    assert (by_name["layers.1.mlp"].layer, by_name["layers.1.mlp"].kind) == (1, "mlp")
    assert by_name["head"].tensors == ("lm_head.weight",)
    assert notes == []


@pytest.mark.parametrize("family", ["llamas", "tied_llamas", "gpt2s", "mixtrals"])
def test_every_tensor_is_in_exactly_one_group_known_to_mergekit_or_not(family, request, tmp_path):
    path = request.getfixturevalue(family)[0]
    known = tensor_groups(Checkpoint.open(path))
    assert sorted(t for g in known for t in g.tensors) == list(Checkpoint.open(path).names)
    assert ("head" in {g.name for g in known}) == (family in ("llamas", "mixtrals"))

    folder = Path(shutil.copytree(path, tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    notes: list[str] = []
    by_names = tensor_groups(Checkpoint.open(folder), notes)
    assert {g.name: set(g.tensors) for g in by_names} == {g.name: set(g.tensors) for g in known}
    assert notes == ["OddForCausalLM: unknown to mergekit; tensor groups come from tensor names"]


def test_gpt2_parts(gpt2s):
    by_name = {g.name: g.tensors for g in tensor_groups(Checkpoint.open(gpt2s[0]))}
    assert by_name["embed"] == ("transformer.wte.weight", "transformer.wpe.weight")
    assert set(by_name["layers.0.norm"]) == {
        f"transformer.h.0.ln_{i}.{w}" for i in (1, 2) for w in ("weight", "bias")
    }
    assert by_name["norm"] == ("transformer.ln_f.weight", "transformer.ln_f.bias")
    assert all(".attn." in t for t in by_name["layers.1.attn"])


def test_experts_belong_to_the_mlp(mixtrals):
    by_name = {g.name: g.tensors for g in tensor_groups(Checkpoint.open(mixtrals[0]))}
    assert len(by_name["layers.0.mlp"]) == 3 * 3 + 1
    assert all("block_sparse_moe" in t for t in by_name["layers.0.mlp"])
