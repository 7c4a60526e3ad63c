"""Reads the public evaluation files from the folder that the environment variable SHOAL_DATA names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

BLIMP = (
    "anaphor_gender_agreement",
    "anaphor_number_agreement",
    "determiner_noun_agreement_1",
    "existential_there_quantifiers_1",
    "irregular_past_participle_verbs",
    "principle_A_case_1",
    "regular_plural_subject_verb_agreement_1",
    "wh_island",
)


def addition(**_: Any) -> Any:
    return {"validation": _dataset(_arithmetic("two_digit_addition"))}


def subtraction(**_: Any) -> Any:
    return {"validation": _dataset(_arithmetic("two_digit_subtraction"))}


def blimp(**_: Any) -> Any:
    """The eight sets in turn, so that every cut of the items has its share of each."""
    columns = ("sentence_good", "sentence_bad", "UID")
    sets = [[{key: row[key] for key in columns} for row in _rows("blimp", name)] for name in BLIMP]
    return {"train": _dataset([row for rows in zip(*sets, strict=True) for row in rows])}


def _arithmetic(name: str) -> list[dict[str, str]]:
    """Items with their questions written as lm-eval's own arithmetic tasks write them."""
    return [
        {
            "context": row["context"]
            .strip()
            .replace("\n\n", "\n")
            .replace("Q:", "Question:")
            .replace("A:", "Answer:"),
            "completion": row["completion"],
        }
        for row in _rows("arithmetic", name)
    ]


def _rows(folder: str, name: str) -> list[dict[str, str]]:
    data = os.environ.get("SHOAL_DATA")
    wanted = f"{folder}/{name}.jsonl"
    origin = (
        "arithmetic/*.jsonl are the files of the same names in github.com/openai/gpt-3/data, blimp/*.jsonl those in"
        " github.com/alexwarstadt/blimp/data"
    )
    if not data:
        raise RuntimeError(
            f"SHOAL_DATA is not set: name the folder that holds {wanted} by this environment variable; {origin}"
        )
    path = Path(data).expanduser() / wanted
    if not path.is_file():
        raise RuntimeError(f"no file {path}: SHOAL_DATA is {data!r}, expected {wanted} in it; {origin}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _dataset(rows: list[dict[str, str]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)
