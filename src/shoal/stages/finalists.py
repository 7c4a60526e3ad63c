"""Finalists: one is chosen on the select items, by the metric; then the test items are opened, once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.claim import Scoreboard
from shoal.errors import EvaluationError
from shoal.journal import CandidateRow
from shoal.stages.evaluator import Evaluator
from shoal.types import MergePlan


def select(
    evaluator: Evaluator, mean: NDArray[np.float64], best: CandidateRow | None
) -> tuple[str, MergePlan]:
    """Compare finalists on the select items: the mean, the best sample, every parent, the uniform merge.

    Every parent, since the search's objective may rank them otherwise than the metric does.

    Raises:
        EvaluationError: none of them can be scored.
    """
    journal, space = evaluator.journal, evaluator.prepared.space
    count = len(journal.tells())
    finalists: dict[str, tuple[CandidateRow, MergePlan]] = {}
    genomes = {f"mean@{count}": mean} if count else {}
    if best is not None and best.genome is not None:
        genomes[f"best@{count}"] = np.array(best.genome)
    for name, genome in genomes.items():
        plan = space.decode(genome)
        finalists[name] = evaluator.asked(name, "finalist", plan, genome), plan
    for name, (kind, plan) in evaluator.baselines.items():
        finalists[name] = evaluator.asked(name, kind, plan), plan
    evaluator.seen.stage("selection", len(finalists))
    board = Scoreboard(evaluator.lock, journal)
    ranked: list[tuple[float, float, str]] = []
    for name, (row, plan) in finalists.items():
        done = evaluator.evaluate(row, plan, "select", evaluator.role_items("select"), canonical=True)
        evaluator.seen.evaluated(done, None)
        if done.status == "done":
            ranked.append((board.overall(name, "select"), board.objective(name, "select"), name))
    if not ranked:
        raise EvaluationError("no finalist can be scored on the select items")
    # of equal metric the better smooth objective, then the order above: the mean before the best noisy sample
    winner = max(ranked, key=lambda entry: entry[:2])[2]
    return winner, finalists[winner][1]


def open_test(evaluator: Evaluator, winner: str, plan: MergePlan) -> str:
    """Open the test items: the winner, every parent, the uniform merge; and the winner on all search items.

    Returns the id under which the winner's metric on the search items is journalled: what a search score loses
    against the test score is shrinkage, so both are reported.

    Raises:
        EvaluationError: one of them cannot be scored.
    """
    journal = evaluator.journal
    contenders = {winner: plan} | {name: other for name, (_, other) in evaluator.baselines.items()}
    evaluator.seen.stage("test", len(contenders) + 1)
    opening = {"winner": winner, "generations": len(journal.tells())}
    if opening not in journal.events("test opened"):
        journal.event("test opened", **opening)
    for name, other in contenders.items():
        row = journal.candidate(name)
        assert row is not None  # finalists and baselines were asked by `select`
        done = evaluator.evaluate(row, other, "test", evaluator.role_items("test"), canonical=True)
        evaluator.seen.evaluated(done, None)
    # a baseline's search row may be without generation
    searched = f"{winner} (on search items)" if winner in evaluator.baselines else winner
    row = evaluator.asked(searched, "finalist", plan)
    done = evaluator.evaluate(row, plan, "search", evaluator.role_items("search"), canonical=True)
    if done.status != "done":
        raise EvaluationError(f"{winner} cannot be scored on the search items: {done.error}")
    evaluator.seen.evaluated(done, None)
    return searched
