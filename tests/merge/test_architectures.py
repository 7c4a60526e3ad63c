"""One merge for every architecture: groups, mergekit's own result, and the map into the runtime model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.merge import (
    Checkpoint,
    Merger,
    check_compatible,
    check_tokenizers,
    load_runtime,
    merge_mergekit_config,
    open_parent,
    tensor_groups,
    to_mergekit,
    write_model,
)
from shoal.merge.checkpoint import INDEX, SINGLE
from shoal.merge.mergekit_bridge import write_config
from shoal.merge.mergekit_plain import plan_plain
from shoal.merge.runtime_map import _converted, _follow, _Made, _tiles, runtime_map
from shoal.types import MergePlan

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}


@dataclass(frozen=True)
class Architecture:
    """A tiny model: its configuration, and how many tensors a layer has in its groups (attn, mlp, norm)."""

    kind: str  # transformers' model_type
    per_layer: tuple[int, int, int]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    experts: int = 0


ARCHITECTURES = {
    "Llama": Architecture("llama", (4, 3, 2), GROUPED),
    "Mistral": Architecture("mistral", (4, 3, 2), GROUPED),
    "Qwen2": Architecture("qwen2", (7, 3, 2), GROUPED, tied=True),
    "Qwen3": Architecture("qwen3", (4, 3, 4), HEADS, tied=True),
    "Gemma 2": Architecture("gemma2", (4, 3, 4), HEADS, tied=True),
    "Gemma 3": Architecture("gemma3_text", (4, 3, 6), HEADS, tied=True),
    "Phi-3": Architecture("phi3", (2, 2, 2), GROUPED),
    "GPT-2": Architecture("gpt2", (4, 4, 4), tied=True),
    "GPT-NeoX": Architecture("gpt_neox", (4, 4, 4)),
    "OLMo2": Architecture("olmo2", (4, 3, 4), GROUPED),
    "Mixtral": Architecture("mixtral", (4, 10, 2), {**GROUPED, "num_local_experts": 3}, experts=3),
    "Qwen3-MoE": Architecture(
        "qwen3_moe", (4, 13, 4), {**HEADS, "num_experts": 4, "moe_intermediate_size": 16}, experts=4
    ),
    "BERT": Architecture("bert", (8, 4, 4)),
}
CAUSAL = [name for name in ARCHITECTURES if name != "BERT"]
# mergekit 0.1.5 has definitions of both and can use neither: for GPT-NeoX it wants buffers that transformers has not
# written for long (see the test of old checkpoints), for BERT it adds a tuple of aliases to a list
REFUSED = ["GPT-NeoX", "BERT"]
DENSE = [name for name, a in ARCHITECTURES.items() if not a.experts and name not in REFUSED]
MOE = [name for name, a in ARCHITECTURES.items() if a.experts]
Families = Callable[[str], list[Path]]


def model_of(architecture: Architecture, seed: int = 0) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture.kind, **{**SIZES, **architecture.sizes}, tie_word_embeddings=architecture.tied
    )
    return (AutoModel if architecture.kind == "bert" else AutoModelForCausalLM).from_config(config)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory, save_family: Callable[..., list[Path]]) -> Families:
    """base, m1, m2 of an architecture, made when first asked for."""
    made: dict[str, list[Path]] = {}

    def get(name: str) -> list[Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(ARCHITECTURES[name].kind)
            made[name] = save_family(folder, lambda: model_of(ARCHITECTURES[name]), count=3)
        return made[name]

    return get


def opened(paths: Sequence[Path]) -> tuple[list[Any], Any]:
    parents = [Checkpoint.open(p) for p in paths]
    return parents, tensor_groups(parents[0])


def merged(plan: MergePlan, paths: Sequence[Path]) -> dict[str, Tensor]:
    return dict(Merger(*opened(paths)).tensors(plan))


def by_mergekit(plan: MergePlan, paths: Sequence[Path], folder: Path) -> Path:
    file = folder / "plan.yml"
    file.write_text(to_mergekit(plan, [str(p) for p in paths], parent=Checkpoint.open(paths[0])))
    merge_mergekit_config(file, folder / "mergekit")
    return folder / "mergekit"


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == torch.float32
        error = float((tensor - theirs[name]).abs().max())
        assert error <= 1e-6 * float(theirs[name].abs().max()), name


def written(plan: MergePlan, merger: Merger, paths: Sequence[Path], folder: Path) -> dict[str, Tensor]:
    """Parameters of the model that the written folder is loaded as."""
    write_model(folder, plan, merger, paths[0], paths[0])
    return dict(load_runtime(folder).named_parameters())


def assert_in_place_is_what_is_written(
    plan: MergePlan, merger: Merger, paths: Sequence[Path], folder: Path
) -> None:
    assert merger.model is not None
    merger.materialize(plan)
    expected = written(plan, merger, paths, folder)
    held = dict(merger.model.named_parameters())
    assert held.keys() == expected.keys()
    for name, parameter in held.items():
        assert torch.equal(parameter, expected[name]), name


def ties(group: int, source: int) -> dict[str, float]:
    return {"weight": 0.5 - 0.3 * source + 0.02 * group, "density": 0.3 + 0.2 * source}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_name_the_parts_of_every_layer(name, families):
    notes: list[str] = []
    base = Checkpoint.open(families(name)[0])
    groups = {g.name: g for g in tensor_groups(base, notes)}
    assert sorted(t for g in groups.values() for t in g.tensors) == list(base.names)
    layers = [f"layers.{i}.{kind}" for i in range(2) for kind in ("attn", "mlp", "norm")]
    # BERT's norms belong to its layers, and what stands at its end is the pooler
    outer = ["norm"] * (name != "BERT") + ["head"] * (not ARCHITECTURES[name].tied)
    assert list(groups) == ["embed", *layers, *outer]
    for i in range(2):
        sizes = tuple(len(groups[f"layers.{i}.{kind}"].tensors) for kind in ("attn", "mlp", "norm"))
        assert sizes == ARCHITECTURES[name].per_layer
    assert notes == []


NAMED = {
    "model.language_model.layers.1.self_attn.q_proj.weight": "layers.1.attn",
    "model.language_model.layers.1.mlp.vision_gate.weight": "layers.1.mlp",  # a part of a text layer
    "model.visual.blocks.1.attn.proj.weight": "other",
    "model.vision_tower.encoder.layers.0.layer_norm1.weight": "other",
    "audio_tower.layers.0.fc1.weight": "other",
    "multi_modal_projector.norm.weight": "other",
    "model.embed_vision.embedding.weight": "other",
    "transformer.tokens_embed.weight": "embed",
    "word_embeddings.weight": "embed",
    "embed_out.weight": "head",
    "head.weight": "head",
    "model.head_norm.weight": "norm",
    "cls.predictions.transform.dense.weight": "head",
}


def test_groups_from_names_alone(tmp_path):
    made_up = {"model_type": "shoalfish", "architectures": ["ShoalfishForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(made_up))
    save_file({name: torch.full((2,), float(i)) for i, name in enumerate(NAMED)}, tmp_path / SINGLE)
    notes: list[str] = []
    groups = tensor_groups(Checkpoint.open(tmp_path), notes)
    assert {name: g.name for g in groups for name in g.tensors} == NAMED
    components = ["audio_tower", "model.embed_vision", "model.vision_tower", "model.visual"]
    assert notes == [
        "ShoalfishForCausalLM: unknown to mergekit; tensor groups come from tensor names",
        *(
            f"component {c!r} is merged as a whole, in group 'other'"
            for c in (*components, "multi_modal_projector")
        ),
    ]


def test_vision_layers_are_no_text_layers(save_family, make_plan, tmp_path):
    """Qwen3.5 as published: unknown to mergekit, and only its language model is run."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text = {**SIZES, **HEADS, **linear, "layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 16}

    def make() -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
        return AutoModelForImageTextToText.from_config(config)

    paths = save_family(tmp_path, make, count=3)
    notes: list[str] = []
    parents = [Checkpoint.open(p) for p in paths]
    groups = tensor_groups(parents[0], notes)
    seen = [n for n in parents[0].names if n.startswith("model.visual.")]
    assert len(seen) > 20
    assert sorted(next(g.tensors for g in groups if g.name == "other")) == seen
    assert notes[1:] == ["component 'model.visual' is merged as a whole, in group 'other'"]
    merger = Merger(parents, groups, load_runtime(paths[0]))
    assert merger.notes == []
    plan = make_plan(groups, "ties", models=3, source_parameters=ties)
    assert_in_place_is_what_is_written(plan, merger, paths, tmp_path / "out")
    assert_close(merged(plan, paths), formula(plan, parents))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("operator", ["linear", "task_arithmetic", "ties"])
