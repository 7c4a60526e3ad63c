"""The trackers by name: how each is checked, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from shoal.errors import ShoalError, nearest
from shoal.recipe import TrackerName
from shoal.tracking import tensorboard, trackio, wandb
from shoal.tracking.marks import Marks
from shoal.tracking.tracker import About, Tracker, TrackerError

NONE = "none"


@dataclass(frozen=True)
class Kind:
    """check: raises ImportError or TrackerError. open: RUN, what it is about, the marks -> the tracker's run."""

    check: Callable[[], None]
    open: Callable[[Path, About, Marks], Tracker]


TRACKERS: Mapping[TrackerName, Kind] = {
    "tensorboard": Kind(tensorboard.check, tensorboard.TensorBoard),
    "trackio": Kind(trackio.check, trackio.Trackio),
    "wandb": Kind(wandb.check, wandb.WeightsAndBiases),
}


def chosen(asked: str | Iterable[str] | None, recipe: Sequence[TrackerName]) -> tuple[TrackerName, ...]:
    """The trackers of a run: those asked for, else the recipe's. `none` is none, and so is an empty list.

    Raises:
        TrackerError: no such tracker, or it cannot be used on this machine: a package is missing, with the extra that
        brings it, or a login.
    """
    names = tuple(dict.fromkeys(recipe)) if asked is None else _named(asked)
    for name in names:
        try:
            TRACKERS[name].check()
        except ImportError as error:
            raise TrackerError(
                f"track: {name} needs a package that is not here ({error}); pip install 'shoal[{name}]', or leave {name} out"
            ) from None
        except ShoalError:
            raise
        except Exception as error:  # noqa: BLE001 (a broken installation raises what it likes)
            raise TrackerError(
                f"track: {name} cannot be used on this machine: {type(error).__name__}: {error}"
            ) from None
    return names


def _named(asked: str | Iterable[str]) -> tuple[TrackerName, ...]:
    names = list(dict.fromkeys([asked] if isinstance(asked, str) else asked))
    if names == [NONE]:
        return ()
    known: dict[str, TrackerName] = {name: name for name in get_args(TrackerName)}
    wrong = next((name for name in names if name not in known), None)
    if wrong == NONE:
        raise TrackerError("track: none stands alone, without other trackers")
    if wrong is not None:
        raise TrackerError(f"track: no tracker {wrong!r}; {nearest(wrong, [*known, NONE])}")
    return tuple(known[name] for name in names)
