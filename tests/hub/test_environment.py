"""What huggingface_hub reads from the environment holds for us, too: seen from another process that has nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub.client import OTHER, TOKEN
from hub.local_hub import LocalHub

FETCH = """
import sys
from pathlib import Path
from shoal.errors import ShoalError
from shoal.hub import fetch
try:
    print(fetch(sys.argv[1], None, Path(sys.argv[2])).commit)
except ShoalError as error:
    sys.exit(f"error: {error}")
"""


def run(target: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", FETCH, "bert/secret", str(target)],
        env=own | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def secret(hub: LocalHub) -> str:
    return hub.add_repo("bert/secret", {"lock.yaml": b"schema: 1\n"}, private=True).commit().oid


def test_endpoint_and_token(hub: LocalHub, secret: str, tmp_path: Path) -> None:
    found = run(tmp_path / "a", **hub.environment(tmp_path / "home", OTHER))
    assert found.stdout.strip() == secret
    found = run(tmp_path / "b", **hub.environment(tmp_path / "home", TOKEN))
    assert found.returncode == 1 and "your account may not see it" in found.stderr
    assert TOKEN not in found.stderr and "Traceback" not in found.stderr


def test_a_token_kept_in_the_home(hub: LocalHub, secret: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    found = run(tmp_path / "a", **hub.environment(home))
    assert "you are not logged in" in found.stderr
    (home / "token").write_text(OTHER)
    found = run(tmp_path / "a", **hub.environment(home))
    assert found.stdout.strip() == secret


def test_offline(hub: LocalHub, secret: str, tmp_path: Path) -> None:
    seen = len(hub.seen)
    found = run(tmp_path / "a", **hub.environment(tmp_path / "home", OTHER), HF_HUB_OFFLINE="1")
    assert (
        found.stderr == "error: bert/secret: not fetched: HF_HUB_OFFLINE is set; unset it to reach the Hub\n"
    )
    assert len(hub.seen) == seen and not (tmp_path / "a").exists()


def test_a_place_where_no_hub_is(hub: LocalHub, secret: str, tmp_path: Path) -> None:
    """A typo in HF_ENDPOINT: an address without a scheme is not tried again and again."""
    variables = hub.environment(tmp_path / "home", OTHER) | {"HF_ENDPOINT": "huggingface.example"}
    found = run(tmp_path / "a", **variables)
    assert found.stderr.startswith("error: bert/secret: not fetched: ") and "Traceback" not in found.stderr