def test_the_merge_is_mergekits(operator, name, families, make_plan, tmp_path):
    paths = families(name)
    plan = make_plan(
        opened(paths)[1], operator, models=3, source_parameters=ties if operator == "ties" else None
    )
    assert_close(merged(plan, paths), stored(by_mergekit(plan, paths, tmp_path)))


def formula(plan: MergePlan, parents: Sequence[Any]) -> dict[str, Tensor]:
    """linear, task_arithmetic and ties (normalised, lambda 1) in float64; deltas are float32, as the methods rank them."""
    found: dict[str, Tensor] = {}
    for group in plan.groups:
        for name in group.tensors:
            base = parents[0].tensor(name)
            tensors = [parents[s.model].tensor(name) for s in group.sources]
            weights = [s.parameters["weight"] for s in group.sources]
            if group.operator == "linear":
                terms = [w * t.double() for w, t in zip(weights, tensors, strict=True)]
                found[name] = (sum(terms, torch.zeros(())) / sum(weights)).float()
                continue
            deltas = torch.stack([(t - base).double() for t in tensors])
            if group.operator == "ties":
                for delta, source in zip(deltas, group.sources, strict=True):
                    kept = int(source.parameters["density"] * delta.numel())
                    order = delta.abs().flatten().argsort(descending=True, stable=True)
                    delta.view(-1)[order[kept:]] = 0
            scale = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * base.dim())
            change = scale * deltas
            if group.operator == "ties":
                agrees = change.sign() == torch.where(change.sum(0) >= 0, 1.0, -1.0)
                total = (scale * agrees).sum(0)
                change = torch.where(agrees, change, 0.0) / torch.where(total == 0, 1.0, total)
            found[name] = (base.double() + change.sum(0)).float()
    return found


