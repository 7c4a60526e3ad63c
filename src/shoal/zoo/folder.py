"""A folder that is built once: in a hidden sibling, under a lock, and renamed when it is complete."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError

MANIFEST = "zoo.json"

Manifest = dict[str, Any]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished zoo, None where there is none (or none that can be read)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def build_once(folder: Path, wanted: Mapping[str, Any], build: Callable[[Path], Manifest]) -> Manifest:
    """The manifest of `folder`, built by `build` unless a finished zoo with the entries of `wanted` is there.

    `build` fills the empty folder that it is given and returns the rest of the manifest, which is written last; then
    the folder is renamed. So whatever interrupts a build, `folder` is either a finished zoo or absent. Of several
    processes, one builds and the others wait and take what it built. A finished zoo with other entries is replaced.

    Raises:
        ShoalError: `folder` holds something else than a zoo of this kind.
    """
    folder = folder.absolute()
    found = read_manifest(folder)
    if found is not None and _fits(found, wanted):
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        found = read_manifest(folder)
        if found is not None and _fits(found, wanted):
            return found
        _refuse_foreign(folder, found, str(wanted["zoo"]))
        building = folder.with_name(f".{folder.name}.building")
        old = folder.with_name(f".{folder.name}.old")
        _remove(building)
        _remove(old)
        building.mkdir()
        try:
            manifest = {**wanted, **build(building)}
            text = json.dumps(manifest, indent=2) + "\n"
            (building / MANIFEST).write_text(text, encoding="utf-8")
            if folder.exists():
                folder.rename(old)
            building.rename(folder)
        except BaseException:
            _remove(building)
            raise
        _remove(old)
        return manifest


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fits(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(found.get(key) == value for key, value in wanted.items())


def _refuse_foreign(folder: Path, found: Manifest | None, zoo: str) -> None:
    if not folder.exists() or (found is not None and found.get("zoo") == zoo):
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    what = f"the zoo {found['zoo']!r}" if found is not None and "zoo" in found else "something that is no zoo"
    raise ShoalError(f"{folder}: holds {what}; expected a new or empty folder, or an older zoo {zoo!r}")


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the hold ends with the process, and the file goes with the hold."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            # the holder before us removed the file that we waited for: another process may hold a new one
            if os.fstat(handle).st_ino == path.stat().st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
