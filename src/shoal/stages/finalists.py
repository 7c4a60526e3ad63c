"""Finalists: one of those that still write as their parents do is chosen on the select items, by the metric; then the
test items are opened, once.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from shoal.claim import Scoreboard
from shoal.errors import EvaluationError
from shoal.journal import CandidateRow
from shoal.sample import search_sample
from shoal.stages.evaluator import Evaluator
from shoal.stages.writing import disqualified
from shoal.types import MergePlan


def select(
    evaluator: Evaluator,
    mean: NDArray[np.float64],
    best: CandidateRow | None,
    contenders: Collection[str],
) -> tuple[str, MergePlan]:
    """Compare finalists on the select items: the mean, the best sample, and the anchors named by `contenders`.

    Each writes to the fixed prompts of the sanity guard too; one that is degenerate next to the parents is not chosen.

    Raises:
        EvaluationError: none of them can be scored.
    """
    journal = evaluator.journal
    count = len(journal.tells())
    finalists: dict[str, tuple[CandidateRow, MergePlan]] = {}
    genomes = {f"mean@{count}": mean} if count else {}
    if best is not None and best.genome is not None:
        genomes[f"best@{count}"] = np.array(best.genome)
    for name, genome in genomes.items():
        plan = evaluator.prepared.decode(genome)
        finalists[name] = evaluator.asked(name, "finalist", plan, genome), plan
    for name in contenders:
        kind, plan = evaluator.baselines[name]
        finalists[name] = evaluator.asked(name, kind, plan), plan
    evaluator.seen.stage("selection", len(finalists))
    board = Scoreboard(evaluator.lock, journal)
    scored: list[str] = []
    for name, (row, plan) in finalists.items():
        done = evaluator.evaluate(row, plan, "select", evaluator.role_items("select"), canonical=True)
        evaluator.seen.evaluated(done, None)
        if done.status == "done":
            scored.append(name)
    unfit = disqualified(evaluator, {name: finalists[name] for name in scored})
    ranked = [
        (board.overall(name, "select"), board.objective(name, "select"), name)
        for name in scored
        if name not in unfit
    ]
    if not ranked:
        raise EvaluationError("no finalist can be scored on the select items")
    # of equal metric the better smooth objective, then the order above: the mean before the best noisy sample
    winner = max(ranked, key=lambda entry: entry[:2])[2]
    return winner, finalists[winner][1]


def open_test(evaluator: Evaluator, winner: str, plan: MergePlan) -> str:
    """Open the test items: the winner, every parent, the uniform merge; and the winner on the anchors' search items.

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
    done = evaluator.evaluate(row, plan, "search", search_sample(evaluator.lock), canonical=True)
    if done.status != "done":
        raise EvaluationError(f"{winner} cannot be scored on the search items: {done.error}")
    evaluator.seen.evaluated(done, None)
    return searched