@pytest.mark.parametrize("name", [*REFUSED, "Llama"])
@pytest.mark.parametrize("operator", ["linear", "task_arithmetic", "ties"])
def test_the_merge_is_the_formulas_in_float64(operator, name, families, make_plan):
    parents, groups = opened(families(name))
    plan = make_plan(groups, operator, models=3, source_parameters=ties if operator == "ties" else None)
    assert_close(merged(plan, families(name)), formula(plan, parents))


@pytest.mark.parametrize("name", MOE)
def test_the_merge_of_experts_is_mergekits_once_loaded(name, families, make_plan, tmp_path):
    """mergekit fuses the experts of a layer first: other names, and one TIES threshold for all of them."""
    paths = families(name)
    parents, groups = opened(paths)
    plan = make_plan(groups, "task_arithmetic", models=3)
    theirs = dict(load_runtime(by_mergekit(plan, paths, tmp_path)).named_parameters())
    merger = Merger(parents, groups, load_runtime(paths[0]))
    merger.materialize(plan)
    assert merger.model is not None
    assert_close(dict(merger.model.named_parameters()), theirs)
    text = to_mergekit(make_plan(groups, "ties", models=3), ["a", "b", "c"], parent=parents[0])
    assert "mergekit fuses the experts" in text


@pytest.mark.parametrize("name", CAUSAL)
def test_a_direct_map_into_the_runtime_model(name, families, make_plan, tmp_path):
    paths = families(name)
    parents, groups = opened(paths)
    merger = Merger(parents, groups, load_runtime(paths[0]))
    assert merger.notes == []
    plan = make_plan(groups, "ties", models=3, source_parameters=ties)
    assert_in_place_is_what_is_written(plan, merger, paths, tmp_path / "out")


