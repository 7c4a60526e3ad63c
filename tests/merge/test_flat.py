"""The whole model at once: flat buffers, compiled kernels, memory tiers. The canonical bits are the measure of all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.errors import RecipeError
from shoal.merge import (
    Checkpoint,
    Merger,
    compiled,
    load_runtime,
    memory,
    stock,
    tensor_groups,
    weights_sha256,
)
from shoal.merge.layout import layouts, settle
from shoal.merge.runtime_map import runtime_map

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler, found none")


def opened(paths):
    parents = [Checkpoint.open(p) for p in paths]
    return parents, tensor_groups(parents[0])


def sparse(group, source):
    return {"weight": 0.6 - 0.4 * source + 0.02 * group, "density": 0.3 + 0.2 * source}


# name -> (operator, arguments of make_plan for four models); together they use every part of every kernel
PLANS = {
    "linear": ("linear", {"base": None, "sources": [0, 1, 2, 3]}),
    "task_arithmetic": ("task_arithmetic", {}),
    "task_arithmetic, normalised": (
        "task_arithmetic",
        {"group_parameters": lambda g: {"normalize": True, "lambda": 0.7 + 0.01 * g}},
    ),
    "slerp": ("slerp", {"sources": [2], "source_parameters": lambda g, s: {}}),
    "ties": ("ties", {"source_parameters": sparse}),
    "dare_ties, rescaled": (
        "dare_ties",
        {"source_parameters": sparse, "group_parameters": lambda g: {"lambda": 1.1, "normalize": True}},
    ),
    "sce": (
        "sce",
        {"source_parameters": lambda g, s: {}, "group_parameters": lambda g: {"select_topk": 0.4}},
    ),
}


def planned(name, make_plan, groups, **more):
    operator, arguments = PLANS[name]
    return make_plan(groups, operator, models=4, **{**arguments, **more})


MERGED = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from torch._dynamo.utils import counters
    from shoal.merge import Checkpoint, Merger, load_runtime, tensor_groups, weights_sha256
    from shoal.search.plans import uniform_merge_plan

    paths = [Path(p) for p in sys.argv[1:]]
    parents = [Checkpoint.open(p) for p in paths]
    groups = tensor_groups(parents[0])
    model = load_runtime(paths[0])
    merger = Merger(parents, groups, model, compile="always")
    plan = uniform_merge_plan(groups, ["a", "b", "c", "d"], [0, 1, 2, 3], "float32")
    merger.materialize(plan)
    print("notes", merger.notes)
    print("hits", counters["inductor"]["fxgraph_cache_hit"], "misses", counters["inductor"]["fxgraph_cache_miss"])
    print("sha", weights_sha256(model.named_parameters()))
    print("sha", weights_sha256(merger.tensors(plan)))
    """
)


def merged(models: list[Path], cache: Path, **environment: str) -> list[str]:
    """What another process prints that merges with compiled kernels, with this cache of ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}
    done = subprocess.run(
        [sys.executable, "-c", MERGED, *map(str, models)],
        env={**kept, "SHOAL_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def first(llamas, tmp_path_factory):
    """A cache that was empty, and what the process printed that began it: the compiler's own start is made once."""
    cache = tmp_path_factory.mktemp("kernels") / "cache"
    return cache, merged(llamas, cache)


@pytest.fixture
def kernels(first, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(first[0]))


@needs_compiler
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_kernels_have_the_canonical_bits(name, dtype, llamas, make_plan, kernels):
    """bfloat16 weights in a float32 model: the compiler must not take the rounding away."""
    parents, groups = opened(llamas)
    model = load_runtime(llamas[0])
    merger = Merger(parents, groups, model, compile="always")
    plan = planned(name, make_plan, groups, dtype=dtype)
    merger.materialize(plan)
    assert merger.notes == []  # a kernel that could not be built or believed leaves a note
    assert merger._kernels.seconds > 0
    expected = {n: t.float() for n, t in Merger(parents, groups).tensors(plan)}
    assert weights_sha256(model.named_parameters()) == weights_sha256(expected.items())


@needs_compiler
def test_one_kernel_serves_all_tensors_and_all_weights(llamas, make_plan, kernels):
    from torch._dynamo.utils import counters

    parents, groups = opened(llamas)
    model = load_runtime(llamas[0])
    said: list[str] = []
    merger = Merger(parents, groups, model, compile="always", say=said.append)
    plan = planned("task_arithmetic", make_plan, groups)
    before = counters["stats"]["unique_graphs"]
    merger.materialize(plan)
    merger.materialize(
        planned("task_arithmetic", make_plan, groups, source_parameters=lambda g, s: {"weight": 0.1})
    )
    assert counters["stats"]["unique_graphs"] == before + 1
    assert [line for line in said if line.startswith("compiled in")] == said[1:]  # its time is told, once


@needs_compiler
def test_kernels_are_kept_for_the_next_process_and_the_compiler_may_be_missing(llamas, first, tmp_path):
    cache, cold = first
    assert cold[:2] == ["notes []", "hits 0 misses 1"]
    assert (cache / "kernels").is_dir()
    second = merged(llamas, cache)
    assert second[:2] == ["notes []", "hits 1 misses 0"]
    empty = tmp_path / "nothing"
    empty.mkdir()
    bare = merged(llamas, tmp_path / "b", CXX=str(empty / "g++"), PATH=str(empty))
    assert "merges run in eager tiles, slower and with the same result: no working compiler" in bare[0]
    assert len({*cold[2:], *second[2:], *bare[2:]}) == 1


