"""Check a finished run with other people's tools: transformers, stock lm-eval, mergekit's command line.

    python benchmarks/agree.py RUN [--json FILE]

Writes the winner to a temporary folder; loads it with transformers; scores the full tasks with `lm_eval --model hf` and
compares its rows with the journal's, item by item, and the table with the means over the lock's test items; and lets
mergekit merge RUN/best/mergekit_config.yml and compares the weights. Exit code 1 if anything disagrees.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shoal.journal import Journal
from shoal.lock import load_lock
from shoal.merge import Checkpoint, weights_sha256
from shoal.merge_run import write_candidate
from shoal.recipe import load_recipe
from shoal.report import load_result


def stock_rows(run: Path, model: Path, out: Path) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's own samples per task, of its command line."""
    lock, evaluation = load_lock(run / "lock.yaml"), load_recipe(run / "recipe.yaml").evaluation
    tasks = [task.task for task in lock.tasks]
    shots = {task.num_fewshot for task in lock.tasks}
    moved = [
        t.task for t in lock.tasks if t.roles["test"].task != t.task or t.roles["test"].split != t.eval_split
    ]
    if len(shots) > 1 or moved or any(task.fewshot_hashes for task in lock.tasks):
        sys.exit(
            "stock lm-eval has no words for this run: several few-shot numbers, set-aside examples, or other splits"
        )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
    ]
    command += [
        "--tasks",
        ",".join(tasks),
        "--log_samples",
        "--output_path",
        str(out),
        "--batch_size",
        "64",
        "--device",
        "cpu",
    ]
    command += ["--include_path", str(lock.include_path)] if lock.include_path else []
    command += ["--num_fewshot", str(shots.pop()), "--seed", f"0,1234,1234,{lock.seeds.fewshot}"]
    command += ["--apply_chat_template"] if evaluation.apply_chat_template else []
    command += ["--fewshot_as_multiturn", "true"] if evaluation.fewshot_as_multiturn else []
    command += (
        ["--system_instruction", evaluation.system_instruction] if evaluation.system_instruction else []
    )
    command += ["--gen_kwargs", json.dumps(evaluation.gen_kwargs)] if evaluation.gen_kwargs else []
    subprocess.run(
        command, check=True, capture_output=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    )
    rows = {}
    for task in tasks:
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        rows[task] = [json.loads(line) for line in file.read_text().splitlines()]
    return rows


def compare_scores(run: Path, rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    lock, result = load_lock(run / "lock.yaml"), load_result(run)
    journal = Journal(run / "journal.sqlite")
    ours = {(row.task, row.item): row for row in journal.scores(result["winner"]["id"], "test")}
    journal.close()
    found = []
    for task in lock.tasks:
        metric, _, wanted = task.metric.partition(",")
        samples = {row["doc_id"]: row for row in rows[task.task] if row["filter"] == wanted}
        items = task.roles["test"].items
        flips, worst = 0, 0.0
        for item in items:
            flips += ours[task.task, item].metrics[task.metric] != samples[item][metric]
            if task.output_type != "generate_until":
                stock = [float(response[0][0]) for response in samples[item]["resps"]]
                worst = max(
                    worst, *(abs(a - b) for a, b in zip(ours[task.task, item].logliks, stock, strict=True))
                )
        mean = sum(samples[item][metric] for item in items) / len(items)
        found.append(
            {
                "what": f"lm-eval {task.task}",
                "items": len(items),
                "flips": int(flips),
                "largest_loglik_difference": worst,
                "table": result["winner"]["tasks"][task.task],
                "from_stock_rows": mean,
                "agrees": bool(
                    not flips and worst <= 1e-3 and abs(mean - result["winner"]["tasks"][task.task]) < 1e-9
                ),
            }
        )
    return found


def compare_weights(run: Path, model: Path, out: Path) -> dict[str, Any]:
    import torch

    config = run / "best" / "mergekit_config.yml"
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), str(out)]
    if "+" in config.read_text():
        command += ["--lora-merge-dtype", "float32", "--lora-merge-cache", str(out.parent / "lora")]
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = Checkpoint.open(model), Checkpoint.open(out)
    bits = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
    worst, beyond = 0.0, 0
    for name in ours.names:
        dtype = ours.tensor(name).dtype
        a, b = ours.tensor(name).float(), theirs.tensor(name).float()
        largest = float(a.abs().max()) or 1.0
        worst = max(worst, float((a - b).abs().max()) / largest)
        ulp = 0.0 if dtype == torch.float32 else 2.0 ** -bits[dtype]
        beyond += int(((a - b).abs() > torch.clamp(a.abs() * ulp, min=1e-6 * largest)).sum())
    return {
        "what": "mergekit's command line",
        "tensors": len(ours.names),
        "largest_error_of_largest_value": worst,
        "elements_beyond_the_rule": beyond,
        "agrees": beyond == 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_candidate(arguments.run, model)
        checkpoint = Checkpoint.open(model)
        found = weights_sha256((name, checkpoint.tensor(name)) for name in checkpoint.names)
        rows: list[dict[str, Any]] = [
            {"what": "weights_sha256", "agrees": found == load_result(arguments.run)["weights_sha256"]}
        ]
        rows += compare_scores(arguments.run, stock_rows(arguments.run, model, Path(folder) / "lm_eval"))
        if load_lock(arguments.run / "lock.yaml").operator.startswith(("dare", "della")):
            print("exempt  mergekit's command line: it draws other random masks, as the YAML says")
        else:
            rows.append(compare_weights(arguments.run, model, Path(folder) / "mergekit"))
    for row in rows:
        details = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("what", "agrees"))
        print(f"{'agrees' if row['agrees'] else 'DIFFERS'}  {row['what']}  {details}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(not all(row["agrees"] for row in rows))


if __name__ == "__main__":
    main()
