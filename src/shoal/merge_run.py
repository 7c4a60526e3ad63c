"""`shoal merge RUN`: a candidate of a run as a model folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shoal.errors import RunError, nearest
from shoal.folder import RunFolder
from shoal.journal import Journal
from shoal.output import read_plan, write_weights
from shoal.preflight import restore


def write_candidate(run: Path, out: Path, candidate: str | None = None) -> str:
    """Write the winner (or `candidate`, by its id) of the run in folder `run` to `out`; returns what was written.

    Raises:
        RunError: no run, not finished, or no such candidate.
        CheckpointError: `out` exists, the disk is full, or a parent's files have changed.
    """
    folder = RunFolder(run)
    recipe, lock = folder.open()
    prepared = restore(recipe, lock)
    if candidate is None:
        if not folder.done.is_file():
            raise RunError(
                f"{run}: not finished, so it has no winner; continue it with `shoal evolve`, or name a --candidate"
            )
        plan, name = read_plan(folder.best), "winner"
    else:
        journal = Journal(folder.journal)
        try:
            row = journal.candidate(candidate)
            known = [
                c.id for c in journal.candidates() if c.genome is not None or c.kind in ("parent", "uniform")
            ]
        finally:
            journal.close()
        if row is None or candidate not in known:
            raise RunError(f"{run}: no candidate {candidate!r}; {nearest(candidate, known)}")
        name = candidate
        if row.genome is not None:
            plan = prepared.decode(np.array(row.genome))
        else:
            plan = prepared.baselines()[candidate][1]
        if plan.digest() != row.plan_digest:
            raise RunError(
                f"{run}: {candidate} is another merge than this version of shoal makes; use the lock's versions"
            )
    write_weights(out, lock, recipe, plan)
    return name
