"""lm-eval tasks of the tiny zoo: generated items in JSON lines, one YAML a task.

| task | kind | question | gold |
| --- | --- | --- | --- |
| tiny_reverse | generate_until | `r:hdcabf>` | `fbacdh`, matched exactly |
| tiny_sort | loglikelihood | `s:hdcabf>` | `abcdfh`, counts when it is the greedy answer |
| tiny_choice | multiple_choice | one or the other, half and half | the answer, against three near misses |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shoal.zoo.folder import Manifest, build_once
from shoal.zoo.skills import LENGTH, Skill, answer, draw, spell

SPLITS = {"train": 300, "validation": 800, "test": 1000}
METRICS = {"tiny_reverse": "exact_match", "tiny_sort": "acc", "tiny_choice": "acc"}
SEED = 20240613
VERSION = 1  # of the items and of the tasks' YAML


def items(seed: int = SEED, splits: Mapping[str, int] = SPLITS) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Per task and split its items; no string occurs twice, in any task or split.

    seed: another one than the zoo's gives other items of the same kind. splits: items of each split.
    """
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    made: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task in METRICS:
        made[task] = {}
        for split, count in splits.items():
            rows: list[dict[str, Any]] = []
            made[task][split] = rows
            while len(rows) < count:
                for string in draw(rng, count, held_out=True):
                    row = _item(task, string, len(rows), rng)
                    if row is not None and row["string"] not in seen and len(rows) < count:
                        seen.add(row["string"])
                        rows.append(row)
    return made


def _item(task: str, letters: Any, index: int, rng: np.random.Generator) -> dict[str, Any] | None:
    """One item of a task, or None where the string does not tell the skills apart."""
    skill: Skill = ("reverse", "sort")[index % 2] if task == "tiny_choice" else task.removeprefix("tiny_")  # type: ignore[assignment]
    string = spell(letters)
    reverse, ordered = (spell(answer(s, letters[None])[0]) for s in ("reverse", "sort"))
    gold, other = (reverse, ordered) if skill == "reverse" else (ordered, reverse)
    at = int(rng.integers(1, LENGTH - 1))
    near = gold[:at] + gold[at + 1] + gold[at] + gold[at + 2 :]
    options = [gold, near, other, string]
    if len(set(options)) < len(options):
        return None
    row: dict[str, Any] = {"string": string, "skill": skill, "prompt": prompt(skill, string), "answer": gold}
    if task == "tiny_choice":
        order = rng.permutation(len(options))
        row |= {"options": [options[i] for i in order], "gold": int(np.argmin(order))}
    return row


def prompt(skill: Skill, string: str) -> str:
    return f"{skill[0]}:{string}>"


def build_tasks(folder: Path, progress: Callable[[str, float], None] | None = None) -> Manifest:
    """Write the tasks alone to `folder`, or take those that are there; return their manifest.

    They come from a generator with a seed, so they are those of any zoo of this version, and need no training.
    """

    def build(building: Path) -> Manifest:
        if progress is not None:
            progress("writing tasks", 0.0)
        write_tasks(building, folder)
        return {}

    return build_once(folder, {"zoo": "tiny tasks", "version": VERSION}, build)


def write_tasks(
    folder: Path, address: Path | None = None, seed: int = SEED, splits: Mapping[str, int] = SPLITS
) -> None:
    """Write YAMLs and items to `folder`; the YAMLs name the items by their absolute place under `address`.

    address: where the folder will be in the end, `folder` itself by default. seed, splits: as in `items`.
    """
    import yaml

    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for task, made in items(seed, splits).items():
        for split, rows in made.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (data / f"{task}-{split}.jsonl").write_text(text, encoding="utf-8")
        config = _config(task, (address or folder).absolute() / "data")
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _config(task: str, data: Path) -> dict[str, Any]:
    """The task as lm-eval reads it."""
    kinds: dict[str, dict[str, Any]] = {
        "tiny_reverse": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": LENGTH + 2, "do_sample": False},
        },
        "tiny_sort": {"output_type": "loglikelihood", "doc_to_target": "{{answer}}"},
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "gold",
        },
    }
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(data / f"{task}-{split}.jsonl") for split in SPLITS}},
        "training_split": "train",
        "validation_split": "validation",
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_delimiter": "\n",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
        **kinds[task],
        "metric_list": [{"metric": METRICS[task], "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
