"""A repository becomes a folder: listed first, bounded, only files of harmless kinds, every hash checked.

Everything from the Hub is untrusted. Nothing is read here but names, sizes and hashes; what the files say is for those
who parse them. Files land in a folder beside the target, which becomes the target by a rename when all are right.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from shoal.endpoint import (
    NO_BAR,
    Say,
    client_errors,
    open_api,
    reason,
    retried,
    speaking,
    without_bars,
)
from shoal.errors import PublishError
from shoal.hub.files import RemoteFile, remote_files, same_content, unsafe

WEIGHTS = ".safetensors"
# No pickle (.bin, .pt, .pth, .pkl, .ckpt, .npy), no code (.py, .so), no archive, no database, no page with scripts
SUFFIXES = (WEIGHTS, ".json", ".yaml", ".yml", ".md", ".txt", ".jinja", ".model", ".parquet", ".png")
BARE = ("LICENSE", "NOTICE")  # names without a suffix
EVERYTHING = ("*",)
TRIES = 3  # of a file whose hash is wrong


@dataclass(frozen=True)
class Limits:
    """small: bytes of a file that is no weights. weights: bytes of all weights. files: of the repository."""

    small: int = 256 * 10**6
    weights: int = 10**12
    files: int = 2000


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Fetched:
    """folder: with the files that were wanted and may be. commit: SHA that they are of. skipped: the others' names."""

    folder: Path
    commit: str
    files: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def fetch(
    repo: str,
    revision: str | None,
    target: Path,
    allow: Sequence[str] = EVERYTHING,
    limits: Limits = DEFAULT_LIMITS,
    say: Say = lambda text: None,
) -> Fetched:
    """Download the files of a repository that match a pattern of `allow` and are of a harmless kind, as `target`.

    revision: branch, tag or commit (None: main); it is resolved to a commit once. target: must not exist, or be empty.
    A repeated call goes on at the next file. Symbolic links are never followed or made.

    Raises:
        PublishError: no access, no such revision, a path that leaves the folder, sizes above the limits or the free
            disk, a hash that is wrong after three tries, or a connection that does not come back.
    """
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise PublishError(f"{target}: exists; choose a folder that does not")
    api = open_api()
    with speaking(say):
        try:
            commit = str(retried(lambda: api.model_info(repo, revision=revision), say).sha)
            listed = remote_files(api, repo, commit, limits.files)
            wanted = _wanted(repo, listed, allow)
            staging = _staging(target, commit)
            _check_sizes(repo, wanted, limits, staging)
            for index, file in enumerate(wanted, start=1):
                _fetch(api, repo, commit, file, staging, f"{index}/{len(wanted)}", say)
        except client_errors() as error:
            name = f"{repo}@{revision}" if revision else repo
            raise PublishError(f"{name}: not fetched: {reason(error, repo)}") from None
    _finish(staging, target, wanted)
    names = {file.path for file in wanted}
    return Fetched(
        target,
        commit,
        tuple(sorted(names)),
        tuple(sorted(file.path for file in listed if file.path not in names)),
    )


def harmless(path: str) -> bool:
    """Whether a file of this name is of a kind that cannot run anything when it is read."""
    name = PurePosixPath(path)
    if any(part in (".git", ".cache") for part in name.parts):
        return False
    return name.suffix in SUFFIXES or name.name in BARE


def _wanted(repo: str, listed: Sequence[RemoteFile], allow: Sequence[str]) -> list[RemoteFile]:
    for file in listed:
        problem = unsafe(file.path)
        if problem is not None:
            raise PublishError(f"{repo}: holds {file.path!r}, {problem}; nothing of it is fetched")
    wanted = [
        file
        for file in listed
        if harmless(file.path) and any(fnmatch.fnmatchcase(file.path, pattern) for pattern in allow)
    ]
    seen: dict[str, str] = {}
    for file in wanted:
        other = seen.setdefault(file.path.casefold(), file.path)
        if other != file.path:
            raise PublishError(
                f"{repo}: holds {other!r} and {file.path!r}, which some systems take for one file"
            )
    if not wanted:
        raise PublishError(f"{repo}: holds none of the files that are expected ({', '.join(allow)})")
    return sorted(wanted, key=lambda file: (file.path.endswith(WEIGHTS), file.path))


def _check_sizes(repo: str, wanted: Sequence[RemoteFile], limits: Limits, staging: Path) -> None:
    for file in wanted:
        if not file.path.endswith(WEIGHTS) and file.size > limits.small:
            raise PublishError(
                f"{repo}: {file.path} has {file.size:,} bytes, expected at most {limits.small:,}"
            )
    weights = sum(file.size for file in wanted if file.path.endswith(WEIGHTS))
    if weights > limits.weights:
        raise PublishError(f"{repo}: weights have {weights:,} bytes, expected at most {limits.weights:,}")
    missing = sum(file.size for file in wanted if not (staging / file.path).is_file())
    free = shutil.disk_usage(staging).free
    if missing > free:
        raise PublishError(
            f"{repo}: {missing:,} bytes to fetch, but only {free:,} are free beside {staging.parent}"
        )


def _staging(target: Path, commit: str) -> Path:
    """The folder of this commit's files until they are complete; what other commits left there is removed."""
    folder = target.with_name(f".{target.name}.{commit[:12]}.partial")
    for other in target.parent.glob(f".{target.name}.*.partial"):
        if other != folder and other.is_dir() and not other.is_symlink():
            shutil.rmtree(other)
    if folder.is_symlink():
        raise PublishError(f"{folder}: is a symbolic link; remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fetch(api: Any, repo: str, commit: str, file: RemoteFile, staging: Path, count: str, say: Say) -> None:
    path = staging / file.path
    if same_content(path, file):
        return
    for _ in range(TRIES):
        path.unlink(missing_ok=True)
        say(f"{count} {file.path}")
        with without_bars(file.size < NO_BAR):
            retried(
                lambda: api.hf_hub_download(repo, file.path, revision=commit, local_dir=staging),
                say,
                attempts=3,
            )
        if same_content(path, file):
            return
        say(f"{file.path}: has another hash than the Hub lists")
    path.unlink(missing_ok=True)
    raise PublishError(
        f"{repo}: {file.path} arrives with another hash than the Hub lists, {TRIES} times;"
        " a proxy changes it, or it is damaged on the Hub"
    )


def _finish(staging: Path, target: Path, wanted: Sequence[RemoteFile]) -> None:
    shutil.rmtree(staging / ".cache", ignore_errors=True)  # the client's notes
    names = {file.path for file in wanted}
    for path in [p for p in staging.rglob("*") if p.is_symlink() or p.is_file()]:
        if path.relative_to(staging).as_posix() not in names or path.is_symlink():
            path.unlink()
    if target.exists():
        target.rmdir()
    staging.rename(target)
