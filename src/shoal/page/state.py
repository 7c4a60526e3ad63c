"""How far a run is: finished, going on, or stopped before its end, and what is known of why."""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shoal.folder import RunFolder
from shoal.journal import EvaluationRow

Stage = Literal["loading", "anchors", "search", "selection", "test"]


@dataclass(frozen=True)
class State:
    """kind: how the run stands. reason: why it stopped, as far as it is known; "" otherwise.

    stage: what it was at when the page was written; generations: (told, planned).
    """

    kind: Literal["finished", "running", "stopped"]
    stage: Stage
    generations: tuple[int, int]
    reason: str = ""


@dataclass(frozen=True)
class Failure:
    """A reason for which candidates failed. candidates: how many; example: the first one's id."""

    error: str
    candidates: int
    example: str


def is_held(run: Path) -> bool:
    """Whether a process works on the run now; a hold ends with its process (see `RunFolder.held`)."""
    try:
        with (run / ".held").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # a copy that cannot be opened for writing: nobody works on it
        return False
    return False


def stage_of(evaluations: Sequence[EvaluationRow], searching: bool) -> Stage:
    """The last stage that has begun. searching: whether a generation was asked."""
    roles = {row.role for row in evaluations}
    if "test" in roles:
        return "test"
    if "select" in roles:
        return "selection"
    return "search" if searching else "anchors" if evaluations else "loading"


def state_of(
    folder: RunFolder,
    evaluations: Sequence[EvaluationRow],
    searching: bool,
    generations: tuple[int, int],
    running: bool | None = None,
    reason: str = "",
) -> State:
    """running: whether it goes on, None to find out; reason: why it stopped, where the caller knows."""
    stage = stage_of(evaluations, searching)
    if folder.done.is_file() and folder.result.is_file():
        return State("finished", stage, generations)
    if is_held(folder.path) if running is None else running:
        return State("running", stage, generations)
    return State("stopped", stage, generations, reason or _last_failures(evaluations))


def failures(evaluations: Sequence[EvaluationRow]) -> tuple[Failure, ...]:
    """Why candidates failed, the most frequent reason first."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for row in evaluations:
        if row.status == "failed":
            error = row.error or "no reason was recorded"
            counts[error] += 1
            first.setdefault(error, row.candidate)
    return tuple(Failure(error, count, first[error]) for error, count in counts.most_common())


def _last_failures(evaluations: Sequence[EvaluationRow]) -> str:
    """What the journal's end says of why a run stopped."""
    count = 0
    for row in reversed(evaluations):
        if row.status != "failed":
            break
        count += 1
    if count < 2:
        return ""
    return f"the last {count} candidates failed, the last one with: {evaluations[-1].error}"
