"""Only a check: a clone without symbolic links holds text files where packages should be."""

from pathlib import Path

from setuptools import setup

for name in ("merge", "search", "evals", "recipes"):
    if not (Path(__file__).parent / "src" / "shoal" / name).is_dir():
        raise SystemExit(
            f"src/shoal/{name} is not a link to {name}/: clone again with symbolic links (git config --global core.symlinks true)"
        )

setup()
