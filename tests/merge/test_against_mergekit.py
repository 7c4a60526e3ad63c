"""Every native method against mergekit itself, through the YAML that to_mergekit writes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.errors import CheckpointError, RecipeError
from shoal.merge import (
    METHODS,
    Checkpoint,
    Merger,
    load_runtime,
    merge_mergekit_config,
    tensor_groups,
    to_mergekit,
)
from shoal.merge.methods import is_native
from shoal.merge.runtime import convert_into
from shoal.types import MergePlan, Source


def by_mergekit(plan: MergePlan, paths: Sequence[Path], folder: Path) -> Mapping[str, Tensor]:
    return run_text(to_mergekit(plan, [str(p) for p in paths], parent=Checkpoint.open(paths[0])), folder)


def run_text(text: str, folder: Path) -> Mapping[str, Tensor]:
    folder.mkdir(exist_ok=True)
    file = folder / "plan.yml"
    file.write_text(text)
    merge_mergekit_config(file, folder / "out")
    tensors: dict[str, Tensor] = {}
    for shard in (folder / "out").glob("*.safetensors"):
        tensors.update(load_file(shard))
    return tensors


def by_shoal(plan: MergePlan, paths: Sequence[Path]) -> dict[str, Tensor]:
    parents = [Checkpoint.open(p) for p in paths]
    return dict(Merger(parents, tensor_groups(parents[0])).tensors(plan))


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype
        if tensor.dtype == torch.bfloat16:
            # bfloat16 numbers of one sign are ordered like their bits
            steps = (tensor.view(torch.int16).int() - other.view(torch.int16).int()).abs()
            tiny = (tensor - other).abs() <= 1e-6 * other.abs().max()  # around zero, bits jump at the sign
            assert bool(((steps <= 1) | tiny).all()), name
        else:
            bound = 1e-6 * float(other.abs().max())
            assert float((tensor - other).abs().max()) <= bound, name


def density(group: int, source: int) -> dict[str, float]:
    return {"weight": 0.5 - 0.3 * source + 0.02 * group, "density": 0.3 + 0.2 * source}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"base": None, "sources": [0, 1, 2, 3]}),
    ("linear", {"base": 0, "sources": [1, 2, 3]}),
    ("linear", {"sources": [1, 2], "group_parameters": lambda g: {"normalize": False}}),
    ("task_arithmetic", {}),
    ("task_arithmetic", {"source_parameters": lambda g, s: {"weight": 0.7 - 0.5 * s - 0.01 * g}}),
    ("task_arithmetic", {"group_parameters": lambda g: {"normalize": True, "lambda": 0.8 + 0.01 * g}}),
    (
        "slerp",
        {"sources": [2], "source_parameters": lambda g, s: {}, "group_parameters": lambda g: {"t": g / 9}},
    ),
    ("ties", {"source_parameters": density}),
    (
        "ties",
        {"source_parameters": density, "group_parameters": lambda g: {"normalize": False, "lambda": 1.3}},
    ),
    ("ties", {"source_parameters": density, "group_parameters": lambda g: {"rescale": True}}),
    ("breadcrumbs", {"source_parameters": lambda g, s: {**density(g, s), "gamma": 0.02 + 0.01 * s}}),
    (
        "breadcrumbs_ties",
        {
            "source_parameters": lambda g, s: {**density(g, s), "gamma": 0.05},
            "group_parameters": lambda g: {"normalize": True, "rescale": True},
        },
    ),
    ("nuslerp", {"base": None, "sources": [1, 3]}),
    ("nuslerp", {"sources": [1, 3], "source_parameters": lambda g, s: {"weight": 0.9 - 0.6 * s}}),
    ("multislerp", {"base": None, "sources": [0, 1, 2, 3]}),
    ("multislerp", {"group_parameters": lambda g: {"normalize_weights": False}}),
    ("multislerp", {"sources": [2]}),
    ("model_stock", {"source_parameters": lambda g, s: {}}),
    ("sce", {"source_parameters": lambda g, s: {}}),
    (
        "sce",
        {
            "source_parameters": lambda g, s: {},
            "group_parameters": lambda g: {"select_topk": 0.2 + 0.05 * g},
        },
    ),
    ("karcher", {"base": None, "sources": [0, 1, 2, 3], "source_parameters": lambda g, s: {}}),
    (
        "passthrough",
        {"base": None, "sources": [2], "source_parameters": lambda g, s: {"scale": 0.5 + 0.1 * g}},
    ),
    # with density 1 nothing is drawn, and mergekit's DARE is ours
    ("dare_linear", {"source_parameters": lambda g, s: {"weight": 0.4 + 0.1 * s + 0.01 * g, "density": 1.0}}),
    ("dare_ties", {"source_parameters": lambda g, s: {"weight": 0.4 - 0.3 * s + 0.01 * g, "density": 1.0}}),
]


@pytest.mark.parametrize(("operator", "arguments"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_native_methods_give_what_mergekit_gives(operator, arguments, llamas, make_plan, tmp_path):
    groups = tensor_groups(Checkpoint.open(llamas[0]))
    plan = make_plan(groups, operator, models=4, **arguments)
    assert_close(by_shoal(plan, llamas), by_mergekit(plan, llamas, tmp_path))


# without those that cut at a magnitude: bfloat16 deltas are full of equals, and mergekit keeps whichever it sorts first
SMOOTH = [
    (operator, arguments)
    for operator, arguments in CASES
    if operator not in ("ties", "breadcrumbs", "breadcrumbs_ties")
    and not (operator == "sce" and "group_parameters" in arguments)
]


@pytest.fixture(scope="module")
def four_bf16(llamas, tmp_path_factory) -> list[Path]:
    """The four llamas, rounded to bfloat16."""
    folder = tmp_path_factory.mktemp("four")
    for path in llamas:
        shutil.copytree(path, folder / path.name)
        rounded = {n: t.to(torch.bfloat16) for n, t in load_file(path / "model.safetensors").items()}
        save_file(rounded, folder / path.name / "model.safetensors", metadata={"format": "pt"})
    return [folder / path.name for path in llamas]


@pytest.mark.parametrize(("operator", "arguments"), SMOOTH, ids=[f"{i}-{c[0]}" for i, c in enumerate(SMOOTH)])
def test_bfloat16_within_one_ulp_of_mergekit(operator, arguments, four_bf16, make_plan, tmp_path):
    paths = four_bf16
    groups = tensor_groups(Checkpoint.open(paths[0]))
    plan = make_plan(groups, operator, models=4, dtype="bfloat16", **arguments)
    assert_close(by_shoal(plan, paths), by_mergekit(plan, paths, tmp_path))


def test_bfloat16_ties_within_one_ulp_where_the_threshold_does_not_tie(bf16_llamas, make_plan, tmp_path):
    """Among equal magnitudes mergekit keeps whichever its sort puts first; all other elements agree."""
    parents = [Checkpoint.open(p) for p in bf16_llamas]
    plan = make_plan(tensor_groups(parents[0]), "ties", models=3, dtype="bfloat16")
    ours, theirs = by_shoal(plan, bf16_llamas), by_mergekit(plan, bf16_llamas, tmp_path)
    exempt = total = 0
    for name in ours:
        at_threshold = torch.zeros(parents[0].shape(name), dtype=torch.bool)
        for parent in parents[1:]:
            size = (parent.tensor(name).float() - parents[0].tensor(name).float()).abs()
            threshold = size.flatten().sort(descending=True).values[int(0.5 * size.numel()) - 1]
            at_threshold |= size == threshold
        ours[name][at_threshold] = theirs[name][at_threshold]
        exempt, total = exempt + int(at_threshold.sum()), total + at_threshold.numel()
    assert_close(ours, theirs)
    assert 0 < exempt < 0.05 * total


@pytest.mark.parametrize("family", ["gpt2s", "tied_llamas"])
def test_other_architectures_and_tied_weights(family, make_plan, tmp_path, request):
    paths = request.getfixturevalue(family)
    groups = tensor_groups(Checkpoint.open(paths[0]))
    plan = make_plan(groups, "ties", models=3)
    assert_close(by_shoal(plan, paths), by_mergekit(plan, paths, tmp_path))


def test_experts_that_mergekit_fuses_are_the_same_once_loaded(mixtrals, make_plan, tmp_path):
    parent = Checkpoint.open(mixtrals[0])
    plan = make_plan(tensor_groups(parent), "task_arithmetic", models=3)
    theirs = by_mergekit(plan, mixtrals, tmp_path)
    model = load_runtime(mixtrals[0])
    convert_into(model, by_shoal(plan, mixtrals).items())
    assert_close({n: p for n, p in model.named_parameters()}, theirs)
    assert "differ" in to_mergekit(
        make_plan(tensor_groups(parent), "ties", models=3), ["a", "b", "c"], parent=parent
    )


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("ram", {}),
        ("ramplus_tl", {}),
        ("model_stock", {"filter_wise": True}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
)
def test_methods_done_by_mergekit_in_memory_equal_its_own_files(
    operator, options, llamas, make_plan, tmp_path
):
    groups = tensor_groups(Checkpoint.open(llamas[0]))
    names = [p.name for p in METHODS[operator].parameters if p.scope == "source"]
    values = {"weight": 0.4, "density": 0.6, "gamma": 0.02}
    plan = make_plan(
        groups,
        operator,
        models=4,
        base=None if METHODS[operator].base == "none" else 0,
        sources=[1, 2] if operator == "nuslerp" else [1, 2, 3],
        source_parameters=lambda g, s: {n: values[n] + 0.01 * g for n in names},
        group_parameters=lambda g: options,
    )
    assert not any(is_native(g) for g in plan.groups)
    ours, theirs = by_shoal(plan, llamas), by_mergekit(plan, llamas, tmp_path)
    assert ours.keys() == theirs.keys()
    for name in ours:  # one thread against several: sums may differ in the last bits
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


TRUTH = [
    "linear",
    "task_arithmetic",
    "slerp",
    "ties",
    "breadcrumbs",
    "model_stock",
    "karcher",
    "nuslerp",
    "sce",
]


@pytest.mark.parametrize("operator", TRUTH)
def test_ours_is_nearer_to_the_float64_merge_than_mergekits_bfloat16(
    operator, bf16_llamas, make_plan, tmp_path
):
    """Both written as bfloat16: mergekit computing in bfloat16, ours in float32; the truth is mergekit in float64."""
    parents = [Checkpoint.open(p) for p in bf16_llamas]
    per_source = [p.name for p in METHODS[operator].parameters if p.scope == "source"]
    plan = make_plan(
        tensor_groups(parents[0]),
        operator,
        models=3,
        base=0 if METHODS[operator].base == "required" else None,
        sources=[1] if operator == "slerp" else [1, 2],
        source_parameters=lambda g, s: {n: 0.3 + 0.1 * s for n in per_source if n != "gamma"},
        dtype="bfloat16",
    )
    ours = by_shoal(plan, bf16_llamas)
    text = to_mergekit(plan, [str(p) for p in bf16_llamas])
    coarse = run_text(text.replace("dtype: float32", "dtype: bfloat16", 1), tmp_path / "coarse")
    truth = run_text(
        text.replace("dtype: float32", "dtype: float64", 1).replace(
            "out_dtype: bfloat16", "out_dtype: float64"
        ),
        tmp_path / "truth",
    )
    error = {
        name: [float((t[name].double() - truth[name]).pow(2).sum()) for t in (ours, coarse)] for name in ours
    }
    mine, theirs = (sum(e[i] for e in error.values()) for i in (0, 1))
    assert mine <= theirs


def test_filters_match_exactly_their_group_even_among_layers_1_and_11(make_plan):
    import yaml
    from mergekit.config import MergeConfiguration, evaluate_setting

    from shoal.types import TensorGroup

    groups = [
        TensorGroup(f"layers.{i}.{kind}", i, kind, tuple(f"model.layers.{i}.{t}" for t in tails))
        for i in range(12)
        for kind, tails in {
            "attn": ("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
            "norm": ("input_layernorm.weight", "post_attention_layernorm.weight"),
        }.items()
    ]
    plan = make_plan(groups, "task_arithmetic", models=2)
    text = to_mergekit(plan, ["org/base", "org/m1@main"])
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    assert config.models is not None
    setting = config.models[0].parameters["weight"]
    for group in plan.groups:
        for tensor in group.tensors:
            assert evaluate_setting(tensor, setting, validate=float) == group.sources[0].parameters["weight"]
    filters = {entry.filter for entry in setting}
    assert "model.layers.1.self_attn." in filters  # the shortest common prefix, up to a dot
    assert "model.layers.1.input_layernorm.weight" in filters  # no common prefix of their own


def test_equal_weights_collapse_to_a_scalar(llamas, make_plan):
    import yaml

    groups = tensor_groups(Checkpoint.open(llamas[0]))
    plan = make_plan(groups, "ties", models=2, source_parameters=lambda g, s: {"weight": 0.25})
    text = to_mergekit(plan, ["org/base", "org/m1"])
    data = yaml.safe_load(text)
    assert data["models"] == [{"model": "org/m1", "parameters": {"weight": 0.25, "density": 0.5}}]
    assert data["base_model"] == "org/base"
    assert data["parameters"] == {"lambda": 1.0, "normalize": True, "rescale": False}
    assert "another draw" not in text
    assert "another draw" in to_mergekit(make_plan(groups, "dare_ties", models=2), ["b", "m"])
    assert "--lora-merge-dtype float32" in to_mergekit(plan, ["org/base", "org/base+org/adapter"])


def test_what_mergekit_has_no_words_for_is_refused(llamas, make_plan):
    from dataclasses import replace

    groups = tensor_groups(Checkpoint.open(llamas[0]))
    plan = make_plan(groups, "ties", models=3)
    mixed = replace(plan, groups=(replace(plan.groups[0], operator="task_arithmetic"), *plan.groups[1:]))
    with pytest.raises(RecipeError, match=r"one method and the same sources.*\['task_arithmetic', 'ties'\]"):
        to_mergekit(mixed, ["a", "b", "c"])
    moved = replace(plan.groups[1], sources=(Source(1, "layers.1.attn"), Source(2, "layers.1.attn")))
    with pytest.raises(RecipeError, match=r"'layers\.0\.attn' from another group"):
        to_mergekit(replace(plan, groups=(plan.groups[0], moved, *plan.groups[2:])), ["a", "b", "c"])


def test_what_mergekit_refuses_is_one_line_and_leaves_nothing(tmp_path):
    file = tmp_path / "bad.yml"
    file.write_text("merge_method: nonsense\nmodels:\n  - model: /nowhere\n")
    with pytest.raises(CheckpointError, match=r"bad\.yml: mergekit refuses it") as caught:
        merge_mergekit_config(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yml"]
