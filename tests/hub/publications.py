"""A run whose parents are on a Hub, and what is published of it; made once, used through a fresh Hub by every test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import runs
from hub.client import TOKEN, point_client
from hub.local_hub import LocalHub
from hub.store import Repo

from shoal.hub.publish import dry_run
from shoal.run import evolve

MODELS = ("base", "left", "right")
CARD = "---\nlicense: mit\nlanguage: en\n---\n# A parent\n"
REPO = "anna/fish"


@dataclass(frozen=True)
class Made:
    """run: a finished run; recipe, weights: folders as they would be published, as REPO."""

    pico: Any
    run: Path
    recipe: Path
    weights: Path

    def add_parents(self, hub: LocalHub) -> None:
        add_parents(hub, self.pico)

    def files(self, weights: bool = False) -> dict[str, bytes]:
        folder = self.weights if weights else self.recipe
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }

    def add(
        self, hub: LocalHub, changes: dict[str, bytes | None] | None = None, weights: bool = False
    ) -> Repo:
        """The parents, and REPO with some files changed (None: without it)."""
        self.add_parents(hub)
        files: dict[str, bytes | None] = {**self.files(weights), **(changes or {})}
        return hub.add_repo(REPO, {name: data for name, data in files.items() if data is not None})


def add_parents(hub: LocalHub, pico: Any) -> None:
    for name in MODELS:
        folder = pico.model(name)
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        hub.add_repo(f"anna/{name}", files | {"README.md": CARD.encode()})


def hub_recipe() -> dict[str, Any]:
    """Keys of a recipe whose parents are on the Hub; its winner is a merge."""
    return {
        "name": "fish",
        "base_model": "anna/base",
        "models": ["anna/left", "anna/right"],
        "space": {"shape": "uniform", "bounds": {"weight": [-1, 2]}},
        "search": {"budget": 12, "popsize": 4, "items": 16, "seed": 2},
    }


def make(pico: Any, place: Path, *, item_text: bool = False, **changes: Any) -> Made:
    """Evolve from Hub ids through a Hub of its own, and write both publications; changes: of the recipe. item_text: they
    hold the items of its tasks."""
    with pytest.MonkeyPatch.context() as patch, LocalHub() as hub:
        hub.add_user("anna", TOKEN)
        point_client(hub, place / "hf", patch)
        patch.setenv("HF_TOKEN", TOKEN)
        add_parents(hub, pico)
        recipe = runs.recipe(pico, **(hub_recipe() | changes))
        result = evolve(recipe, place / "run", device="cpu")
        assert "@" in result["winner"]["id"]  # a merge, else another seed
        dry_run(place / "run", REPO, place / "recipe", include_item_text=item_text)
        dry_run(place / "run", REPO, place / "weights", weights=True, include_item_text=item_text)
        from huggingface_hub.utils import close_session

        close_session()
    return Made(pico, place / "run", place / "recipe", place / "weights")
