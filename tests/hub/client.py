"""The client's settings in this process, which it read from the environment when it was imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub.local_hub import LocalHub

TOKEN, OTHER = "hf_annasSecretTokenOfTests", "hf_bertsSecretTokenOfTests"


@dataclass(frozen=True)
class Client:
    """Who asks, and from where."""

    home: Path
    patch: pytest.MonkeyPatch

    def token(self, token: str | None) -> None:
        if token is None:
            self.patch.delenv("HF_TOKEN", raising=False)
        else:
            self.patch.setenv("HF_TOKEN", token)

    def offline(self) -> None:
        self.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def point_client(hub: LocalHub, home: Path, patch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name, value in hub.environment(home).items():
        patch.setenv(name, value)
    settings: dict[str, Any] = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        patch.setattr(constants, name, value)
