"""A local Hub with two users and an empty HF_HOME, for the client in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.client import OTHER, TOKEN, Client, point_client
from hub.local_hub import LocalHub
from hub.publications import Made, make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Anna is logged in; Bert has a token, too. The environment points other processes to it as well."""
    with LocalHub() as hub:
        hub.add_user("anna", TOKEN)
        hub.add_user("bert", OTHER)
        point_client(hub, tmp_path / "hf", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        assert not hub.broken
        from huggingface_hub.utils import close_session

        close_session()


@pytest.fixture
def client(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(tmp_path / "hf", monkeypatch)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client and we would have waited before trying again, instead of waiting."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture(scope="session")
def made(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A finished run of Hub parents, and its two publications."""
    return make(pico, tmp_path_factory.mktemp("made"))
