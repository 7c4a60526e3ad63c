"""The evaluation plan of a run: every request's tokens, made once, saved beside the journal and used again on resume.

A file of token ids (safetensors; nothing in it can run) with a digest of the texts and of what tokenised them. Where the
digest differs, the plan is made anew. Layouts over the token tree are cut from it for any set of items (`tree`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shoal.evals.requests import ItemRequests
from shoal.evals.tree import Statistics
from shoal.types import ItemIds, Role

VERSION = "1"
Planned = Mapping[tuple[str, Role], Any]  # values have `requests`: item -> ItemRequests


@dataclass(frozen=True)
class Cost:
    """What a set of items costs per candidate. shared: tokens of requests that are not computed again."""

    requests: int
    tokens: int
    shared: int
    logits: int
    pairs: int
    generated: int  # at most


def instances(tasks: Planned) -> Iterator[Any]:
    """Every request of a plan, the gold answers of generation items included, in one fixed order."""
    for key in sorted(tasks):
        for item in sorted(tasks[key].requests):
            one: ItemRequests = tasks[key].requests[item]
            yield from one.instances
            if one.gold is not None:
                yield one.gold


def prepare(lm: Any, tasks: Planned, path: Path | None = None) -> bool:
    """Give `lm` (a ResidentLM) the tokens of every request: from the plan at `path` where it fits, which is returned;
    otherwise they are made, and saved there.
    """
    texts = list(dict.fromkeys(_text(i) for i in instances(tasks)))
    digest = _digest(lm, texts)
    if path is not None and _restore(lm, texts, digest, path):
        return True
    parts = [lm.tokens_of(*text) for text in texts]
    if path is not None:
        flat = [list(p) for pair in parts for p in pair]
        lengths = torch.tensor([len(p) for p in flat], dtype=torch.int32)
        tokens = torch.tensor([t for p in flat for t in p], dtype=torch.int32)
        waiting = path.with_name(f".{path.name}.writing")
        save_file({"tokens": tokens, "lengths": lengths}, waiting, {"version": VERSION, "digest": digest})
        waiting.replace(path)
    return False


def _text(instance: Any) -> tuple[str, str, str]:
    """(kind, first text, second text) of a request."""
    if instance.request_type == "loglikelihood":
        return "pair", instance.args[0], instance.args[1]
    if instance.request_type == "loglikelihood_rolling":
        return "rolling", instance.args[0], ""
    return "prompt", instance.args[0], ""


def _digest(lm: Any, texts: list[tuple[str, str, str]]) -> str:
    return hashlib.sha256(json.dumps([VERSION, lm.tokenizing(), texts]).encode()).hexdigest()


def _restore(lm: Any, texts: list[tuple[str, str, str]], digest: str, path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("digest") != digest:
                return False
            tokens, lengths = file.get_tensor("tokens").tolist(), file.get_tensor("lengths").numpy()
    except (OSError, SafetensorError):
        return False
    ends = np.cumsum(lengths.astype(np.int64)).tolist()
    if len(ends) != 2 * len(texts) or (ends and ends[-1] != len(tokens)):
        return False
    at = 0
    for number, text in enumerate(texts):
        middle, end = ends[2 * number], ends[2 * number + 1]
        lm.remember(*text, (tokens[at:middle], tokens[middle:end]))
        at = end
    return True


def cost(lm: Any, tasks: Planned, items: ItemIds, generate: bool = True) -> Cost:
    """What scoring `items` costs per candidate; nothing is run."""
    chosen: list[Any] = []
    generated = 0
    for key, ids in items.items():
        for item in ids:
            one = tasks[key].requests[item]
            for instance in one.instances:
                if instance.request_type != "generate_until":
                    chosen.append(instance)
                elif generate:
                    generated += lm.most_tokens(instance) * (instance.repeats or 1)
            if one.gold is not None:
                chosen.append(one.gold)
    found: Statistics | None = lm.statistics(chosen) if chosen else None
    if found is None:
        rows = {s.tokens for i in chosen for s in lm.sequences(i)}
        targets = sum(len(s.targets) for i in chosen for s in lm.sequences(i))
        tokens = sum(map(len, rows))
        pairs = sum(len(r) * (len(r) + 1) // 2 for r in rows)
        return Cost(len(chosen), tokens, 0, targets, pairs, generated)
    return Cost(
        len(chosen),
        found.planned,
        max(0, found.requested - found.planned),
        found.logits,
        found.pairs,
        generated,
    )
