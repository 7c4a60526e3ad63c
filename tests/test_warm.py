"""Warm starts: the genome nearest to an existing merge, and one line where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from shoal.errors import ShoalError
from shoal.output import mergekit_yaml
from shoal.preflight import Prepared, prepare
from shoal.recipe import parse_recipe
from shoal.search.plans import parent_plan, uniform_merge_plan
from shoal.types import MergePlan
from shoal.warm import find_model, warm_genome

Prepare = Callable[..., Prepared]
SaveRun = Callable[..., Path]


@pytest.fixture
def ready(deep: Any, tmp_path: Path) -> Prepare:
    """A prepared recipe on the four-layer models; keyword arguments replace top-level keys."""

    def prepared(**changes: Any) -> Prepared:
        space = {"shape": "curve", "coefficients": 2, "tensor_types": ["attn", "mlp"]}
        return prepare(parse_recipe(yaml.safe_dump(deep.recipe(**{"space": space} | changes))), tmp_path)

    return prepared


@pytest.fixture
def save_run(tmp_path: Path) -> SaveRun:
    """What a finished run with this winner leaves in its folder, as far as a warm start reads it."""

    def saved(prepared: Prepared, plan: MergePlan, name: str = "run") -> Path:
        folder = tmp_path / name
        (folder / "best").mkdir(parents=True)
        (folder / "recipe.yaml").write_text(prepared.recipe.to_yaml())
        (folder / "lock.yaml").write_text(prepared.lock.to_yaml())
        (folder / "best" / "plan.json").write_text(plan.to_json())
        (folder / "best" / "mergekit_config.yml").write_text(
            mergekit_yaml(prepared.lock, prepared.recipe, plan)
        )
        (folder / "DONE").write_text("beats\n")
        return folder

    return saved


def somewhere(prepared: Prepared, seed: int = 0) -> Any:
    space = prepared.space
    share = np.random.default_rng(seed).uniform(0.2, 0.8, space.size)
    return space.low + share * (space.high - space.low)


SPACES: dict[str, dict[str, Any]] = {
    "curve": {"space": {"shape": "curve", "coefficients": 3}},
    "types": {},
    "layers": {"space": {"shape": "layers"}},
    "ties": {"merge": {"method": "ties", "dtype": "float32"}, "space": {"shape": "blocks", "blocks": 2, "bounds": {"density": [0.1, 1]}}},
    "dare": {"merge": {"method": "dare_ties", "dtype": "float32", "parameters": {"density": 0.5}}},
}  # fmt: skip


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("where", ["", "best/mergekit_config.yml"])
def test_a_winner_is_its_own_start(ready: Prepare, save_run: SaveRun, name: str, where: str) -> None:
    prepared = ready(**SPACES[name])
    genome = somewhere(prepared)
    run = save_run(prepared, prepared.space.decode(genome))
    found, note = warm_genome(run / where, prepared.space, prepared.lock.models)
    assert np.abs(found - genome).max() < 1e-9
    assert note.endswith("; exact")


@pytest.mark.parametrize("where", ["", "best/mergekit_config.yml"])
def test_slerp_and_linear_too(deep: Any, ready: Prepare, save_run: SaveRun, where: str) -> None:
    models = [str(deep.model("left")), str(deep.model("right"))]
    changes: dict[str, Any] = {"space": {"shape": "layers"}}
    for number, prepared in enumerate(
        (
            ready(base_model=None, models=models, merge={"method": "linear"}, **changes),
            ready(base_model=models[0], models=models[1:], merge={"method": "slerp"}, **changes),
        )
    ):
        genome = somewhere(prepared)
        run = save_run(prepared, prepared.space.decode(genome), f"run{number}")
        found, note = warm_genome(run / where, prepared.space, prepared.lock.models)
        assert np.abs(found - genome).max() < 1e-9 and note.endswith("; exact")


def test_slerp_from_the_other_end_of_the_arc(deep: Any, ready: Prepare, save_run: SaveRun) -> None:
    left, right = str(deep.model("left")), str(deep.model("right"))
    there = ready(base_model=left, models=[right], merge={"method": "slerp"}, space={"shape": "layers"})
    here = ready(base_model=right, models=[left], merge={"method": "slerp"}, space={"shape": "layers"})
    genome = somewhere(there)
    run = save_run(there, there.space.decode(genome))
    found, note = warm_genome(run, here.space, here.lock.models)
    assert np.abs(found - (1 - genome)).max() < 1e-9 and note.endswith("; exact")


def test_another_order_of_models_and_a_moved_copy_do_not_matter(
    deep: Any, ready: Prepare, save_run: SaveRun, tmp_path: Path
) -> None:
    there = ready()
    genome = somewhere(there)
    run = save_run(there, there.space.decode(genome))
    shutil.copytree(deep.model("left"), tmp_path / "renamed")
    here = ready(models=[str(deep.model("right")), str(tmp_path / "renamed")])
    found, note = warm_genome(run, here.space, here.lock.models)
    half = here.space.size // 2
    assert np.abs(found - np.roll(genome, half)).max() < 1e-9 and note.endswith("; exact")


def test_a_finer_shape_starts_at_the_same_merge(ready: Prepare, save_run: SaveRun) -> None:
    there, here = ready(space={"shape": "blocks", "blocks": 2}), ready(space={"shape": "layers"})
    plan = there.space.decode(somewhere(there))
    found, note = warm_genome(save_run(there, plan), here.space, here.lock.models)
    assert note.endswith("; exact")
    for a, b in zip(plan.groups, here.space.decode(found).groups, strict=True):
        for s, t in zip(a.sources, b.sources, strict=True):
            assert s.parameters["weight"] == pytest.approx(t.parameters["weight"], abs=1e-9)


def test_a_coarser_shape_says_what_it_loses(ready: Prepare, save_run: SaveRun) -> None:
    there, here = ready(space={"shape": "layers"}), ready(space={"shape": "uniform"})
    genome = somewhere(there)
    found, note = warm_genome(save_run(there, there.space.decode(genome)), here.space, here.lock.models)
    means = genome.reshape(2, 4).mean(axis=1)
    assert found == pytest.approx(means, abs=1e-9)
    off = np.abs(genome.reshape(2, 4) - means[:, None]).max()
    assert f"not in the uniform space, projected: some parameter of a layer is off by {off:.3g}" in note


@pytest.mark.parametrize("where", ["", "best/mergekit_config.yml"])
def test_a_parent_or_the_uniform_merge_as_winner(ready: Prepare, save_run: SaveRun, where: str) -> None:
    prepared = ready()
    names = [model.name for model in prepared.lock.models]
    expected = {"base": (0, 0), "left": (1, 0), "right": (0, 1)}
    for index, name in enumerate(names):
        plan = parent_plan(prepared.groups, names, index, "float32")
        found, note = warm_genome(
            save_run(prepared, plan, name) / where, prepared.space, prepared.lock.models
        )
        table = prepared.space.values(found)
        for row, values in zip(table.rows, table.values, strict=True):
            share = expected[name]["[right]" in row]
            assert np.nan_to_num(values, nan=share) == pytest.approx(share, abs=1e-9), (name, row)
        assert note.endswith("; exact")
    plan = uniform_merge_plan(prepared.groups, names, [1, 2], "float32")
    found, _ = warm_genome(save_run(prepared, plan, "uniform") / where, prepared.space, prepared.lock.models)
    assert found == pytest.approx(prepared.space.uniform_genome, abs=1e-9)


def test_a_baseline_is_no_start_for_another_kind_of_merge(ready: Prepare, save_run: SaveRun) -> None:
    prepared = ready(**SPACES["ties"])
    plan = parent_plan(prepared.groups, [model.name for model in prepared.lock.models], 1, "float32")
    run = save_run(prepared, plan)
    with pytest.raises(
        ShoalError, match="a plain weighted sum of models, which a search by ties cannot start from"
    ):
        warm_genome(run, prepared.space, prepared.lock.models)


def test_genes_outside_their_bounds_are_moved_to_them(ready: Prepare, save_run: SaveRun) -> None:
    wide = ready(space={"shape": "uniform", "bounds": {"weight": [-1, 3]}})
    narrow = ready(space={"shape": "uniform", "bounds": {"weight": [0, 1]}})
    run = save_run(wide, wide.space.decode([-0.5, 0.25]))
    found, note = warm_genome(run, narrow.space, narrow.lock.models)
    assert (
        found.tolist() == pytest.approx([0.0, 0.25])
        and "1 of 2 genes moved to their bounds, by up to 0.5" in note
    )


def test_what_the_run_does_not_search_is_said(ready: Prepare, save_run: SaveRun) -> None:
    there = ready(merge={"method": "ties", "parameters": {"density": 0.9}})
    here = ready(merge={"method": "ties", "parameters": {"density": 0.5}})
    _, note = warm_genome(save_run(there, there.space.decode(somewhere(there))), here.space, here.lock.models)
    assert "density, which this run does not search, differs by 0.4" in note


def test_gradients_filters_and_slices_mean_what_they_mean_in_mergekit(
    deep: Any, ready: Prepare, tmp_path: Path
) -> None:
    prepared = ready(space={"shape": "layers", "tensor_types": ["attn", "mlp"]})
    left, right = str(deep.model("left")), str(deep.model("right"))
    config: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": str(deep.model("base")),
        "tokenizer_source": "base",
        "dtype": "bfloat16",
        "models": [
            {"model": left, "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.25}]}},
            {"model": right, "parameters": {"weight": 0.5}},
        ],
    }
    (tmp_path / "a.yml").write_text(yaml.safe_dump(config))
    found, note = warm_genome(tmp_path / "a.yml", prepared.space, prepared.lock.models)
    table = prepared.space.values(found)
    rows = dict(zip(table.rows, table.values[:, :4].tolist(), strict=True))
    assert rows["weight[left].mlp"] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert rows["weight[left].attn"] == pytest.approx([0.25] * 4)
    assert rows["weight[right].mlp"] == pytest.approx([0.5] * 4)
    assert "layers exact, what follows from them (embeddings, norms, head) off by up to" in note
    del config["models"]
    config["slices"] = [
        {
            "sources": [
                {"model": left, "layer_range": [2 * i, 2 * i + 2], "parameters": {"weight": 0.1 + i}},
                {"model": right, "layer_range": [2 * i, 2 * i + 2], "parameters": {"weight": 0.5}},
                {"model": config["base_model"], "layer_range": [2 * i, 2 * i + 2]},
            ]
        }
        for i in range(2)
    ]
    (tmp_path / "b.yml").write_text(yaml.safe_dump(config))
    found, _ = warm_genome(tmp_path / "b.yml", prepared.space, prepared.lock.models)
    table = prepared.space.values(found)
    rows = dict(zip(table.rows, table.values[:, :4].tolist(), strict=True))
    for kind in ("attn", "mlp"):
        assert rows[f"weight[left].{kind}"] == pytest.approx([0.1, 0.1, 1.1, 1.1])


BROKEN: dict[str, tuple[Callable[[Any, dict[str, Any]], Any], str]] = {
    "another method": (lambda d, c: c | {"merge_method": "ties"}, "merges by ties, this run searches task_arithmetic"),
    "an unknown model": (lambda d, c: c | {"base_model": "org/x"}, r"model 'org/x' is none of this run's models: .*base"),
    "a model too few": (lambda d, c: c | {"models": c["models"][:1]}, "it merges left, this run merges left, right"),
    "another base": (
        lambda d, c: c | {"base_model": str(d.model("left")), "models": [{"model": str(d.model(m)), "parameters": {"weight": 0.5}} for m in ("base", "right")]},
        "its base is left, this run's is base",
    ),
    "a switch": (lambda d, c: c | {"parameters": {"normalize": True}}, "merged with normalize: true, this run has normalize: false"),
    "no merge": (lambda d, c: {"genome": {}}, "an evolution for mergekit-evolve"),
    "no mapping": (lambda d, c: ["x"], "expected a mapping with merge_method"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_another_merge_is_refused_in_one_line(deep: Any, ready: Prepare, tmp_path: Path, what: str) -> None:
    prepared = ready()
    models = [{"model": str(deep.model(m)), "parameters": {"weight": 0.5}} for m in ("left", "right")]
    config = {"merge_method": "task_arithmetic", "base_model": str(deep.model("base")), "models": models}
    change, message = BROKEN[what]
    (tmp_path / "x.yml").write_text(yaml.safe_dump(change(deep, config)))
    with pytest.raises(ShoalError, match=message) as caught:
        warm_genome(tmp_path / "x.yml", prepared.space, prepared.lock.models)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_finished_run_is_refused(
    ready: Prepare, save_run: SaveRun, tmp_path: Path
) -> None:
    prepared = ready()
    run = save_run(prepared, prepared.space.decode(prepared.space.x0))
    (run / "DONE").unlink()
    for folder in (run, tmp_path / "nowhere"):
        with pytest.raises(ShoalError, match=r"no finished run there|no such run folder or mergekit YAML"):
            warm_genome(folder, prepared.space, prepared.lock.models)


def test_a_run_of_other_weights_is_refused(
    deep: Any, ready: Prepare, save_run: SaveRun, tmp_path: Path
) -> None:
    there = ready()
    run = save_run(there, there.space.decode(there.space.x0))
    lock = yaml.safe_load((run / "lock.yaml").read_text())
    lock["models"][1]["files"]["model.safetensors"] = "0" * 64
    (run / "lock.yaml").write_text(yaml.safe_dump(lock))
    with pytest.raises(ShoalError, match="has other weights than"):
        warm_genome(run, there.space, there.lock.models)


def test_a_plan_that_is_none_is_refused(ready: Prepare, save_run: SaveRun) -> None:
    prepared = ready()
    run = save_run(prepared, prepared.space.decode(prepared.space.x0))
    (run / "best" / "plan.json").write_text(json.dumps({"models": []}))
    with pytest.raises(ShoalError, match="not a plan that can be read"):
        warm_genome(run, prepared.space, prepared.lock.models)


def test_hub_models_are_known_by_repository_and_revision(ready: Prepare) -> None:
    spellings = [
        ("org/a@v1", "/c/a", "org/a@abc"),
        ("org/b", "/c/b", "org/b@def"),
        ("org/b+org/l", "/c/b+/c/l", "x"),
    ]
    assert find_model("org/a@v1", spellings, "f") == 0
    assert find_model("org/a@abc", spellings, "f") == 0
    assert find_model("org/a", spellings, "f") == 0
    assert find_model("/c/b", spellings, "f") == 1
    assert find_model("org/b+org/l", spellings, "f") == 2
    assert find_model("/s/input_models/b_99", spellings, "f") == 1
    assert find_model("/s/input_models/b_1_l_2_3", spellings, "f") == 2
    for other in ("org/a@v2", "org/c", "/s/b_99", "/s/input_models/bb_99"):
        with pytest.raises(ShoalError, match="is none of this run's models: org/a@v1, org/b, org/b\\+org/l"):
            find_model(other, spellings, "f")
    with pytest.raises(ShoalError, match="may be any of several"):
        find_model("x/q", [("x/q@1", ""), ("x/q@2", "")], "f")


def test_a_start_does_not_depend_on_the_names_of_models(ready: Prepare, save_run: SaveRun) -> None:
    prepared = ready()
    genome = somewhere(prepared)
    plan = replace(prepared.space.decode(genome), models=("x", "y", "z"))
    found, _ = warm_genome(save_run(prepared, plan), prepared.space, prepared.lock.models)
    assert np.abs(found - genome).max() < 1e-9