@pytest.mark.parametrize("name", CAUSAL)
def test_writing_the_mapped_views_is_loading_the_model(name, families):
    base, other = (Checkpoint.open(p) for p in families(name)[:2])
    model = load_runtime(base.path)
    places, reason = runtime_map(model, base)
    assert reason is None
    assert sorted(places) == list(base.names)
    for tensor, place in places.items():
        place.copy_(other.tensor(tensor))
    expected = dict(load_runtime(other.path).named_parameters())
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())


def test_experts_are_slices_of_the_fused_parameter(families):
    base = Checkpoint.open(families("Qwen3-MoE")[0])
    model = load_runtime(base.path)
    places, _ = runtime_map(model, base)
    held = dict(model.named_parameters())
    for layer, expert in ((0, 0), (0, 3), (1, 2)):
        prefix = f"model.layers.{layer}.mlp.experts"
        fused, down = held[f"{prefix}.gate_up_proj"], held[f"{prefix}.down_proj"]
        for part, expected in {
            "gate_proj": fused[expert, :16],
            "up_proj": fused[expert, 16:],
            "down_proj": down[expert],
        }.items():
            place = places[f"{prefix}.{expert}.{part}.weight"]
            assert place.data_ptr() == expected.data_ptr()
            assert place.shape == expected.shape


def test_experts_that_are_equal_have_places_of_their_own(save_family, make_plan, tmp_path):
    """An upcycled base: all experts are copies of one MLP, gate and up projection too."""

    def upcycled() -> Any:
        model = model_of(ARCHITECTURES["Mixtral"])
        with torch.no_grad():
            for layer in model.model.layers:
                experts = layer.mlp.experts
                experts.gate_up_proj.copy_(experts.gate_up_proj[:1, :48].repeat(3, 2, 1))
                experts.down_proj.copy_(experts.down_proj[:1].repeat(3, 1, 1))
        return model

    paths = save_family(tmp_path, upcycled, count=3)
    parents, groups = opened(paths)
    first, second = (f"model.layers.0.block_sparse_moe.experts.{e}.w{w}.weight" for e, w in ((0, 1), (2, 3)))
    assert torch.equal(parents[0].tensor(first), parents[0].tensor(second))
    merger = Merger(parents, groups, load_runtime(paths[0]))
    assert merger.notes == []
    plan = make_plan(groups, "ties", models=3, source_parameters=ties)
    assert_in_place_is_what_is_written(plan, merger, paths, tmp_path / "out")


def test_what_is_split_at_load_has_no_map_and_is_converted(save_family, make_plan, tmp_path):
    """HRM: one checkpoint tensor becomes several parameters, which no one view can be."""
    architecture = Architecture("hrm_text", (2, 2, 2), HEADS)
    paths = save_family(tmp_path, lambda: model_of(architecture), count=3)
    parents, groups = opened(paths)
    merger = Merger(parents, groups, load_runtime(paths[0]))
    (note,) = merger.notes
    assert "gqkv_proj.weight' is converted by Chunk at load" in note
    assert "converted by transformers and copied" in note
    plan = make_plan(groups, "task_arithmetic", models=3)
    assert_in_place_is_what_is_written(plan, merger, paths, tmp_path / "out")


