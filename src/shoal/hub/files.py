"""Files of a repository as the Hub lists them, and whether a file here has the content that is listed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from shoal.errors import PublishError

KEPT = (".gitattributes",)  # the Hub's own
WITHOUT_MARK = (*KEPT, "README.md", "LICENSE")  # what a repository may hold before anything was published


@dataclass(frozen=True)
class RemoteFile:
    """path: in the repository. size: bytes. sha256: of a large file; blob: git's id of any other one."""

    path: str
    size: int
    sha256: str | None
    blob: str | None


def remote_files(api: Any, repo: str, revision: str, most: int | None = None) -> list[RemoteFile]:
    """All files at a revision.

    Raises:
        PublishError: more than `most` files.
    """
    from huggingface_hub.hf_api import RepoFile

    found: list[RemoteFile] = []
    for entry in api.list_repo_tree(repo, revision=revision, recursive=True):
        if not isinstance(entry, RepoFile):
            continue
        if most is not None and len(found) == most:
            raise PublishError(f"{repo}: holds more than {most} files, which no publication of shoal does")
        large = entry.lfs
        if large is None:
            found.append(RemoteFile(entry.path, entry.size, None, entry.blob_id))
        else:
            found.append(RemoteFile(entry.path, large.size, large.sha256, None))
    return found


def same_content(path: Path, file: RemoteFile) -> bool:
    """Whether a file here has the listed size and hash: sha256, or git's SHA-1 of "blob SIZE\\0" and the content.

    Source: git-scm.com/book, "Git Internals - Git Objects".
    """
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as opened:
        if file.sha256 is not None:
            return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
        digest = hashlib.sha1(b"blob %d\0" % file.size)
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest() == file.blob


def differing(there: Sequence[RemoteFile], files: Mapping[str, Path]) -> list[str]:
    """Names of files that only one side has, or whose hashes differ; what the Hub or its forms put there is no matter."""
    remote = {file.path: file for file in there}
    extra = [name for name in remote if name not in files and name not in WITHOUT_MARK]
    wrong = [
        name for name, path in files.items() if name not in remote or not same_content(path, remote[name])
    ]
    return sorted(extra + wrong)


def unsafe(path: str) -> str | None:
    """Why a path of a repository must not be used as a path here, None where it may.

    Read under the rules of POSIX and of Windows, whichever machine this is.
    """
    parts = re.split(r"[/\\]", path)
    windows = PureWindowsPath(path)
    if PurePosixPath(path).is_absolute() or windows.drive or windows.root:
        return "an absolute path"
    if any(part in ("", ".", "..") for part in parts) or "\\" in path:
        return "a path that leaves its folder"
    if re.search(r"[\x00-\x1f\x7f:]", path) or any(part != part.rstrip(". ") for part in parts):
        return "a name that not every system can hold"
    return None
