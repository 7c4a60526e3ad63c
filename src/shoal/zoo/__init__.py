"""Models that shoal builds itself, into the user's cache, once: something to merge without a download."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from shoal.errors import ShoalError, nearest

Progress = Callable[[str, float], None]

_MEMBERS = {"tiny": ("base", "reverse", "sort"), "smollm2": ("base",)}
# trained from nothing by shoal's own code, under shoal's licence; and as the card of SmolLM2-135M-Instruct says
_LICENCES = {"tiny": "apache-2.0", "smollm2": "apache-2.0"}


def names(zoo: str | None = None) -> tuple[str, ...]:
    """The zoos, or the members of one.

    Raises:
        ShoalError: there is no such zoo.
    """
    if zoo is None:
        return tuple(_MEMBERS)
    if zoo not in _MEMBERS:
        raise ShoalError(f"no zoo {zoo!r}: {nearest(zoo, _MEMBERS)}")
    return _MEMBERS[zoo]


def licence(zoo: str) -> str:
    """The licence of a zoo's models, as an id of the Hub.

    Raises:
        ShoalError: there is no such zoo.
    """
    names(zoo)
    return _LICENCES[zoo]


def cache_folder() -> Path:
    """Where zoos are kept: `zoo` in the folder that SHOAL_CACHE names, or in the user's cache."""
    given = os.environ.get("SHOAL_CACHE")
    if given:
        return Path(given).expanduser().absolute() / "zoo"
    import platformdirs

    return platformdirs.user_cache_path("shoal", appauthor=False) / "zoo"


def tiny_folder(progress: Progress | None = None) -> Path:
    """The tiny zoo in the cache, built if it is missing or of another version of shoal's recipe for it."""
    from shoal.zoo.tiny import build_tiny

    folder = cache_folder() / "tiny"
    build_tiny(folder, progress)
    return folder


def zoo_folder(zoo: str, progress: Progress | None = None) -> Path:
    """The folder of a zoo in the cache, built if it is missing.

    Raises:
        ShoalError: there is no such zoo, or it cannot be built here.
    """
    names(zoo)
    if zoo == "tiny":
        return tiny_folder(progress)
    from shoal.zoo.smollm2 import smollm2_folder

    return smollm2_folder(progress)


def member_path(zoo: str, member: str, progress: Progress | None = None) -> Path:
    """The folder of one model of a zoo, e.g. ("tiny", "base").

    Raises:
        ShoalError: there is no such zoo or member, or it cannot be built here.
    """
    if member not in names(zoo):
        raise ShoalError(f"zoo {zoo!r} has no model {member!r}: {nearest(member, names(zoo))}")
    return zoo_folder(zoo, progress) / member


def tasks_path(zoo: str, progress: Progress | None = None) -> Path:
    """The folder of a zoo's lm-eval tasks, for lm-eval's include_path; written where it is missing, without any model.

    It is a folder of its own in the cache, whether the zoo's models are there or not.

    Raises:
        ShoalError: there is no such zoo, or it has no tasks.
    """
    names(zoo)
    if zoo != "tiny":
        raise ShoalError(f"zoo {zoo!r} has no tasks: {nearest(zoo, ['tiny'])}")
    from shoal.zoo.tiny_tasks import build_tasks

    folder = cache_folder() / "tiny-tasks"
    build_tasks(folder, progress)
    return folder