def converter_cases() -> dict[str, tuple[Any, dict[str, tuple[int, ...]]]]:
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

    def case(operations: list[Any], **shapes: tuple[int, ...]) -> tuple[Any, dict[str, tuple[int, ...]]]:
        return WeightConverter([f"e.*.{part}" for part in shapes], "e.fused", operations), shapes

    return {
        "stack": case([MergeModulelist(dim=0)], a=(3, 4)),
        "stack inside": case([MergeModulelist(dim=-1)], a=(3, 4)),
        "stack and join": case([MergeModulelist(dim=0), Concatenate(dim=1)], a=(3, 4), b=(5, 4)),
        "stack and join within rows": case([MergeModulelist(dim=1), Concatenate(dim=-1)], a=(3, 4), b=(3, 2)),
        "join": case([Concatenate(dim=1)], a=(3, 4), b=(3, 2)),
        "stack and transpose": case([MergeModulelist(dim=0), Transpose(1, 2)], a=(3, 4)),
    }


@pytest.mark.parametrize("kind", converter_cases())
def test_places_are_where_transformers_itself_puts_the_tensors(kind):
    converter, shapes = converter_cases()[kind]
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    made: dict[Any, list[_Made]] = {}
    for pattern, (part, shape) in zip(converter.source_patterns, shapes.items(), strict=True):
        for expert in range(3):
            name = f"e.{expert}.{part}"
            tensors[name] = torch.randn(shape, generator=generator)
            made.setdefault(pattern, []).append(_Made(shape, {name: ()}))
            converter.add_tensor("e.fused", name, pattern, tensors[name])
    places = _converted(converter, made, ())
    fused = converter.convert("e.fused")["e.fused"]
    assert places.shape == fused.shape
    assert places.parts.keys() == tensors.keys()
    for name, steps in places.parts.items():
        view = _follow(fused, steps)
        assert torch.equal(view, tensors[name]), name
        assert view.data_ptr() - fused.data_ptr() < fused.nbytes


def test_a_map_is_not_believed_without_the_round_trip(families):
    base = Checkpoint.open(families("Mixtral")[0])
    model: Any = load_runtime(base.path)
    experts = model.model.layers[1].mlp.experts
    experts.down_proj[2, 0, 0] += 1
    places, reason = runtime_map(model, base)
    assert places == {}
    assert reason == (
        "tensor 'model.layers.1.block_sparse_moe.experts.2.w2.weight' has other values in MixtralForCausalLM"
    )
    lacking = Checkpoint(base.path, base.config, base.names[:-1], base._entries)
    assert base.names[-1] == "model.norm.weight"
    experts.down_proj[2, 0, 0] -= 1
    _, reason = runtime_map(load_runtime(base.path), lacking)
    assert reason == "parameter 'model.norm.weight' of MixtralForCausalLM is filled by no tensor"


def test_a_tensor_without_a_place_is_named(families, tmp_path):
    folder = Path(shutil.copytree(families("Llama")[0], tmp_path / "extra"))
    save_file(stored(folder) | {"value_head.weight": torch.ones(3)}, folder / SINGLE, {"format": "pt"})
    places, reason = runtime_map(load_runtime(folder), Checkpoint.open(folder))
    assert places == {}
    assert reason == "tensor 'value_head.weight' has no parameter of its own in LlamaForCausalLM"


def test_places_must_cover_a_parameter_once():
    whole = torch.zeros(10, 4)[2:8]  # somewhere within its memory, as in a flat buffer
    assert _tiles([whole[:2], whole[2:].T], whole)
    assert _tiles([whole[:, 3:], whole[:, :3]], whole)
    assert _tiles([whole.T], whole)
    assert not _tiles([whole[:2], whole[1:5]], whole)  # as many elements, one row twice
    assert not _tiles([whole[:2], whole[3:]], whole)
    assert not _tiles([whole[:5]], whole)


