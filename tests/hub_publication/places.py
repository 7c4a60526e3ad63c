"""A cache of the Hub with repositories of ours, and secrets that a run may come by."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

SECRET_TOKEN = "hf_" + "AbCdEfGh1234567890xyz"
PLAIN_TOKEN = "a-token-without-a-known-form-0001"
USER = "zaphodbeeblebrox"
HOST = "heart-of-gold.example.org"
COMMITS = {name: f"{number:040x}" for number, name in enumerate(("base", "left", "right", "first"), start=10)}


@dataclass(frozen=True)
class HubCache:
    """A cache folder of huggingface_hub with repositories `ann/...`."""

    folder: Path

    def add(self, name: str, files: Path, card: str, **texts: str) -> None:
        commit = COMMITS[name]
        root = self.folder / f"models--ann--{name}"
        snapshot = root / "snapshots" / commit
        shutil.copytree(files, snapshot)
        (snapshot / "README.md").write_text(card)
        for key, text in texts.items():
            (snapshot / key).write_text(text)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(commit)


def secret_text(home: Path) -> str:
    return (
        f"no space left in {home}/work/run of {HOST} for {USER}: token {SECRET_TOKEN}, {PLAIN_TOKEN}\n"
        f'Traceback (most recent call last):\n  File "{home}/x.py", line 3, in merge\n    merge()\nKeyError: 1\n'
    )
