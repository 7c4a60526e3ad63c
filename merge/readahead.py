"""Bring files into the page cache while something else is computed: a merge from disk waits for nothing else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_ahead(folders: list[Path]) -> None:
    """Ask the kernel for the safetensors in `folders`, in the order of their names; returns at once.

    Nothing happens where the system has no such request, or for what is no folder.
    """
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return

    def ask() -> None:
        for file in [f for folder in folders for f in sorted(folder.glob("*.safetensors"))]:
            with suppress(OSError):
                handle = os.open(file, os.O_RDONLY)
                try:
                    advise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(handle)

    threading.Thread(target=ask, name="shoal-read-ahead", daemon=True).start()


def folders_in(value: Any) -> Iterator[Path]:
    """The existing folders that the strings of a YAML's content name (`model+adapter` names two)."""
    if isinstance(value, str):
        for part in value.split("+"):
            with suppress(OSError, ValueError):
                if len(part) < 4096 and Path(part).is_dir():
                    yield Path(part)
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from folders_in(child)
