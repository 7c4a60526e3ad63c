"""The outline of a model on the Hub: its small files, and its safetensors with true headers and nothing behind them.

A header names every tensor, its type and its shape, and a range request gets it without the weights; in front of a hole
of the right size it makes a file that opens like the real one, reads as zeros, and takes no room. So a plan of a run can
be checked, sized and timed before gigabytes are fetched. Nothing that is kept is ever made from an outline.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from shoal.cache import cache_folder
from shoal.endpoint import Say, client_errors, open_api, reason, retried
from shoal.errors import CheckpointError

MARK = "OUTLINE"


def is_outline(folder: Path) -> bool:
    return (folder / MARK).is_file()


def outline(repo: str, commit: str, small: Path, say: Say) -> Path:
    """A folder with the small files of `small` and the outlines of the commit's safetensors, kept for the next time.

    Raises:
        CheckpointError: a header cannot be fetched, or does not fit its file.
    """
    folder = cache_folder() / "outlines" / repo.replace("/", "--") / commit
    if is_outline(folder):
        return folder
    say(f"reading the headers of {repo}")
    draft = folder.with_name(f".{commit}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        for path in small.iterdir():
            if path.is_file():
                shutil.copyfile(path, draft / path.name)
        api = open_api()
        for entry in api.list_repo_tree(repo, revision=commit):
            if entry.path.endswith(".safetensors") and Path(entry.path).name == entry.path:
                header = _header(api, repo, commit, entry.path, say)
                _write(draft / entry.path, header, entry.size)
        (draft / MARK).write_text(f"{repo}@{commit}: headers of the weights, no weights\n")
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except client_errors() as error:
        raise CheckpointError(
            f"model {repo}: its headers cannot be fetched ({reason(error, repo)})"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _header(api: Any, repo: str, commit: str, name: str, say: Say) -> dict[str, Any]:
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        found = retried(lambda: api.parse_safetensors_file_metadata(repo, name, revision=commit), say)
    except (SafetensorsParsingError, NotASafetensorsRepoError):
        raise CheckpointError(f"model {repo}: {name} is no safetensors file") from None
    header: dict[str, Any] = {"__metadata__": found.metadata} if found.metadata else {}
    return header | {
        key: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(tensor.data_offsets)}
        for key, tensor in found.tensors.items()
    }


def _write(path: Path, header: dict[str, Any], size: int) -> None:
    """Format: huggingface.co/docs/safetensors, "Format": length of the header (u64), header as JSON, data."""
    end = max((t["data_offsets"][1] for key, t in header.items() if key != "__metadata__"), default=0)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if end > size:
        raise CheckpointError(f"{path.name}: its header speaks of {end:,} bytes, the file has {size:,}")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