def test_a_small_model_never_waits_for_a_compiler(llamas, make_plan):
    parents, groups = opened(llamas)
    said: list[str] = []
    merger = Merger(parents, groups, load_runtime(llamas[0]), say=said.append)
    merger.materialize(planned("task_arithmetic", make_plan, groups))
    assert merger._kernels.seconds == 0
    assert said == []
    assert compiled.WORTH > 20 * sum(p.numel() for p in merger.model.parameters())


@pytest.mark.parametrize("name", PLANS)
def test_bits_do_not_depend_on_tier_threads_tiles_or_runs(name, llamas, make_plan, monkeypatch):
    monkeypatch.setattr(stock, "TILE", 1 << 12)  # several tiles even here
    parents, groups = opened(llamas)
    plan = planned(name, make_plan, groups, dtype="bfloat16")
    other = planned(name, make_plan, groups, dtype="float32", seed=3)
    hashes = {weights_sha256((n, t.float()) for n, t in Merger(parents, groups).tensors(plan))}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for tier in memory.TIERS:
                model = load_runtime(llamas[0])
                merger = Merger(parents, groups, model, memory=tier)
                assert merger.memory is not None
                assert merger.memory.tier == tier
                for each in (plan, other, plan):
                    merger.materialize(each)
                hashes.add(weights_sha256(model.named_parameters()))
                merger.materialize(plan, canonical=True)
                hashes.add(weights_sha256(model.named_parameters()))
    finally:
        torch.set_num_threads(threads)
    assert len(hashes) == 1


def test_plans_of_several_methods_and_moved_layers_in_one_model(llamas, make_plan):
    parents, groups = opened(llamas)
    plan = planned("task_arithmetic", make_plan, groups)
    ties = planned("ties", make_plan, groups, base=0, sources=[1, 2, 3])
    mixed = replace(plan, groups=tuple((plan, ties)[i % 2].groups[i] for i in range(len(groups))))
    at = next(i for i, g in enumerate(mixed.groups) if g.name == "layers.0.attn")
    moved = [replace(s, group="layers.1.attn") for s in mixed.groups[at].sources]
    mixed = replace(
        mixed,
        groups=(*mixed.groups[:at], replace(mixed.groups[at], sources=tuple(moved)), *mixed.groups[at + 1 :]),
    )
    model = load_runtime(llamas[0])
    merger = Merger(parents, groups, model)
    merger.materialize(plan)
    merger.materialize(mixed)
    assert weights_sha256(model.named_parameters()) == weights_sha256(Merger(parents, groups).tensors(mixed))


def test_a_selection_over_other_models_is_another_selection(llamas, make_plan):
    parents, groups = opened(llamas)
    model = load_runtime(llamas[0])
    merger = Merger(parents, groups, model)
    for sources in ([1, 2, 3], [1, 2], [1, 3]):
        plan = planned("sce", make_plan, groups, sources=sources)
        merger.materialize(plan)
        assert weights_sha256(model.named_parameters()) == weights_sha256(
            Merger(parents, groups).tensors(plan)
        )


def test_parents_of_other_dtypes(llamas, bf16_llamas, make_plan, tmp_path):
    from transformers import AutoModelForCausalLM

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(llamas[1], dtype=torch.float16).save_pretrained(half)
    parents, groups = opened([llamas[0], half, bf16_llamas[1], llamas[2]])
    for name in ("ties", "dare_ties, rescaled", "linear"):
        model = load_runtime(llamas[0])
        plan = planned(name, make_plan, groups)
        Merger(parents, groups, model).materialize(plan)
        assert weights_sha256(model.named_parameters()) == weights_sha256(
            Merger(parents, groups).tensors(plan)
        )


@pytest.mark.parametrize("family", ["llamas", "tied_llamas", "gpt2s", "mixtrals"])
def test_the_layout_holds_every_parameter_once(family, request):
    path = request.getfixturevalue(family)[0]
    model = load_runtime(path)
    before = {n: p.clone() for n, p in model.named_parameters()}
    (layout,), apart = layouts(model, runtime_map(model, Checkpoint.open(path))[0])
    assert apart == []
    flat = settle(model, layout, torch.device("cpu"))
    inside = range(flat.data_ptr(), flat.data_ptr() + flat.numel() * flat.element_size())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() in inside
    assert sum(e.numel for e in layout.entries) == sum(p.numel() for p in model.parameters())
    rows = [r for e in layout.entries for r in range(e.row, e.row + e.rows)]
    assert rows == list(range(layout.rows))
    assert [layout.owner[e.row] for e in layout.entries] == list(range(len(layout.entries)))


def test_memory_is_chosen_by_size_and_can_be_overridden(llamas):
    parents, _ = opened(llamas)
    size = memory.flat_bytes(parents[0])
    chosen = memory.plan_memory(parents, "cpu", torch.float32)
    assert (chosen.tier, chosen.model, chosen.parents) == ("device", size, 4 * size)
    assert memory.plan_memory(parents, "cpu", torch.float32, sparse=True).parents == 7 * size
    assert memory.plan_memory(parents, "cpu", torch.bfloat16).model == size // 2
    assert memory.plan_memory(parents, "cpu", torch.float32, limit=5 * size).tier == "disk"
    assert memory.plan_memory(parents, "cpu", torch.float32, limit=7 * size).tier == "device"
    assert memory.plan_memory(parents, "cpu", torch.float32, wanted="host").tier == "host"
    assert f"(device): model {size / 2**20:.1f} MiB, parents {4 * size / 2**20:.1f} MiB" in chosen.words()
    with pytest.raises(RecipeError, match="unknown tier 'hosts'"):
        memory.plan_memory(parents, "cpu", torch.float32, wanted="hosts")
