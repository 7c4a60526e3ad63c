"""The file of a mergekit configuration: read with bounds, and refused in one line where it is something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from shoal.errors import CheckpointError

MAX_BYTES = 16 << 20  # of a YAML
MAX_NODES = 1_000_000  # of a YAML, aliases written out


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Text and content of a mergekit YAML with one merge; CheckpointError, in one line, for anything else."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(
                f"{path}: has {size} bytes, at most {MAX_BYTES} are read; is this a mergekit YAML?"
            )
        text = path.read_text(encoding="utf-8")
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: no text in UTF-8 ({error.reason}); is this a mergekit YAML?"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no valid YAML: {line_of(error)}") from error
    if len(documents) > 1:
        raise CheckpointError(
            f"{path}: holds {len(documents)} YAML documents, which is a file for mergekit-multi; "
            "put every merge into a file of its own and make one after the other"
        )
    data = documents[0] if documents else None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a mapping with merge_method, found {_kind(data)}")
    if odd := [key for key in data if not isinstance(key, str)]:
        raise CheckpointError(f"{path}: expected names as keys, found {odd[0]!r}; is this a mergekit YAML?")
    _expanded(data, path)
    for key, what in _OTHERS.items():
        if key in data and "merge_method" not in data:
            raise CheckpointError(f"{path}: this is {what}")
    return text, data


_OTHERS = {
    "experts": "a mixture of experts for mergekit-moe, not a merge of weights; make it with mergekit-moe",
    "genome": "an evolution for mergekit-evolve; shoal import makes a recipe of it, for shoal evolve",
    "space": "a recipe of shoal, which is searched and not merged; run it with shoal evolve",
    "tasks": "a recipe of shoal, which is searched and not merged; run it with shoal evolve",
    "layer_slices": "a file for mergekit-bakllama; write its layers as `slices:` with merge_method: passthrough",
}


def _kind(data: Any) -> str:
    return "nothing" if data is None else f"a {type(data).__name__}"


def _expanded(data: Any, path: Path) -> None:
    """CheckpointError when the YAML's aliases unfold to too much, or into themselves."""
    sizes: dict[int, int | None] = {}

    def size(node: Any) -> int:
        if not isinstance(node, dict | list):
            return 1
        known = sizes.get(id(node), 0)
        if known is None:
            raise CheckpointError(f"{path}: an alias in it contains itself")
        if not known:
            sizes[id(node)] = None
            children = [*node, *node.values()] if isinstance(node, dict) else node
            known = sizes[id(node)] = 1 + sum(size(c) for c in children)
        return known

    if size(data) > MAX_NODES:
        raise CheckpointError(f"{path}: has more than {MAX_NODES} values; is this a mergekit YAML?")


def line_of(error: BaseException) -> str:
    """What an exception says, in one line; pydantic's without its urls and inputs."""
    if hasattr(error, "errors"):
        parts = [f"{'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']}" for e in error.errors()]
        return "; ".join(dict.fromkeys(parts[:3])) + (" ..." if len(parts) > 3 else "")
    return " ".join(str(error).split()) or type(error).__name__
