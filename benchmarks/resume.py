"""Kill a run three times with SIGKILL, continue it each time, and compare it with an uninterrupted run.

    python benchmarks/resume.py recipes/quickstart.yaml FOLDER [--json FILE]

FOLDER gets both runs. Compared are all candidates with their genomes, all evaluations, every item's scores, the fitness
that was told, and the result (without seconds). Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TABLES = {
    "candidates": "SELECT * FROM candidates ORDER BY asked",
    "evaluations": "SELECT id, candidate, role, status, items FROM evaluations ORDER BY id",
    "scores": "SELECT * FROM scores ORDER BY candidate, role, task, item",
    "tells": "SELECT * FROM tells ORDER BY generation",
}


def content(run: Path) -> dict[str, Any]:
    with sqlite3.connect(run / "journal.sqlite") as database:
        found: dict[str, Any] = {name: database.execute(query).fetchall() for name, query in TABLES.items()}
    result = json.loads((run / "result.json").read_text())
    result["cost"].pop("seconds")
    return found | {"result": result}


def evaluations(run: Path) -> int:
    if not (run / "journal.sqlite").is_file():
        return 0
    with sqlite3.connect(run / "journal.sqlite") as database:
        try:
            return int(database.execute("SELECT COUNT(*) FROM evaluations").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    command = [
        sys.executable,
        "-c",
        "from shoal.cli import main; main()",
        "evolve",
        str(arguments.recipe),
        "--quiet",
        "--run",
    ]
    whole, killed = arguments.folder / "whole", arguments.folder / "killed"
    subprocess.run([*command, str(whole)], check=True)
    total = evaluations(whole)
    kills = []
    for share in (0.02, 0.4, 0.97):  # among the anchors, in the search, while testing
        process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL)
        while evaluations(killed) < share * total and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills.append({"after_evaluations": evaluations(killed), "of": total, "exit_code": process.returncode})
        print(f"killed after {kills[-1]['after_evaluations']} of {total} evaluations", flush=True)
    subprocess.run([*command, str(killed)], check=True)
    a, b = content(whole), content(killed)
    rows = [{"what": name, "rows": len(a[name]), "identical": a[name] == b[name]} for name in a]
    for row in rows:
        print(f"{row['what']:>12}: {row['rows']} rows, {'identical' if row['identical'] else 'DIFFERENT'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"kills": kills, "rows": rows}, indent=2) + "\n")
    sys.exit(
        not all(row["identical"] for row in rows)
        or any(kill["exit_code"] != -signal.SIGKILL for kill in kills)
    )


if __name__ == "__main__":
    main()
