"""The folder of a run: what lies in it, who holds it, and whether a recipe may continue it."""

from __future__ import annotations

import difflib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.errors import RunError
from shoal.lock import Lock, load_lock, write_text
from shoal.recipe import Recipe, load_recipe


class RunFolder:
    """RUN/: recipe.yaml, lock.yaml, journal.sqlite, plan.safetensors, best/, result.json, plots; DONE is written last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.lock = path / "lock.yaml"
        self.journal = path / "journal.sqlite"
        self.plan = path / "plan.safetensors"
        self.best = path / "best"
        self.result = path / "result.json"
        self.done = path / "DONE"

    @property
    def started(self) -> bool:
        return self.lock.is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for this process; the hold ends with the process, however it ends.

        Raises:
            RunError: another process holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".held", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be used as a run folder: {error.strerror}") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = os.read(handle, 64).decode(errors="replace").strip()
                raise RunError(
                    f"{self.path}: another process{f' ({owner})' if owner else ''} is working on this run;"
                    " wait for it, or name another folder by --run"
                ) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def open(self) -> tuple[Recipe, Lock]:
        """Recipe and lock of a run that has started.

        Raises:
            RunError: it has not.
        """
        if not self.started:
            raise RunError(f"{self.path}: no run here (expected {self.lock.name})")
        return load_recipe(self.recipe), load_lock(self.lock)

    def start(self, recipe: Recipe, lock: Lock) -> None:
        """Write recipe and lock; the lock last, since its existence means that the run has started."""
        # what an interrupted start may have left is ours, anything else is not
        own = (".held", self.recipe.name, f".{self.recipe.name}.", f".{self.lock.name}.")
        foreign = sorted(e.name for e in self.path.iterdir() if not e.name.startswith(own))
        if foreign:
            raise RunError(
                f"{self.path}: not empty and no run ({', '.join(foreign[:3])}, ...); name another folder by --run"
            )
        text = lock.to_yaml()
        write_text(self.recipe, recipe.to_yaml())
        write_text(self.lock, text)

    def check_same(self, recipe: Recipe) -> tuple[int, int] | None:
        """Whether `recipe` may continue this run: None if it is the same, (old, new) budget if that alone grew.

        Where it is tracked makes no difference.

        Raises:
            RunError: it differs in anything else, with the difference; or its budget is smaller.
        """
        old = load_recipe(self.recipe)
        recipe = recipe.model_copy(update={"track": old.track})
        if old.digest() != recipe.digest():
            lines = difflib.unified_diff(
                old.to_yaml().splitlines(),
                recipe.to_yaml().splitlines(),
                "the run's recipe",
                "this recipe",
                n=1,
                lineterm="",
            )
            raise RunError(
                f"{self.path}: this run belongs to a different recipe; name another folder by --run\n"
                + "\n".join(lines)
            )
        before, after = old.search.budget, recipe.search.budget
        shorter = (recipe.search.max_seconds or float("inf")) < (old.search.max_seconds or float("inf"))
        if after < before or shorter:
            raise RunError(
                f"{self.path}: the budget can only grow (search.budget {before} to {after}, search.max_seconds"
                f" {old.search.max_seconds} to {recipe.search.max_seconds}); name another folder by --run"
            )
        return None if recipe == old else (before, after)
