"""What a tracker is: a place that takes numbers by step, and what a run was and found, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from shoal.errors import ShoalError
from shoal.tracking.ending import Ending


class TrackerError(ShoalError):
    """A tracker that cannot be used: no such one, or its package or its login is missing."""


class Unsent(Exception):
    """What a tracker could not send, in words; the run goes on without it."""


@dataclass(frozen=True)
class About:
    """What a tracker is told first. name: of the recipe; recipe: as YAML; config: the same as plain data, and versions.

    No folder, host or user is named.
    """

    name: str
    recipe: str
    config: Mapping[str, Any]


class Tracker(Protocol):
    """One tracker's run, open. Every method may raise anything: then nothing more is sent to it by this process.

    words: where to look at it, said once. last: the last step that it holds, -1 for none.
    """

    words: str
    last: int

    def point(self, step: int, values: Mapping[str, float]) -> None:
        """One generation."""

    def end(self, ending: Ending) -> None:
        """What the run found."""

    def close(self, finished: bool) -> None:
        """Nothing follows from this process; all that was taken has arrived on return."""
