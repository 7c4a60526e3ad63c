"""Modules that can be called: `shoal.merge` and `shoal.score` are rooms of the package and functions of its API."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function of `shoal.api` that has the module's name."""
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module("shoal.api"), name)(*args, **kwargs)


def make_callable(module: str) -> None:
    """Let the module of this name be called as the function of `shoal.api` with its last name."""
    sys.modules[module].__class__ = _Callable
