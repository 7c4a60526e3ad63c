"""The weights of a publication: the canonical merge as a model folder, in files of at most 1 GB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.hub.privacy import Scrubber
from shoal.lock import Lock
from shoal.models import open_parents
from shoal.preflight import groups_of
from shoal.recipe import Recipe
from shoal.types import MergePlan

SHARD_BYTES = 10**9 - (
    1 << 20
)  # with its header a file stays under 1 GB; a larger tensor gets a file of its own
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_PLACES = (
    "_name_or_path",
    "name_or_path",
    "tokenizer_file",
    "special_tokens_map_file",
    "vocab_file",
    "merges_file",
)


def write(folder: Path, lock: Lock, recipe: Recipe, plan: MergePlan) -> None:
    """Weights, configuration, tokenizer and generation configuration, into a folder that is there.

    Raises:
        CheckpointError: a parent cannot be read, or the disk is full.
    """
    from shoal.merge.resident import Merger
    from shoal.merge.writer import write_model

    made = folder / "weights"
    write_model(
        made,
        plan,
        Merger(open_parents(lock.models), groups_of(lock.models)),
        base_path=Path(lock.models[0].folder),
        tokenizer_path=Path(lock.models[lock.tokenizer].folder),
        chat_template=recipe.output.chat_template,
        max_shard_bytes=SHARD_BYTES,
    )
    for path in made.iterdir():
        path.rename(folder / path.name)
    made.rmdir()


def sha256(folder: Path) -> str:
    """weights_sha256 of the model in a folder."""
    from shoal.merge.checkpoint import Checkpoint
    from shoal.merge.hashing import weights_sha256

    checkpoint = Checkpoint.open(folder)
    return weights_sha256((name, checkpoint.tensor(name)) for name in checkpoint.names)


def scrub_settings(folder: Path, scrubber: Scrubber) -> list[str]:
    """Remove places of this machine from the model's settings, where training tools leave them; names of changed files."""
    changed = []
    for name in _SETTINGS:
        path = folder / name
        if not path.is_file():
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        clean = _without_places(data, scrubber)
        if clean != data:
            text = json.dumps(clean, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
            path.write_text(text, encoding="utf-8")
            changed.append(name)
    return changed


def _without_places(data: Any, scrubber: Scrubber) -> Any:
    if isinstance(data, dict):
        return {
            key: _without_places(value, scrubber)
            for key, value in data.items()
            if not (key in _PLACES and isinstance(value, str) and value != scrubber.text(value))
        }
    if isinstance(data, list):
        return [_without_places(value, scrubber) for value in data]
    return scrubber.known(data) if isinstance(data, str) else data
