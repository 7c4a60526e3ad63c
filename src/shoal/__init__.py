"""shoal breeds better open language models out of existing ones.

Public: `load_recipe`, `evolve`, `load_run`, `merge`, `score`, `publish`, `download`, `reproduce`; see their docstrings
(of `merge` and `score`, which are rooms of this package too, in `shoal.api`). Importing this package imports nothing
heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shoal.version import __version__ as __version__

if TYPE_CHECKING:
    from shoal.api import download as download
    from shoal.api import dry_run as dry_run
    from shoal.api import evolve as evolve
    from shoal.api import load_run as load_run
    from shoal.api import merge as merge
    from shoal.api import publish as publish
    from shoal.api import reproduce as reproduce
    from shoal.api import score as score
    from shoal.errors import ShoalError as ShoalError
    from shoal.merge_run import write_candidate as write_candidate
    from shoal.recipe import Recipe as Recipe
    from shoal.recipe import load_recipe as load_recipe
    from shoal.report import load_result as load_result
    from shoal.score import score_model as score_model

_PUBLIC = {
    "Recipe": "shoal.recipe",
    "ShoalError": "shoal.errors",
    "download": "shoal.api",
    "dry_run": "shoal.api",
    "evolve": "shoal.api",
    "load_recipe": "shoal.recipe",
    "load_result": "shoal.report",
    "load_run": "shoal.api",
    "publish": "shoal.api",
    "reproduce": "shoal.api",
    "score_model": "shoal.score",
    "write_candidate": "shoal.merge_run",
}

# modules that can be called (`shoal.calling`), for an imported submodule hides any function of its name
_ROOMS = ("merge", "score")

__all__ = [
    "Recipe",
    "ShoalError",
    "__version__",
    "download",
    "dry_run",
    "evolve",
    "load_recipe",
    "load_result",
    "load_run",
    "merge",
    "publish",
    "reproduce",
    "score",
    "score_model",
    "write_candidate",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used."""
    if name in _ROOMS:
        return importlib.import_module(f"shoal.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_ROOMS})
