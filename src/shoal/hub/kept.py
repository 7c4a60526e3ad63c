"""The small files of a publication in the cache, by commit: what a descendant needs to know of it, checked whenever read.

A commit never changes, so what was fetched once is not asked for again, and can be read offline.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from shoal.cache import cache_folder
from shoal.endpoint import Say
from shoal.hub.fetch import DEFAULT_LIMITS
from shoal.hub.opened import Opened, is_sha, open_publication
from shoal.hub.repository import DATA, fetched, split_revision

DOCUMENTS = ("README.md", "LICENSE*", "NOTICE*")  # its licence, for those who publish a descendant


def kept(repo: str, revision: str | None, say: Say = lambda text: None) -> tuple[Opened, str]:
    """A published repository, opened, and its commit.

    Raises:
        PublishError: it cannot be fetched, is no publication, or what it says does not fit together.
    """
    repo, _ = split_revision(repo)  # a name, and no path
    beside = cache_folder().absolute() / "published" / repo
    if revision is not None and is_sha(revision) and _place(beside, revision).is_dir():
        return open_publication(_place(beside, revision), _where(repo, revision)), revision
    beside.parent.mkdir(parents=True, exist_ok=True)
    own = beside.with_name(f"{beside.name}.{os.getpid()}")  # two processes may fetch the same
    with fetched(repo, revision, own, (*DATA, *DOCUMENTS), DEFAULT_LIMITS, say) as (opened, commit):
        place = _place(beside, commit)
        with suppress(OSError):  # another process was faster
            opened.folder.rename(place)
    return open_publication(place, _where(repo, commit)), commit


def _place(beside: Path, commit: str) -> Path:
    return beside.with_name(f"{beside.name}@{commit}")


def _where(repo: str, commit: str) -> str:
    return f"{repo}@{commit[:12]}"
