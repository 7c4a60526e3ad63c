"""Errors that a user can act on: what was expected, what was found, where, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class ShoalError(Exception):
    """Base of every error that shoal raises on purpose; the command line prints it in one line and exits with 2."""

    exit_code = 2


class RecipeError(ShoalError):
    """A recipe does not say what it must: syntax, unknown key, wrong type, impossible value."""


class CheckpointError(ShoalError):
    """A model cannot be read, or does not fit together with the others."""


class EvaluationError(ShoalError):
    """A task, metric or item cannot be used, or a score is not a finite number."""


class RunError(ShoalError):
    """A run folder cannot be started, continued or read."""


class PublishError(ShoalError):
    """Something cannot be published to the Hub or fetched from it, or is not what it says."""


def nearest(name: str, valid: Iterable[str], limit: int = 12) -> str:
    """The end of an error message for a name that is not known: the closest valid names, or all when few.

    >>> nearest("lineer", ["linear", "ties"])
    "did you mean 'linear'? valid: linear, ties"
    """
    names = sorted(valid)
    close = get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    if len(names) <= limit:
        return f"{hint}valid: {', '.join(names)}"
    return hint.rstrip() or f"{len(names)} names are valid, none close to it"
