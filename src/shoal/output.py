"""What a run writes out: the winner as mergekit YAML, as a plan, and as a model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shoal.lock import Lock, write_text
from shoal.models import open_parents
from shoal.recipe import Recipe
from shoal.types import MergePlan


def plan_tensors(lock: Lock, plan: MergePlan) -> Iterator[tuple[str, Any]]:
    """The canonical weights of a plan as (checkpoint name, tensor)."""
    from shoal.merge.resident import Merger
    from shoal.preflight import groups_of

    return Merger(open_parents(lock.models), groups_of(lock.models)).tensors(plan)


def winner_sha256(lock: Lock, plan: MergePlan) -> str:
    from shoal.merge.hashing import weights_sha256

    return weights_sha256(plan_tensors(lock, plan))


def mergekit_references(lock: Lock) -> Sequence[str]:
    """Each model as mergekit names it: Hub ids with their commit, else the folder; `+adapter` for LoRA.

    A merge of ours is its float32 copy in the cache.
    """
    references = []
    for model in lock.models:
        base, _, adapter = model.ref.partition("+")
        on_hub = model.commit is not None and model.merge is None
        text = f"{base.partition('@')[0]}@{model.commit}" if on_hub else model.folder
        if model.adapter is not None:
            text += (
                f"+{adapter.partition('@')[0]}@{model.adapter_commit}"
                if model.adapter_commit
                else f"+{model.adapter}"
            )
        references.append(text)
    return references


def mergekit_yaml(lock: Lock, recipe: Recipe, plan: MergePlan) -> str:
    from shoal.merge.mergekit_yaml import to_mergekit

    references = mergekit_references(lock)
    source = recipe.output.tokenizer_source
    if source not in ("base", "union"):
        source = references[lock.tokenizer]
    return to_mergekit(
        plan,
        references,
        tokenizer_source=source,
        chat_template=recipe.output.chat_template,
        parent=open_parents(lock.models)[0],
    )


def write_best(folder: Path, lock: Lock, recipe: Recipe, plan: MergePlan, save_weights: bool) -> None:
    """best/: mergekit_config.yml and plan.json; with save_weights also best/model, a complete model folder."""
    folder.mkdir(exist_ok=True)
    if not (folder / "plan.json").is_file() or read_plan(folder).digest() != plan.digest():
        shutil.rmtree(folder / "model", ignore_errors=True)  # of an earlier winner
    write_text(folder / "mergekit_config.yml", mergekit_yaml(lock, recipe, plan))
    write_text(folder / "plan.json", json.dumps(json.loads(plan.to_json()), indent=1) + "\n")
    if save_weights and not (folder / "model").is_dir():
        write_weights(folder / "model", lock, recipe, plan)


def read_plan(folder: Path) -> MergePlan:
    return MergePlan.from_json((folder / "plan.json").read_text(encoding="utf-8"))


def write_weights(out: Path, lock: Lock, recipe: Recipe, plan: MergePlan) -> None:
    """A complete model folder: canonical weights, configuration, tokenizer, generation configuration."""
    from shoal.merge.resident import Merger
    from shoal.merge.writer import write_model
    from shoal.preflight import groups_of

    write_model(
        out,
        plan,
        Merger(open_parents(lock.models), groups_of(lock.models)),
        base_path=Path(lock.models[0].folder),
        tokenizer_path=Path(lock.models[lock.tokenizer].folder),
        chat_template=recipe.output.chat_template,
        mergekit_yaml=mergekit_yaml(lock, recipe, plan),
    )
