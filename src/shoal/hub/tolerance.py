"""What may differ when a published run is scored again elsewhere."""

from __future__ import annotations

from pathlib import Path

from shoal.folder import RunFolder
from shoal.hub.published import Tolerance
from shoal.journal import Journal
from shoal.lock import Lock

# what an evaluation in float32, or in 16 bits, may differ by between kinds of device
LOGLIK = {"float32": 0.01}
LOGLIK_16 = 0.5
FLIPS = {"float32": 0.005}
FLIPS_16 = 0.02


def tolerance(run: Path, lock: Lock, winner: str, dtype: str) -> Tolerance:
    """What may differ on another kind of device: an allowance by rule, not measured.

    A log-likelihood may move by 0.01 nats where the model is evaluated in float32, by 0.5 in 16 bits. Then a
    multiple-choice item may flip where its two best options are closer than twice that; the allowed rate is the share of
    such items among the winner's test items, and at least 0.5% (2% in 16 bits), which is what generation and greedy
    matches are allowed.
    """
    exact = (lock.dtype if dtype == "auto" else dtype) == "float32"
    loglik, floor = (LOGLIK["float32"], FLIPS["float32"]) if exact else (LOGLIK_16, FLIPS_16)
    choices = {task.task for task in lock.tasks if task.output_type == "multiple_choice"}
    journal = Journal(RunFolder(run).journal)
    try:
        scores = journal.scores(winner, "test")
    finally:
        journal.close()
    close = 0
    for score in scores:
        best = sorted(score.logliks, reverse=True)[:2]
        close += score.task in choices and len(best) == 2 and best[0] - best[1] < 2 * loglik
    return Tolerance(other_kind=round(max(floor, close / max(1, len(scores))), 6), loglik=loglik)
