"""A recipe's whole way over a Hub, by the command line: evolved from Hub ids, published, downloaded, reproduced.

    python benchmarks/publish.py --json FILE [--reader PYTHON] [--budget N]

The Hub is the local one of tests/hub, the client the real one. The models of the tiny zoo are on it; the quickstart
recipe is evolved from their ids, published recipe-only and, as another repository, with weights, where the upload is cut
five times; then a reader downloads and reproduces both, with an empty cache, without a token and, with --reader, in an
environment of its own (the python of a virtual environment that shoal is installed in). Every command's seconds and exit
code are written, and what must hold: one commit on main beside the first, equal hashes, no item flipped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from hub.local_hub import LocalHub
from hub.tiny_zoo import TOKEN, USER, put_zoo, quickstart

RECIPE_ONLY, WEIGHTS = f"{USER}/quickstart", f"{USER}/quickstart-weights"
CUTS = 5


class Commands:
    """Runs `shoal` and keeps what each command took and said."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.rows: list[dict[str, Any]] = []

    def run(self, who: str, python: str, variables: dict[str, str], *arguments: str, code: int = 0) -> str:
        """What the command printed.

        Raises:
            SystemExit: another exit code than `code`.
        """
        own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SHOAL_", "PYTHONPATH"))}
        started = time.perf_counter()
        done = subprocess.run(
            [str(Path(python).parent / "shoal"), *arguments],
            cwd=self.place,
            env=own | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
        shown = " ".join(a.replace(str(self.place), ".") for a in arguments)
        self.rows.append(
            {"who": who, "command": f"shoal {shown}", "exit": done.returncode, "seconds": seconds}
        )
        print(f"{who:9s} shoal {shown}: exit {done.returncode}, {seconds:.1f} s", flush=True)
        if done.returncode != code:
            raise SystemExit(f"expected exit code {code}:\n{done.stdout}\n{done.stderr}")
        return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--reader", default=sys.executable, help="python of the reader's environment")
    parser.add_argument("--budget", type=int, help="candidates; default: the quickstart's")
    arguments = parser.parse_args()

    about = machine()
    with tempfile.TemporaryDirectory(prefix="shoal-hub-") as scratch, LocalHub() as hub:
        place = Path(scratch)
        commands = Commands(place)
        put_zoo(hub)
        (place / "recipe.yaml").write_text(quickstart(arguments.budget), encoding="utf-8")

        mine = hub.environment(place / "publisher" / "hf", TOKEN) | {
            "SHOAL_CACHE": str(place / "publisher" / "shoal")
        }
        commands.run("publisher", sys.executable, mine, "evolve", "recipe.yaml", "--run", "run", "--quiet")
        for _ in range(CUTS):
            hub.faults.clear()
            hub.fault("cut-request", "PUT /upload/", times=None, after=1)
            commands.run(
                "publisher", sys.executable, mine, "publish", "run", WEIGHTS, "--weights", "--yes", code=2
            )
            half = [commit.title for commit in hub.store.repos[WEIGHTS].history()]
            assert half == ["initial commit"], half
        hub.faults.clear()
        commands.run("publisher", sys.executable, mine, "publish", "run", WEIGHTS, "--weights", "--yes")
        commands.run("publisher", sys.executable, mine, "publish", "run", RECIPE_ONLY, "--yes")
        titles = {name: [c.title for c in hub.store.repos[name].history()] for name in (RECIPE_ONLY, WEIGHTS)}
        assert all(len(found) == 2 for found in titles.values()), titles

        reports, hashes = {}, {}
        for repo in (RECIPE_ONLY, WEIGHTS):
            name = repo.rpartition("/")[2]
            other = hub.environment(place / f"reader-{name}" / "hf") | {
                "SHOAL_CACHE": str(place / f"reader-{name}" / "shoal")
            }
            commands.run("reader", arguments.reader, other, "download", repo, "-o", name)
            reports[repo] = commands.run("reader", arguments.reader, other, "reproduce", repo, "--score")
            print(reports[repo], flush=True)
            hashes[repo] = _weights_sha256(place / name)
        expected = json.loads((place / "run" / "result.json").read_text())["weights_sha256"]
        assert set(hashes.values()) == {expected}, (hashes, expected)
        flips = {repo: re.findall(r"(\d+) of (\d+)", text) for repo, text in reports.items()}
        assert all(found and all(int(n) == 0 for n, _ in found) for found in flips.values()), flips
        assert not hub.broken, hub.broken
        content = {
            "machine": about,
            "reader": "an environment of its own"
            if arguments.reader != sys.executable
            else "the publisher's environment",
            "weights_sha256": expected,
            "commits": titles,
            "cut_uploads": CUTS,
            "items_compared": {repo: sum(int(n) for _, n in found) for repo, found in flips.items()},
            "items_flipped": 0,
            "commands": commands.rows,
        }
    print(f"weights_sha256 {expected[:16]} everywhere; flips {flips}")
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _weights_sha256(folder: Path) -> str:
    from shoal.merge import Checkpoint, weights_sha256

    checkpoint = Checkpoint.open(folder)
    return weights_sha256((name, checkpoint.tensor(name)) for name in checkpoint.names)


if __name__ == "__main__":
    main()
