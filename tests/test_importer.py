"""`shoal import`: searches of mergekit-evolve become recipes that can be run, and what changes is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from shoal.cli import app
from shoal.importer import import_config, warm_start_path, write_import
from shoal.mergekit_evolve import METHOD_GENES, load_evolve_config
from shoal.preflight import prepare, space_of
from shoal.recipe import load_recipe
from shoal.run import evolve

TASKS = [{"name": "pico_choice", "weight": 2.0}, "pico_next"]
GENOMES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "blocks": {"layer_granularity": 2},
    "layers": {"layer_granularity": 1},
    "types": {"layer_granularity": 2, "filters": ["self_attn", "mlp"]},
    "smooth": {"layer_granularity": 2, "smooth": True},
}
CASES = [
    (method, name)
    for method in METHOD_GENES
    for name, genome in GENOMES.items()
    if method != "slerp" or not {"filters", "smooth"} & set(genome)
]


def genome(deep: Any, method: str, **changes: Any) -> dict[str, Any]:
    models = {"models": [str(deep.model("left")), str(deep.model("right"))], "merge_method": method}
    base = {} if method in ("linear", "slerp") else {"base_model": str(deep.model("base"))}
    return {**models, **base, **changes}


def written(folder: Path, genome: dict[str, Any], **changes: Any) -> Path:
    path = folder / "evo.yml"
    path.write_text(yaml.safe_dump({"genome": genome, "tasks": TASKS, **changes}))
    return path


def best_config(definition: dict[str, Any], seed: int = 0) -> tuple[str, Any]:
    """What mergekit-evolve writes as best_config.yaml for a random genotype, and the genotype [block, model, set, gene]."""
    import torch
    from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition

    theirs = ModelGenome(ModelGenomeDefinition.model_validate(definition))
    shape = theirs.initial_genotype().shape
    genotype = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1
    return theirs.genotype_merge_config(genotype).to_yaml(), genotype.double().numpy()


@pytest.mark.parametrize(("method", "name"), CASES)
def test_every_method_becomes_a_recipe_that_can_be_run(
    deep: Any, tmp_path: Path, method: str, name: str
) -> None:
    path = written(tmp_path, genome(deep, method, **GENOMES[name]), limit=20)
    out = tmp_path / "recipe.yaml"
    imported = import_config(path, include_path=str(deep.tasks), recipe_path=out)
    write_import(imported, out)
    recipe = load_recipe(out)
    assert recipe == imported.recipe
    prepared = prepare(recipe, tmp_path)
    assert recipe.search.items == 20 and recipe.search.budget == 100
    assert [(t.task, t.weight) for t in recipe.tasks] == [("pico_choice", 2.0), ("pico_next", 1.0)]
    assert all(task.roles["search"].split == "validation" for task in prepared.lock.tasks)
    assert prepared.lock.dtype == "bfloat16"
    blocks = {"uniform": 1, "blocks": 2, "layers": 4, "types": 2, "smooth": 2}[name]
    sets = 2 if name == "types" else 1
    if method == "slerp":
        assert prepared.space.size == blocks
    elif name == "smooth" and len(METHOD_GENES[method]) > 1:
        assert prepared.space.size == 2 * (blocks + 1)  # a curve of weights, one density
    else:
        assert prepared.space.size == 2 * blocks * sets * len(METHOD_GENES[method])
    assert (prepared.space.low >= 0).all() or name == "smooth"


@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case[1] != "smooth"])
def test_a_best_config_is_where_the_search_starts(deep: Any, tmp_path: Path, method: str, name: str) -> None:
    definition = genome(deep, method, **GENOMES[name])
    text, genotype = best_config(definition)
    (tmp_path / "best_config.yaml").write_text(text)
    out = tmp_path / "recipe.yaml"
    imported = import_config(
        written(tmp_path, definition),
        best=tmp_path / "best_config.yaml",
        include_path=str(deep.tasks),
        recipe_path=out,
    )
    (note,) = write_import(imported, out)
    recipe = load_recipe(out)
    assert recipe.search.warm_start == "./recipe.warm_start.yml"
    assert ("; exact" in note) == (name == "uniform")
    assert ("layers exact" in note) == (name != "uniform")
    prepared = prepare(recipe, tmp_path)
    from shoal.warm import warm_genome

    start, _ = warm_genome(warm_start_path(out), prepared.space, prepared.lock.models)
    table = prepared.space.values(start)
    rows = dict(zip(table.rows, table.values[:, :4], strict=True))
    repeat = 4 // genotype.shape[0]
    if method == "slerp":
        chosen = np.exp(genotype[:, :, 0, 0])
        expected = chosen[:, 1] / chosen.sum(axis=1)  # the share of the second model
        assert rows["t"] == pytest.approx(np.repeat(expected, repeat), abs=1e-6)
        return
    kinds = ["attn", "mlp"] if name == "types" else [""]
    for position, model in enumerate(("left", "right")):
        for index, parameter in enumerate(METHOD_GENES[method]):
            for number, kind in enumerate(kinds):
                row = f"{parameter}[{model}]" + (f".{kind}" if kind else "")
                expected = np.repeat(genotype[:, position, number, index], repeat)
                assert rows[row] == pytest.approx(expected, abs=1e-6), row


def test_a_smooth_best_config_is_projected_with_what_is_lost(deep: Any, tmp_path: Path) -> None:
    definition = genome(deep, "task_arithmetic", layer_granularity=2, smooth=True)
    (tmp_path / "best.yaml").write_text(best_config(definition)[0])
    out = tmp_path / "recipe.yaml"
    imported = import_config(written(tmp_path, definition), best=tmp_path / "best.yaml", recipe_path=out)
    (note,) = write_import(imported, out)
    assert "not in the curve space, projected: some parameter of a layer is off by 0.0" in note


def test_a_run_starts_from_a_best_config(deep: Any, tmp_path: Path) -> None:
    definition = genome(deep, "task_arithmetic", layer_granularity=2)
    text, genotype = best_config(definition)
    (tmp_path / "best.yaml").write_text(text)
    out = tmp_path / "recipe.yaml"
    imported = import_config(
        written(tmp_path, definition, limit=8), best=tmp_path / "best.yaml", include_path=str(deep.tasks), budget=8,
        recipe_path=out,
    )  # fmt: skip
    write_import(imported, out)
    recipe = load_recipe(out)
    evolve(recipe, tmp_path / "run", base_folder=tmp_path, device="cpu")
    lock = yaml.safe_load((tmp_path / "run" / "lock.yaml").read_text())
    assert lock["search"]["x0"] == pytest.approx(genotype[:, :, 0, 0].T.ravel(), abs=1e-6)


def test_copies_of_input_models_are_recognised(deep: Any, tmp_path: Path) -> None:
    definition = genome(deep, "ties")
    copies = {str(deep.model(name)): f"/gone/input_models/{name}_12345" for name in ("base", "left", "right")}
    text = best_config(definition)[0]
    for model, copy in copies.items():
        text = text.replace(model, copy)
    assert "/gone/" in text and str(deep.folder) not in text
    (tmp_path / "best.yaml").write_text(text)
    out = tmp_path / "recipe.yaml"
    imported = import_config(written(tmp_path, definition), best=tmp_path / "best.yaml", recipe_path=out)
    assert write_import(imported, out)[0].endswith("; exact")


def test_changes_in_meaning_are_said_line_by_line_and_written_above_their_keys(
    deep: Any, tmp_path: Path
) -> None:
    path = written(
        tmp_path,
        genome(deep, "dare_ties", layer_granularity=2, filters=["q_proj", "norm"], allow_negative_weights=True),
        limit=30, shuffle=True, random_init=True, num_fewshot=2,
    )  # fmt: skip
    result = CliRunner().invoke(app, ["import", str(path), "-o", str(tmp_path / "r.yaml")])
    assert result.exit_code == 0, result.output
    for words in (
        "genome.layer_granularity: 2 blocks of 2 layers, as there; embeddings go with the first block",
        "genome.filters: 'q_proj' is a part of attn and shares its genes",
        "genome.filters: 'norm' gets no genes of its own",
        "genome.allow_negative_weights: weights stay within [-0.5, 1.5]",
        "genome.normalize: weights are divided by their sum",
        "there it starts at 1",
        "random masks are drawn once per run",
        "limit: there the first 30 items",
        "shuffle: gone",
        "random_init: gone",
        "`objective: metric` searches by the metrics",
        "chosen on selection items",
        "apply_chat_template: false: the tokenizer has no chat template",
    ):
        assert words in result.stdout
    text = (tmp_path / "r.yaml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert max(map(len, comments)) <= 120
    for change in import_config(path).changes:
        assert f"# {change.key}: {change.text[:30]}" in text
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.space.tensor_types == ("attn", "mlp") and recipe.space.bounds["weight"] == (-0.5, 1.5)
    assert recipe.merge.parameters == {"normalize": True}
    assert [task.num_fewshot for task in recipe.tasks] == [2, 2]


def test_without_o_the_recipe_is_printed_alone(deep: Any, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["import", str(written(tmp_path, genome(deep, "linear")))])
    assert result.exit_code == 0, result.output
    (tmp_path / "r.yaml").write_text(result.stdout)
    assert load_recipe(tmp_path / "r.yaml").merge.method == "linear"
    assert "tasks.metric: " in result.stderr


def test_nothing_is_written_over_or_left_behind(deep: Any, tmp_path: Path) -> None:
    path, out = written(tmp_path, genome(deep, "linear")), tmp_path / "r.yaml"
    out.write_text("mine")
    result = CliRunner().invoke(app, ["import", str(path), "-o", str(out)])
    assert result.exit_code == 2 and "exists already" in result.stderr
    assert out.read_text() == "mine"
    wrong = yaml.safe_load(best_config(genome(deep, "linear"))[0])
    wrong["parameters"]["normalize"] = False
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(wrong))
    before = sorted(tmp_path.iterdir())
    arguments = ["import", str(path), "-o", str(tmp_path / "new.yaml"), "--best", str(tmp_path / "best.yaml")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "normalize: false, this run has normalize: true" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_checked_tasks_name_the_split_or_allow_the_only_one(deep: Any, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    shutil.copytree(deep.tasks, tasks)
    only = json.loads((tasks / "pico_choice.yaml").read_text()) | {"task": "pico_only"}
    del only["training_split"], only["validation_split"]
    (tasks / "pico_only.yaml").write_text(json.dumps(only))
    path = written(tmp_path, genome(deep, "linear"), tasks=["pico_only", "pico_next"])
    out = tmp_path / "r.yaml"
    arguments = ["import", str(path), "-o", str(out), "--include-path", str(tasks), "--check-tasks"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "pico_next: searched on split 'validation', tested on 'test'" in result.stdout
    assert "pico_only: has no split but 'test', which lm-eval scores" in result.stdout
    recipe = load_recipe(out)
    assert [task.search_on_eval_split for task in recipe.tasks] == [True, False]
    alone = written(tmp_path, genome(deep, "linear"), tasks=["pico_only"])
    lock = prepare(import_config(alone, include_path=str(tasks), check_tasks=True).recipe, tmp_path).lock
    assert lock.tasks[0].search_on_eval_split


def test_a_metric_that_the_task_does_not_have_is_found_by_checking(deep: Any, tmp_path: Path) -> None:
    path = written(tmp_path, genome(deep, "linear"), tasks=[{"name": "pico_next", "metric": "acc_norm,none"}])
    arguments = ["import", str(path), "--include-path", str(deep.tasks), "--check-tasks"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "does not produce metric 'acc_norm,none'" in result.stderr


def test_relative_folders_are_found_from_anywhere(
    deep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(deep.folder)
    path = written(
        tmp_path, {"models": ["left", "./right"], "base_model": "base", "merge_method": "task_arithmetic"}
    )
    imported = import_config(path, recipe_path=tmp_path / "r.yaml")
    assert imported.recipe.models == (str(deep.model("left")), str(deep.model("right")))
    monkeypatch.chdir(tmp_path)
    assert space_of(imported.recipe, tmp_path)[0].size == 2


def test_models_of_the_hub_need_no_network(tmp_path: Path) -> None:
    hub = {"models": ["org/a@v1", {"model": "org/b", "lora": "org/c"}], "base_model": "org/base"}
    path = written(tmp_path, {**hub, "merge_method": "ties", "layer_granularity": 4})
    with pytest.raises(
        Exception, match=r"how many layers org/a@v1 has is not known on this machine; .*--layers"
    ):
        import_config(path)
    recipe = import_config(path, layers=32).recipe
    assert recipe.models == ("org/a@v1", "org/b+org/c") and recipe.space.blocks == 8
    assert recipe.evaluation.apply_chat_template and recipe.evaluation.fewshot_as_multiturn


def test_the_base_among_the_models_is_only_the_base(deep: Any, tmp_path: Path) -> None:
    base, left, right = (str(deep.model(name)) for name in ("base", "left", "right"))
    path = written(tmp_path, {"models": [base, left, right], "base_model": base, "merge_method": "ties"})
    imported = import_config(path)
    assert imported.recipe.models == (left, right) and imported.recipe.base_model == base
    assert any("its genes did nothing" in change.text for change in imported.changes)
    path = written(tmp_path, {"models": [base, left], "base_model": base, "merge_method": "linear"})
    assert import_config(path).recipe.models == (base, left)


def test_directions_and_weights_of_tasks(deep: Any, tmp_path: Path) -> None:
    tasks = [
        {"name": "a", "metric": "word_perplexity,none", "weight": -0.5},
        {"name": "b", "metric": "perplexity,none"},
        {"name": "c", "weight": 0},
    ]
    imported = import_config(written(tmp_path, genome(deep, "linear"), tasks=tasks))
    assert [(t.task, t.weight) for t in imported.recipe.tasks] == [("a", 0.5), ("b", 1.0)]
    said = " ".join(change.text for change in imported.changes)
    assert (
        "there a higher perplexity,none counted as better" in said
        and "c has weight 0 and is left out" in said
    )


GOOD = {"models": ["org/a", "org/b"], "merge_method": "linear"}
BASED = {**GOOD, "base_model": "org/base", "merge_method": "ties"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tasks": ["t"]}, "key 'genome' is missing"),
        ({"genome": GOOD}, "key 'tasks' is missing"),
        ({"genome": GOOD, "tasks": []}, "tasks: .*at least 1 item"),
        ({"genome": GOOD, "tasks": ["t"], "limits": 3}, "unknown key 'limits' at 'limits'; did you mean 'limit'"),
        ({"genome": {**GOOD, "granularity": 4}, "tasks": ["t"]}, "did you mean 'layer_granularity'"),
        ({"genome": GOOD, "tasks": [{"name": "t", "wieght": 2}]}, "unknown key 'wieght' at 'tasks.0.wieght'; did you mean 'weight'"),
        ({"genome": {**GOOD, "merge_method": "lineer"}, "tasks": ["t"]}, "'lineer' is none of mergekit-evolve's; did you mean 'linear'"),
        ({"genome": {**GOOD, "merge_method": "della"}, "tasks": ["t"]}, "'della' is none of mergekit-evolve's"),
        ({"genome": {**GOOD, "merge_method": "ties"}, "tasks": ["t"]}, "'ties' needs base_model"),
        ({"genome": {**GOOD, "merge_method": "slerp", "smooth": True}, "tasks": ["t"]}, "neither smooth nor filters for slerp"),
        ({"genome": {"models": ["a", "b", "c"], "merge_method": "slerp"}, "tasks": ["t"]}, "slerp of 3 models picks two per block"),
        ({"genome": {"models": [], "merge_method": "linear"}, "tasks": ["t"]}, "genome.models: .*at least 1 item"),
        ({"genome": {"models": ["a"], "merge_method": "linear"}, "tasks": ["t"]}, "at least two models, found 1"),
        ({"genome": {"models": [{"path": "a"}], "merge_method": "linear"}, "tasks": ["t"]}, "expected a model as text"),
        ({"genome": {"models": [7], "merge_method": "linear"}, "tasks": ["t"]}, "genome.models.0: .*found 7"),
        ({"genome": {**GOOD, "layer_granularity": "many"}, "tasks": ["t"]}, "genome.layer_granularity: .*found 'many'"),
        ({"genome": {**BASED, "filters": ["bananas"]}, "tasks": ["t"]}, "'bananas' fits no tensor type of a recipe"),
        ({"genome": GOOD, "tasks": ["t", {"name": "t", "metric": "acc_norm,none"}]}, "'t' is named twice"),
        ({"genome": GOOD, "tasks": [{"name": "t", "weight": -1}]}, "a recipe's weights are positive"),
        ({"genome": GOOD, "tasks": [{"name": "t", "weight": 0}]}, "none has a weight"),
        ({"genome": GOOD, "tasks": ["t"], "limit": 0}, "limit: .*greater than 0, found 0"),
        ({"genome": {**GOOD, "tokenizer_source": "org/x"}, "tasks": ["t"]}, "'org/x' is none of the models"),
        ({"genome": {**GOOD, "models": ["org/a", "org/a"]}, "tasks": ["t"]}, "'org/a' is named 2 times"),
        ({"merge_method": "linear", "models": []}, "one merge of mergekit's, not a search"),
        ({"name": "x", "models": ["a"], "tasks": [{"task": "t"}]}, "a recipe of shoal already"),
        (["genome"], "expected a mapping with genome and tasks, found list"),
    ],
)  # fmt: skip
def test_a_broken_configuration_is_one_clear_line(tmp_path: Path, config: Any, message: str) -> None:
    import re

    path = tmp_path / "evo.yml"
    path.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["import", str(path)])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert re.search(message, result.stderr), result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"genome: [", "evo.yml:1:10: not valid YAML"),
        (b"\xff\xfe\x00g", "no text in UTF-8"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_no_yaml_is_one_clear_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "evo.yml"
    if content is not None:
        path.write_bytes(content)
    result = CliRunner().invoke(app, ["import", str(path)])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_number_of_layers_that_does_not_divide_is_refused(deep: Any, tmp_path: Path) -> None:
    path = written(tmp_path, genome(deep, "ties", layer_granularity=3))
    result = CliRunner().invoke(app, ["import", str(path)])
    assert result.exit_code == 2 and "4 layers are no multiple of 3" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "ties"}, "merges by ties, the search is by task_arithmetic"),
        ({"base_model": "org/other"}, "model 'org/other' is none of this run's models"),
        ({"genome": {}}, "an evolution for mergekit-evolve"),
    ],
)
def test_a_best_config_of_another_search_is_refused(
    deep: Any, tmp_path: Path, change: Any, message: str
) -> None:
    import re

    definition = genome(deep, "task_arithmetic")
    content = yaml.safe_load(best_config(definition)[0]) | change
    if "genome" in change:
        content = change
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(content))
    arguments = ["import", str(written(tmp_path, definition)), "--best", str(tmp_path / "best.yaml")]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "r.yaml")])
    assert result.exit_code == 2 and re.search(message, result.stderr), result.output
    assert not (tmp_path / "r.yaml").exists()


def test_defaults_and_fields_are_mergekit_evolves() -> None:
    from mergekit.evo.config import EvolMergeConfiguration, TaskConfiguration
    from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenomeDefinition

    from shoal.mergekit_evolve import EvolveConfig, EvolveTask, Genome

    for ours, theirs in (
        (EvolveConfig, EvolMergeConfiguration),
        (EvolveTask, TaskConfiguration),
        (Genome, ModelGenomeDefinition),
    ):
        assert set(ours.model_fields) == set(theirs.model_fields)
        for name, field in theirs.model_fields.items():
            assert ours.model_fields[name].default == field.default, name
    assert {method: list(genes) for method, genes in METHOD_GENES.items()} == METHOD_PARAM_MAPS


def test_a_configuration_is_read_as_mergekit_reads_it(tmp_path: Path) -> None:
    from mergekit.evo.config import EvolMergeConfiguration

    data = {
        "genome": {**BASED, "models": ["org/a@v1", "org/b+org/c"], "normalize": False, "filters": ["mlp"]},
        "tasks": ["x", {"name": "y", "weight": "0.5", "metric": "acc_norm,none"}],
        "limit": "25",
    }
    (tmp_path / "evo.yml").write_text(yaml.safe_dump(data))
    theirs = EvolMergeConfiguration.model_validate(data).model_dump(mode="json")
    assert load_evolve_config(tmp_path / "evo.yml").model_dump(mode="json") == theirs
