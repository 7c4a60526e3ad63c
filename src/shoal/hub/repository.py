"""A repository of the Hub that holds a publication: its name, its files in a folder of their own, and what they say."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shoal.endpoint import Say
from shoal.errors import PublishError
from shoal.hub.fetch import Limits, fetch
from shoal.hub.opened import LOCK, RECIPE, RESULT, Opened, open_publication

DATA = (RECIPE, LOCK, RESULT)  # all of it that is read


def split_revision(text: str) -> tuple[str, str | None]:
    """`org/name@revision`

    Raises:
        PublishError: no name of a repository.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repo, _, revision = text.removeprefix("hub:").partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if "/" not in repo:
        raise PublishError(f"{text!r}: expected a repository of the Hub as org/name or org/name@revision")
    return repo, revision or None


@contextmanager
def fetched(
    repo: str, revision: str | None, beside: Path, allow: Sequence[str], limits: Limits, say: Say
) -> Iterator[tuple[Opened, str]]:
    """A repository in a hidden folder beside a target, opened; the folder is gone at the end, unless it was renamed."""
    folder = beside.absolute().with_name(f".{beside.absolute().name}.unchecked")
    if folder.is_symlink() or folder.is_file():
        raise PublishError(f"{folder}: is in the way; remove it")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        found = fetch(repo, revision, folder, allow, limits, say)
        if "lock.yaml" not in found.files:
            raise PublishError(f"{repo}: holds no lock.yaml, so it is no publication of shoal")
        yield open_publication(folder, f"{repo}@{found.commit[:12]}"), found.commit
    finally:
        shutil.rmtree(folder, ignore_errors=True)
