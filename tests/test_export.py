"""`shoal export --lm-eval`: what the journal holds, in lm-eval's own files; read back as other tools read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from shoal.cli import app
from shoal.evals.quiet import quiet_libraries
from shoal.export import export_lm_eval
from shoal.recipe import parse_recipe
from shoal.run import evolve

TASKS = [
    {"task": "pico_choice", "metric": "acc", "num_fewshot": 1},
    {"task": "pico_next", "metric": "perplexity", "weight": 0.5},
    {"task": "pico_write", "test": {"size": 50}},
]


@pytest.fixture(scope="module")
def finished(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("runs") / "finished"
    recipe = pico.recipe(tasks=TASKS, search={"budget": 8, "popsize": 4, "items": 16, "seed": 1})
    return run, evolve(parse_recipe(yaml.safe_dump(recipe)), run, device="cpu")


@pytest.fixture(scope="module")
def exported(finished: tuple[Path, dict[str, Any]]) -> dict[str, tuple[Path, ...]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")
        return export_lm_eval(finished[0], bootstrap_iters=100)


def read(files: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Found and named by lm-eval's own functions, in one folder per model."""
    from lm_eval.utils import get_file_task_name, get_results_filenames, get_sample_results_filenames

    names = sorted(str(path) for path in files[0].parent.iterdir())
    assert names == sorted(map(str, files))
    (results,) = get_results_filenames(names)
    samples = {
        get_file_task_name(Path(name).name): [
            json.loads(line) for line in Path(name).read_text().splitlines()
        ]
        for name in get_sample_results_filenames(names)
    }
    return json.loads(Path(results).read_text()), samples


def test_values_are_those_of_the_result(
    finished: tuple[Path, dict[str, Any]], exported: dict[str, tuple[Path, ...]]
) -> None:
    run, result = finished
    expected = {b["name"]: b["tasks"] for b in result["baselines"] if b["kind"] == "parent"}
    expected[result["winner"]["id"]] = result["winner"]["tasks"]
    assert set(exported) == set(expected)
    metrics = {"pico_choice": "acc,none", "pico_next": "perplexity,none", "pico_write": "exact_match,none"}
    for candidate, files in exported.items():
        assert files[0].is_relative_to(run / "lm-eval")
        results, samples = read(files)
        for task, metric in metrics.items():
            assert results["results"][task][metric] == pytest.approx(expected[candidate][task], abs=1e-12)
            assert results["results"][task][metric.replace(",", "_stderr,")] > 0 or expected[candidate][
                task
            ] in (0, 1)
        assert {task: len(rows) for task, rows in samples.items()} == {
            "pico_choice": 120,
            "pico_next": 120,
            "pico_write": 50,
        }
        assert results["n-samples"]["pico_write"] == {"original": 120, "effective": 50}
        assert results["n-shot"] == {"pico_choice": 1, "pico_next": 0, "pico_write": 0}
        assert results["model_source"] == "shoal" and set(results["task_hashes"]) == set(metrics)


def test_samples_are_those_of_stock_lm_eval_without_what_was_not_kept(
    pico: Any, exported: dict[str, tuple[Path, ...]]
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    arguments: dict[str, Any] = {
        "model": "hf",
        "model_args": {"pretrained": str(pico.model("left")), "dtype": "float32"},
        "device": "cpu",
        "batch_size": 16,
        "bootstrap_iters": 0,
        "task_manager": TaskManager(include_path=str(pico.tasks), include_defaults=False),
    }
    with quiet_libraries():
        shot = lm_eval.simple_evaluate(tasks=["pico_choice"], num_fewshot=1, **arguments)
        rest = lm_eval.simple_evaluate(tasks=["pico_next", "pico_write"], **arguments)
    assert shot is not None and rest is not None
    _, samples = read(exported["left"])
    for task, rows in ({**shot["samples"], **rest["samples"]}).items():
        by_item = {row["doc_id"]: row for row in rows}
        for sample in samples[task]:
            stock: Any = by_item[sample["doc_id"]]
            for key in ("doc_hash", "prompt_hash", "target_hash", "filter", "metrics", "doc"):
                assert sample[key] == stock[key]
            assert sample["arguments"]["gen_args_0"]["arg_0"] == stock["arguments"][0][0]
            assert sample["target"] == str(stock["target"])
            assert sample["resps"] == sample["filtered_resps"] == []
            if task != "pico_write":
                expected = [response[0][0] for response in stock["resps"]]
                assert sample["logliks"] == pytest.approx(expected, abs=1e-4)


def test_data_set_readers_read_the_samples(exported: dict[str, tuple[Path, ...]], tmp_path: Path) -> None:
    import datasets

    files = exported["left"]
    with quiet_libraries():
        data = datasets.load_dataset("json", data_files=str(files[1]), split="train", cache_dir=str(tmp_path))
    assert len(data) == 120 and {"doc_id", "doc_hash", "acc"} <= set(data.column_names)


def test_the_command(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = finished
    done = CliRunner().invoke(app, ["export", str(run)])
    assert (done.exit_code, done.stderr) == (2, "error: say as what: --lm-eval\n")
    done = CliRunner().invoke(app, ["export", str(tmp_path), "--lm-eval"])
    assert done.exit_code == 2 and "no run here" in done.stderr
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["export", str(run), "--lm-eval", "-o", str(tmp_path / "file")])
    assert (
        done.exit_code == 2
        and "cannot be written to: File exists" in done.stderr
        and done.stderr.count("\n") == 1
    )