def test_old_checkpoints_with_what_transformers_passes_over(families, make_plan, tmp_path):
    """GPT-NeoX as Pythia has it: masks and rotary frequencies are stored with every layer."""
    masks = {"bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()}
    floats = {"masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.rand(2)}
    paths = []
    for path in families("GPT-NeoX"):
        paths.append(Path(shutil.copytree(path, tmp_path / path.name)))
        layers = {
            f"gpt_neox.layers.{i}.attention.{n}": t.clone()
            for i in range(2)
            for n, t in (masks | floats).items()
        }
        save_file(stored(path) | layers, paths[-1] / SINGLE, {"format": "pt"})
    parents, groups = opened(paths)
    merger = Merger(parents, groups, load_runtime(paths[0]))
    assert merger.notes == []
    plan = make_plan(groups, "linear", models=3)
    ours, theirs = merged(plan, paths), stored(by_mergekit(plan, paths, tmp_path))
    mask = "gpt_neox.layers.1.attention.bias"
    assert torch.equal(ours[mask], masks["bias"])
    for name in [n for n in ours if n.endswith("attention.bias")]:
        assert torch.equal(theirs.pop(name) != 0, ours.pop(name))  # mergekit makes numbers of them
    assert_close(ours, theirs)
    assert_in_place_is_what_is_written(plan, merger, paths, tmp_path / "out")
    assert torch.equal(stored(tmp_path / "out")[mask], masks["bias"])


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_shards_and_one_file_merge_alike(name, families, make_plan, tmp_path):
    paths = families(name)
    sharded = [paths[0]]
    for index, path in enumerate(paths[1:]):
        model: Any = load_runtime(path)
        model.save_pretrained(tmp_path / f"m{index}", max_shard_size="20KB")
        assert len(list((tmp_path / f"m{index}").glob("model-*.safetensors"))) > 2
        assert (tmp_path / f"m{index}" / INDEX).is_file()
        sharded.append(tmp_path / f"m{index}")
    plan = make_plan(opened(paths)[1], "ties", models=3, source_parameters=ties)
    expected = merged(plan, paths)
    found = merged(plan, sharded)
    assert all(torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_tied_or_not(tied, save_family, make_plan, tmp_path):
    architecture = Architecture("qwen3", (4, 3, 4), HEADS, tied=tied)
    paths = save_family(tmp_path, lambda: model_of(architecture), count=3)
    parents, groups = opened(paths)
    assert ("head" in {g.name for g in groups}) != tied
    plan = make_plan(groups, "linear", models=3)
    assert_close(merged(plan, paths), stored(by_mergekit(plan, paths, tmp_path)))
    merger = Merger(parents, groups, load_runtime(paths[0]))
    assert merger.notes == []
    assert_in_place_is_what_is_written(plan, merger, paths, tmp_path / "out")


@pytest.mark.parametrize("name", ["Mistral", "Gemma 3", "Mixtral"])
def test_parents_of_three_dtypes(name, families, make_plan, tmp_path):
    paths = [families(name)[0]]
    for path, dtype in zip(families(name)[1:], ("float16", "bfloat16"), strict=True):
        model: Any = load_runtime(path, dtype)
        model.save_pretrained(tmp_path / dtype)
        paths.append(tmp_path / dtype)
    parents, groups = opened(paths)
    tensor = parents[0].names[0]
    assert [p.dtype(tensor) for p in parents] == [torch.float32, torch.float16, torch.bfloat16]
    plan = make_plan(groups, "task_arithmetic", models=3)
    theirs = by_mergekit(plan, paths, tmp_path)
    if not ARCHITECTURES[name].experts:
        assert_close(merged(plan, paths), stored(theirs))
    merger = Merger(parents, groups, load_runtime(paths[0]))
    assert merger.notes == []
    assert_in_place_is_what_is_written(plan, merger, paths, tmp_path / "out")
    assert merger.model is not None
    assert_close(dict(merger.model.named_parameters()), dict(load_runtime(theirs).named_parameters()))


def test_an_adapter_on_another_architecture_than_llama(families, make_plan, tmp_path):
    from peft import LoraConfig, get_peft_model

    paths = families("GPT-NeoX")
    torch.manual_seed(9)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["query_key_value", "dense_h_to_4h"]
    )
    trained = get_peft_model(load_runtime(paths[0]), settings)
    with torch.no_grad():
        for key, parameter in trained.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.05)
    trained.save_pretrained(tmp_path / "adapter")
    trained.merge_and_unload().save_pretrained(tmp_path / "whole")

    parents = [
        Checkpoint.open(paths[0]),
        open_parent(paths[0], tmp_path / "adapter"),
        Checkpoint.open(paths[1]),
    ]
    check_compatible([(str(i), p) for i, p in enumerate(parents)])
    groups = tensor_groups(parents[0])
    merger = Merger(parents, groups, load_runtime(paths[0]))
    assert merger.notes == []
    plan = make_plan(groups, "task_arithmetic", models=3)
    ours = dict(merger.tensors(plan))
    assert_close(ours, merged(plan, [paths[0], tmp_path / "whole", paths[1]]))
    attention = "gpt_neox.layers.1.attention.query_key_value.weight"
    assert not torch.equal(ours[attention], merged(plan, [paths[0], paths[0], paths[1]])[attention])
    assert_in_place_is_what_is_written(plan, merger, paths, tmp_path / "out")


def test_encoders_are_merged_without_a_runtime_model(families):
    with pytest.raises(CheckpointError, match="only a causal language model can be run here"):
        load_runtime(families("BERT")[0])


def test_added_tokens_are_refused_with_advice_that_works(families, tokenizer, words, tmp_path):
    paths = families("Llama")
    grown = tmp_path / "grown"
    model: Any = load_runtime(paths[1])
    model.resize_token_embeddings(66, mean_resizing=False)
    model.save_pretrained(grown)
    tokenizer(grown, [*words, "<|im_start|>", "<|im_end|>"])
    advice = r"align the vocabularies first, with mergekit's tokenizer options .* `shoal merge CONFIG -o DIR`"
    base = Checkpoint.open(paths[0])
    with pytest.raises(
        CheckpointError, match=rf"'lm_head\.weight': .*\(64, 32\), found \(66, 32\); {advice}"
    ):
        check_compatible([("base", base), ("grown", Checkpoint.open(grown))])
    with pytest.raises(CheckpointError, match=rf"'<\|im_end\|>': expected id none, found 65; .*{advice}"):
        check_tokenizers([("base", paths[0]), ("grown", grown)])

    file = tmp_path / "align.yml"
    file.write_text(
        json.dumps(
            {
                "merge_method": "linear",
                "models": [{"model": str(grown), "parameters": {"weight": 1.0}}],
                "tokenizer": {"source": str(paths[0])},
                "dtype": "float32",
            }
        )
    )
    write_config(file, tmp_path / "aligned")
    fitting = [*paths[:2], tmp_path / "aligned"]
    parents, _ = opened(fitting)
    check_compatible([(p.path.name, p) for p in parents])
    check_tokenizers([(p.name, p) for p in fitting])
    assert all(torch.equal(parents[2].tensor(n), parents[1].tensor(n)) for n in base.names)


def test_an_architecture_unknown_to_mergekit(families, make_plan, tmp_path):
    """transformers does not know it either, so mergekit cannot merge it: ours is held against float64."""
    paths = []
    for path in families("Qwen3-MoE"):
        paths.append(Path(shutil.copytree(path, tmp_path / path.name)))
        config = json.loads((path / "config.json").read_text())
        made_up = {"model_type": "shoalfish", "architectures": ["ShoalfishForCausalLM"]}
        (paths[-1] / "config.json").write_text(json.dumps(config | made_up))
    parents = [Checkpoint.open(p) for p in paths]
    check_compatible([(p.path.name, p) for p in parents])
    notes: list[str] = []
    groups = tensor_groups(parents[0], notes)
    assert notes == ["ShoalfishForCausalLM: unknown to mergekit; tensor groups come from tensor names"]
    known = {g.name: set(g.tensors) for g in opened(families("Qwen3-MoE"))[1]}
    assert {g.name: set(g.tensors) for g in groups} == known
    plan = make_plan(groups, "task_arithmetic", models=3)
    with pytest.raises(CheckpointError, match="mergekit refuses it"):
        by_mergekit(plan, paths, tmp_path)
    assert_close(merged(plan, paths), formula(plan, parents))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_plain_yaml_needs_no_mergekit(name, families, tmp_path, monkeypatch):
    base, m1, m2 = families(name)
    file = tmp_path / "plain.yml"
    listed = [{"model": str(p), "parameters": {"weight": w}} for p, w in ((m1, 0.6), (m2, -0.2))]
    file.write_text(
        json.dumps(
            {
                "merge_method": "ties",
                "base_model": str(base),
                "models": [*listed, {"model": str(base)}],
                "parameters": {"density": 0.4, "int8_mask": True},
                "dtype": "float32",
                "out_dtype": "bfloat16",
            }
        )
    )
    plain = plan_plain(json.loads(file.read_text()))
    if name in MOE:
        assert plain is None  # transformers fuses the experts
        return
    assert plain is not None
    write_config(file, tmp_path / "plain")
    ours = stored(tmp_path / "plain")
    assert all(t.dtype == torch.bfloat16 for t in ours.values())
    if name in REFUSED:
        assert ours.keys() == set(Checkpoint.open(base).names)
    else:
        monkeypatch.setattr("shoal.merge.mergekit_bridge.plan_plain", lambda *_: None)
        write_config(file, tmp_path / "planned")
        theirs = stored(tmp_path / "planned")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("plain", "planned")]
        assert configs[0] == configs[1]
        files = [{p.name for p in (tmp_path / f).iterdir()} for f in ("plain", "planned")]
        assert files[0] == files[1]


