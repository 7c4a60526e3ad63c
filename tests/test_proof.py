"""What is claimed belongs to what is written: stock transformers, stock lm-eval and mergekit's own command line agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from shoal.cli import app
from shoal.lock import load_lock
from shoal.merge import Checkpoint, weights_sha256


@pytest.fixture(scope="module")
def proven(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A finished run in bfloat16 whose winner is a merge, its model folder, its result."""
    folder = tmp_path_factory.mktemp("proof")
    recipe = pico.recipe(
        merge={"method": "task_arithmetic", "dtype": "bfloat16"},
        tasks=[{"task": "pico_choice"}, {"task": "pico_next", "metric": "acc"}, {"task": "pico_write"}],
        evaluation={"include_path": str(pico.tasks), "model_args": {"dtype": "float32"}},
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = folder / "run"
    result = CliRunner().invoke(app, ["evolve", str(folder / "recipe.yaml"), "--run", str(run), "--quiet"])
    assert result.exit_code == 0, result.output
    found = json.loads((run / "result.json").read_text())
    result = CliRunner().invoke(app, ["merge", str(run), "-o", str(folder / "model")])
    assert result.exit_code == 0, result.output
    return run, folder / "model", found


def test_the_folder_loads_and_its_weights_are_the_hashed_ones(
    proven: tuple[Path, Path, dict[str, Any]],
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder, result = proven
    checkpoint = Checkpoint.open(folder)
    assert (
        weights_sha256((name, checkpoint.tensor(name)) for name in checkpoint.names)
        == result["weights_sha256"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


# in a process that never imports shoal; not by `python -m lm_eval`, which reads all 15,000 files of lm-eval's own tasks
STOCK = """
import json, sys
from pathlib import Path
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

model, tasks, out, *names = sys.argv[1:]
found = simple_evaluate(
    model="hf",
    model_args={"pretrained": model, "dtype": "float32"},
    tasks=names,
    batch_size=16,
    device="cpu",
    log_samples=True,
    bootstrap_iters=0,
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
)
Path(out).write_text(json.dumps(found["samples"], default=str))
"""


def test_stock_lm_eval_gives_our_rows_and_our_table_follows_from_them(
    pico: Any, proven: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    from shoal.journal import Journal

    run, folder, result = proven
    names = ["pico_choice", "pico_next", "pico_write"]
    arguments = [str(folder), str(pico.tasks), str(tmp_path / "samples.json"), *names]
    ended = subprocess.run(
        [sys.executable, "-c", STOCK, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    stock = json.loads((tmp_path / "samples.json").read_text())
    lock = load_lock(run / "lock.yaml")
    journal = Journal(run / "journal.sqlite")
    ours = {(row.task, row.item): row for row in journal.scores(result["winner"]["id"], "test")}
    journal.close()
    means = {}
    for task in lock.tasks:
        samples = {row["doc_id"]: row for row in stock[task.task]}
        items = task.roles["test"].items
        metric = task.metric.partition(",")[0]
        for item in items:
            row = ours[task.task, item]
            assert row.metrics[task.metric] == samples[item][metric]
            if task.output_type != "generate_until":
                values = [response[0][0] for response in samples[item]["resps"]]
                assert row.logliks == pytest.approx(values, abs=1e-3)
        means[task.task] = sum(samples[item][metric] for item in items) / len(items)
    assert result["winner"]["tasks"] == pytest.approx(means)
    assert result["winner"]["score"] == pytest.approx(sum(means.values()) / 3)


def test_mergekits_own_command_line_makes_the_same_weights(
    proven: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    import torch

    run, folder, _ = proven
    command = [
        sys.executable,
        "-m",
        "mergekit.scripts.run_yaml",
        str(run / "best" / "mergekit_config.yml"),
        str(tmp_path),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    ours, theirs = Checkpoint.open(folder), Checkpoint.open(tmp_path)
    assert ours.names == theirs.names
    for name in ours.names:
        a, b = ours.tensor(name), theirs.tensor(name)
        assert a.dtype == b.dtype == torch.bfloat16
        # 1 ulp of bfloat16 (8 bits), or the float32 bound near zero
        allowed = torch.maximum(a.float().abs() * 2**-7, a.float().abs().max() * 1e-6)
        assert ((a.float() - b.float()).abs() <= allowed).all(), name


def test_any_candidate_can_be_written_and_names_that_do_not_exist_are_refused(
    proven: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, folder, _ = proven
    runner = CliRunner()
    assert (
        runner.invoke(app, ["merge", str(run), "-o", str(tmp_path / "c"), "--candidate", "g001c02"]).exit_code
        == 0
    )
    assert Checkpoint.open(tmp_path / "c").names == Checkpoint.open(folder).names
    missing = runner.invoke(app, ["merge", str(run), "-o", str(tmp_path / "d"), "--candidate", "g001c2"])
    assert missing.exit_code == 2 and "did you mean 'g001c02'" in missing.stderr
    again = runner.invoke(app, ["merge", str(run), "-o", str(folder)])
    assert again.exit_code == 2 and "exists and is not empty" in again.stderr


def test_a_plain_mergekit_yaml_is_merged(pico: Any, tmp_path: Path) -> None:
    config = {
        "merge_method": "linear",
        "models": [{"model": str(pico.model(n)), "parameters": {"weight": 0.5}} for n in ("left", "right")],
        "dtype": "float32",
    }
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "merge.yml"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    left, right, out = (
        Checkpoint.open(p) for p in (pico.model("left"), pico.model("right"), tmp_path / "out")
    )
    for name in out.names:
        mean = (left.tensor(name) + right.tensor(name)) / 2
        assert (out.tensor(name) - mean).abs().max() <= 1e-6 * mean.abs().max()


def test_plots_and_table_are_made(proven: tuple[Path, Path, dict[str, Any]]) -> None:
    run, _, result = proven
    assert (run / "convergence.png").read_bytes().startswith(b"\x89PNG")
    if "@" in result["winner"]["id"]:
        assert (run / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_score_prints_the_table_of_one_model(pico: Any) -> None:
    command = [
        "score",
        str(pico.model("left")),
        "--tasks",
        "pico_choice,pico_next",
        "--include-path",
        str(pico.tasks),
    ]
    result = CliRunner().invoke(app, [*command, "--limit", "20"])
    assert result.exit_code == 0, result.output
    assert "acc,none" in result.stdout and "20" in result.stdout and "lower is better" in result.stdout
    refused = CliRunner().invoke(
        app, ["score", str(pico.model("left")), "--tasks", "pico_chioce", "--include-path", str(pico.tasks)]
    )
    assert refused.exit_code == 2 and "did you mean 'pico_choice'" in refused.stderr
