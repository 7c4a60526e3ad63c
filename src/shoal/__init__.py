"""shoal breeds better open language models out of existing ones.

Public: `load_recipe`, `evolve`, `load_result`, `score_model`, `write_candidate`; see their docstrings. Importing this
package imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shoal.version import __version__ as __version__

if TYPE_CHECKING:
    from shoal.api import evolve as evolve
    from shoal.errors import ShoalError as ShoalError
    from shoal.merge_run import write_candidate as write_candidate
    from shoal.recipe import Recipe as Recipe
    from shoal.recipe import load_recipe as load_recipe
    from shoal.report import load_result as load_result
    from shoal.score import score_model as score_model

_PUBLIC = {
    "Recipe": "shoal.recipe",
    "ShoalError": "shoal.errors",
    "evolve": "shoal.api",
    "load_recipe": "shoal.recipe",
    "load_result": "shoal.report",
    "score_model": "shoal.score",
    "write_candidate": "shoal.merge_run",
}

__all__ = [
    "Recipe",
    "ShoalError",
    "__version__",
    "evolve",
    "load_recipe",
    "load_result",
    "score_model",
    "write_candidate",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