def test_what_is_not_plain_is_left_to_mergekit(families, tmp_path):
    base, m1, m2 = (str(p) for p in families("Llama"))
    entry = {"model": m1, "parameters": {"weight": 0.5}}
    plain = {"merge_method": "task_arithmetic", "base_model": base, "models": [entry]}
    assert plan_plain(plain) is not None
    for change in (
        {"models": [{"model": m1, "parameters": {"weight": [0.1, 0.9]}}]},  # a gradient
        {"models": [{"model": m1, "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}]},
        {"models": [{"model": m1}]},  # no weight: mergekit's error
        {"models": [entry, entry]},
        {"models": [{"model": f"{m1}+{m2}", "parameters": {"weight": 0.5}}]},
        {"models": [entry, {"model": str(families("GPT-2")[0]), "parameters": {"weight": 0.5}}]},
        {"models": [{"model": str(tmp_path / "none" / "such" / "folder"), "parameters": {"weight": 0.5}}]},
        {"parameters": {"lambda": float("nan")}},
        {"parameters": {"weigth": 1.0}},
        {"tokenizer_source": "union"},
        {"chat_template": "chatml"},
        {"dtype": "float64"},
        {"base_model": None},
        {"merge_method": "linear"},  # with a base
        {"merge_method": "ram"},
        {"slices": []},
    ):
        assert plan_plain({**plain, **change}) is None, change


def test_the_command_line_merges_a_plain_yaml_without_importing_mergekit(families, tmp_path):
    paths = families("GPT-NeoX")
    file = tmp_path / "plain.yml"
    models = [{"model": str(p), "parameters": {"weight": 0.5}} for p in paths]
    file.write_text(json.dumps({"merge_method": "linear", "models": models}))
    code = (
        "import sys; from shoal.merge.mergekit_bridge import write_config; from pathlib import Path;"
        f"write_config(Path({str(file)!r}), Path({str(tmp_path / 'out')!r}));"
        "sys.exit(bool({'mergekit', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    parents = [Checkpoint.open(p) for p in paths]
    for name, tensor in stored(tmp_path / "out").items():
        expected = sum(p.tensor(name).double() for p in parents) / 3
        assert float((tensor - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
