from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.errors import CheckpointError, RecipeError
from shoal.merge import Checkpoint, Merger, load_runtime, tensor_groups, weights_sha256, write_model

FAMILIES = ["llamas", "tied_llamas", "gpt2s", "mixtrals"]


def opened(paths):
    parents = [Checkpoint.open(p) for p in paths]
    return parents, tensor_groups(parents[0])


def reloaded(plan, merger, paths, folder):
    write_model(folder, plan, merger, paths[0], paths[0])
    return load_runtime(folder)


def assert_same(model, other):
    values = dict(other.named_parameters())
    assert values.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operator", ["task_arithmetic", "dare_ties", "breadcrumbs"])
def test_in_place_equals_the_written_folder_loaded_again(operator, family, make_plan, tmp_path, request):
    paths = request.getfixturevalue(family)[:3]
    parents, groups = opened(paths)
    model = load_runtime(paths[0])
    merger = Merger(parents, groups, model)
    plan = make_plan(groups, operator, models=3)
    merger.materialize(make_plan(groups, "task_arithmetic", models=3, dtype="bfloat16"))  # leaves no trace
    merger.materialize(plan)
    assert_same(model, reloaded(plan, merger, paths, tmp_path / "out"))
    assert merger.notes == []


def test_the_merged_model_computes_with_the_merged_weights(tied_llamas, make_plan, tmp_path):
    parents, groups = opened(tied_llamas)
    model = load_runtime(tied_llamas[0])
    tokens = torch.arange(8)[None]
    before = model(tokens).logits
    merger = Merger(parents, groups, model)
    plan = make_plan(groups, "ties", models=3)
    merger.materialize(plan)
    after = model(tokens).logits
    assert not torch.equal(before, after)
    assert torch.equal(after, reloaded(plan, merger, tied_llamas, tmp_path / "out")(tokens).logits)


def test_weights_are_rounded_to_the_plan_dtype_before_the_runtimes(bf16_llamas, make_plan, tmp_path):
    parents, groups = opened(bf16_llamas)
    model = load_runtime(bf16_llamas[0], "float32")
    merger = Merger(parents, groups, model)
    plan = make_plan(groups, "task_arithmetic", models=3, dtype="bfloat16")
    merger.materialize(plan)
    assert all(torch.equal(p, p.to(torch.bfloat16).float()) for p in model.parameters())
    assert_same(model, reloaded(plan, merger, bf16_llamas, tmp_path / "out"))


NATIVE = ["linear", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties"]


@pytest.mark.parametrize("operator", [*NATIVE, "karcher"])
def test_bits_do_not_depend_on_threads_runs_or_the_resident_model(operator, llamas, make_plan):
    parents, groups = opened(llamas)
    sources = [1] if operator == "slerp" else [1, 2, 3]
    parameters = (lambda g, s: {}) if operator in ("slerp", "karcher") else None
    plan = make_plan(groups, operator, models=4, sources=sources, source_parameters=parameters, seed=5)
    model = load_runtime(llamas[0])
    merger = Merger(parents, groups, model)
    threads = torch.get_num_threads()
    hashes = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            hashes.append(weights_sha256(Merger(parents, groups).tensors(plan)))
            merger.materialize(plan, canonical=True)
            hashes.append(weights_sha256(model.named_parameters()))
    finally:
        torch.set_num_threads(threads)
    assert len(set(hashes)) == 1


def test_steps_do_not_change_the_bits(llamas, make_plan, monkeypatch):
    from shoal.merge import chunks

    parents, groups = opened(llamas)
    for operator in ("task_arithmetic", "ties", "dare_ties"):
        plan = make_plan(groups, operator, models=4, group_parameters=lambda g: {"normalize": True})
        hashes = set()
        for step in (100, 1001, 1 << 20):
            monkeypatch.setattr(chunks, "STEP_CPU", step)
            hashes.add(weights_sha256(Merger(parents, groups).tensors(plan)))
        assert len(hashes) == 1


def test_changing_densities_do_not_meet_stale_thresholds(llamas, make_plan):
    parents, groups = opened(llamas)
    merger = Merger(parents, groups)
    for operator in ("ties", "dare_ties"):
        for density in (0.2, 0.7, 0.2):
            plan = make_plan(
                groups,
                operator,
                models=3,
                source_parameters=lambda g, s, d=density: {"weight": 0.5, "density": d},
            )
            plan = replace(plan, models=("base", "m1", "m2", "m3"))
            assert weights_sha256(merger.tensors(plan)) == weights_sha256(
                Merger(parents, groups).tensors(plan)
            )


def test_layers_may_come_from_other_layers(llamas, make_plan):
    parents, groups = opened(llamas)
    plan = make_plan(groups, "linear", models=4, base=None, sources=[1], source_parameters=lambda g, s: {})
    at = next(i for i, g in enumerate(plan.groups) if g.name == "layers.0.attn")
    moved = replace(plan.groups[at], sources=(replace(plan.groups[at].sources[0], group="layers.1.attn"),))
    plan = replace(plan, groups=(*plan.groups[:at], moved, *plan.groups[at + 1 :]))
    merged = dict(Merger(parents, groups).tensors(plan))
    assert torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"],
        parents[1].tensor("model.layers.1.self_attn.q_proj.weight"),
    )
    assert torch.equal(merged["model.norm.weight"], parents[1].tensor("model.norm.weight"))


def test_plans_that_do_not_belong_to_the_parents_are_refused(llamas, make_plan):
    parents, groups = opened(llamas)
    merger = Merger(parents, groups)
    plan = make_plan(groups, "ties", models=4)
    with pytest.raises(CheckpointError, match="merges 3 models, but 4 are loaded"):
        list(merger.tensors(make_plan(groups, "ties", models=3)))
    with pytest.raises(CheckpointError, match=r"does not make every tensor exactly once: 'lm_head\.weight'"):
        list(merger.tensors(replace(plan, groups=plan.groups[:-1])))
    with pytest.raises(RecipeError, match="unknown dtype 'bfloat'"):
        list(merger.tensors(replace(plan, dtype="bfloat")))
    with pytest.raises(CheckpointError, match="made without a model"):
        merger.materialize(plan)
    zero = make_plan(
        groups, "linear", models=4, base=None, sources=[1], source_parameters=lambda g, s: {"weight": 0.0}
    )
    with pytest.raises(RecipeError, match="sum to 0"):
        list(merger.tensors(zero))


@pytest.mark.parametrize("operator", ["slerp", "ties", "dare_linear"])
def test_what_is_remembered_belongs_to_its_sources(operator, llamas, make_plan):
    parents, groups = opened(llamas)
    parameters = (lambda g, s: {}) if operator == "slerp" else None
    plan = make_plan(groups, operator, models=4, sources=[1], source_parameters=parameters)
    at = next(i for i, g in enumerate(plan.groups) if g.name == "layers.0.attn")
    moved = replace(plan.groups[at], sources=(replace(plan.groups[at].sources[0], group="layers.1.attn"),))
    other = replace(plan, groups=(*plan.groups[:at], moved, *plan.groups[at + 1 :]))
    turned = replace(plan, base=2)
    merger = Merger(parents, groups)
    for each in (plan, other, turned, plan):
        assert weights_sha256(merger.tensors(each)) == weights_sha256(Merger(parents, groups).tensors(each))
    assert len({weights_sha256(merger.tensors(each)) for each in (plan, other, turned)}) == 3
