"""Finished runs to publish: of local parents with secrets in its journal, of parents from the Hub, and a descendant.

Parents "from the Hub" lie in a cache of huggingface_hub, as it lays them out, and it is offline: no server is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from hub_publication.places import HOST, PLAIN_TOKEN, USER, HubCache, secret_text

from shoal.hub.publication import Publication, build
from shoal.run import evolve
from shoal.types import Completed, Failed, Job


@pytest.fixture(scope="session")
def hub(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubCache]:
    """ann/base (MIT, English), ann/left (Apache, German, with a NOTICE), ann/right (MIT by its LICENSE file only)."""
    import huggingface_hub
    from huggingface_hub import constants

    cache = HubCache(tmp_path_factory.mktemp("hub"))
    cache.add("base", pico.model("base"), "---\nlicense: mit\nlanguage: en\n---\n# base\n")
    left = "---\nlicense: apache-2.0\nlanguage: [de, en]\n---\n# left\n"
    cache.add("left", pico.model("left"), left, NOTICE="Made by Ann.\n")
    mit = "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy of this\n"
    cache.add("right", pico.model("right"), "# right\n", LICENSE=mit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache.folder))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert huggingface_hub.is_offline_mode()
        yield cache


@pytest.fixture(scope="session")
def hub_run(hub: HubCache, pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose parents are on the Hub; its winner is a merge."""
    run = tmp_path_factory.mktemp("runs") / "hub"
    recipe = runs.recipe(
        pico,
        name="fish",
        base_model="ann/base",
        models=["ann/left", "ann/right"],
        space={"shape": "uniform", "bounds": {"weight": [-1, 2]}},
        search={"budget": 12, "popsize": 4, "items": 16, "seed": 2},
    )
    result = evolve(recipe, run, device="cpu")
    assert "@" in result["winner"]["id"]  # else another seed
    return run


@pytest.fixture(scope="session")
def recipe_only(hub_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Publication:
    return build(hub_run, "ann/fish", out=tmp_path_factory.mktemp("published") / "recipe")


@pytest.fixture(scope="session")
def secret_run(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of local parents; candidates failed with paths, a traceback, the host's name and tokens."""
    home = tmp_path_factory.mktemp("homes") / USER
    run = home / "work" / "run"
    run.parent.mkdir(parents=True)

    def fail(job: Job, count: int) -> Completed | Failed | None:
        if not job.candidate.startswith("g001"):
            return None
        return Failed(job.candidate, secret_text(home), 0.1, (f"memory ran out in {home}/kernel.cu",))

    evolve(runs.recipe(pico), run, device="cpu", worker=runs.meddled(fail))
    return run


@pytest.fixture
def own_machine(secret_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is of the user and the home of the run with secrets; returns the home."""
    home = secret_run.parents[1]
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", USER)
    monkeypatch.setenv("USER", USER)
    monkeypatch.setenv("HF_TOKEN", PLAIN_TOKEN)
    monkeypatch.setattr("socket.gethostname", lambda: HOST)
    return home
