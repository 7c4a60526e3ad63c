"""Finalists and parents write to the fixed prompts of the sanity guard; a finalist that is degenerate is turned away.

It belongs to the selection, takes canonical weights, and touches no item of any task. What was written is journalled
candidate by candidate, and never written twice.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoal import sanity
from shoal.errors import EvaluationError
from shoal.journal import CandidateRow
from shoal.stages.evaluator import Evaluator
from shoal.types import Completed, Job, MergePlan

Contenders = Mapping[str, tuple[CandidateRow, MergePlan]]


def disqualified(evaluator: Evaluator, finalists: Contenders) -> dict[str, str]:
    """Finalist -> why it must not be chosen; reasons are journalled and said once. Parents are always fit.

    Where the worker cannot generate nobody is turned away, and a note says so.

    Raises:
        EvaluationError: a parent or the uniform merge cannot write; the same command tries again.
    """
    parents = {
        name: (evaluator.asked(name, kind, plan), plan)
        for name, (kind, plan) in evaluator.baselines.items()
        if kind == "parent"
    }
    merges = {name: finalist for name, finalist in finalists.items() if name not in parents}
    if not merges:
        return {}
    known = _written(evaluator, {**merges, **parents})
    if known is None:
        return {}
    reasons = sanity.disqualified([known[name] for name in merges], [known[name] for name in parents])
    before = [event["candidate"] for event in evaluator.journal.events("disqualified")]
    for name, reason in reasons.items():
        if name not in before:
            evaluator.journal.event("disqualified", candidate=name, reason=reason)
            evaluator.seen.say(f"{name} is disqualified by what it writes: {reason}")
    return reasons


def _written(evaluator: Evaluator, contenders: Contenders) -> dict[str, sanity.Written] | None:
    """What all of them wrote, now or before; None where somebody has not written and the worker cannot generate."""
    known = sanity.read_written(evaluator.journal.events("written"))
    missing = {name: contender for name, contender in contenders.items() if name not in known}
    if missing and not evaluator.worker.capabilities().writes:
        unseen = {"candidates": list(missing), "reason": "the worker cannot generate"}
        if unseen not in evaluator.journal.events("unwritten"):
            evaluator.journal.event("unwritten", **unseen)
        evaluator.seen.say(
            f"note: no sanity guard on finalists: {unseen['reason']}; loops and garbage go unseen"
        )
        return None
    if missing:
        evaluator.seen.say(f"{len(missing)} models write to {len(sanity.PROMPTS)} prompts")
    for name, (row, plan) in missing.items():
        known[name] = _write(evaluator, row, plan)
    return known


def _write(evaluator: Evaluator, row: CandidateRow, plan: MergePlan) -> sanity.Written:
    job = Job(row.id, plan, {}, canonical=True, prompts=sanity.PROMPTS, max_tokens=sanity.MAX_TOKENS)
    outcome = evaluator.work(job)
    if isinstance(outcome, Completed):
        merge, score, found = (
            outcome.seconds_merge,
            outcome.seconds_score,
            sanity.written(row.id, outcome.texts),
        )
    elif row.kind in ("parent", "uniform"):
        evaluator.journal.event("disturbed", candidate=row.id, what=outcome.error)
        raise EvaluationError(
            f"{row.id} cannot write to the prompts of the sanity guard: {outcome.error}; the same command tries again"
        )
    else:
        merge, score = 0.0, outcome.seconds
        found = sanity.Written(row.id, (), (), None, outcome.error)
    evaluator.journal.event("written", **found.event(), seconds_merge=merge, seconds_score=score)
    evaluator.counted(merge + score)
    return found
