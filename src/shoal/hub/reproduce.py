"""`shoal reproduce`: a published winner made again from its lock, its scores measured again, and what agrees.

Nothing of the repository is executed: its tasks are found by name among lm-eval's own or in a folder of yours, and are
the lock's by the hashes of their items; where they are not, and the items were published, these are scored as data (see
`tasks_here`). Task YAML of the repository is used only where that was asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.endpoint import Say
from shoal.errors import EvaluationError, PublishError
from shoal.hub.alone import weights_alone
from shoal.hub.compare import Compared, compare
from shoal.hub.download import DOCUMENTS, MODEL, check_weights
from shoal.hub.fetch import DEFAULT_LIMITS, Limits
from shoal.hub.opened import LOCK, Opened, open_publication
from shoal.hub.published import Device
from shoal.hub.rebuild import other_versions, parents_here, rebuilt_sha256
from shoal.hub.repository import DATA, fetched, split_revision
from shoal.hub.score_file import COMPARED, read_scores
from shoal.hub.tasks_here import Supply, supply, tasks_here
from shoal.lock import Lock
from shoal.preflight import resolve_include_path
from shoal.types import Completed, Failed, ItemScore, Job, MergePlan
from shoal.worker import LocalWorker

TASKS = "tasks"
_TASK_FILES = (f"{TASKS}/*.yaml", f"{TASKS}/*.yml", f"{TASKS}/*.json", f"{TASKS}/*.parquet", f"{TASKS}/*.txt")


@dataclass(frozen=True)
class Check:
    """One line of the table. expected: as published; found: here."""

    what: str
    expected: str
    found: str
    agrees: bool


@dataclass(frozen=True)
class Reproduction:
    """What agrees. notes: what may explain a difference. device: in words, None where nothing was scored.

    rebuilt: whether the weights were made again from the parents; else those that were published were checked. unjudged:
    tasks whose correctness was not compared, but only their log-likelihoods.
    """

    where: str
    checks: tuple[Check, ...]
    scores: tuple[Compared, ...] = ()
    notes: tuple[str, ...] = ()
    device: str | None = None
    rebuilt: bool = True
    unjudged: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        return all(check.agrees for check in self.checks)


def reproduce(
    source: str | Path,
    *,
    score: bool = False,
    include_path: str | Path | None = None,
    trust_tasks: bool = False,
    device: str = "auto",
    limits: Limits = DEFAULT_LIMITS,
    say: Say = lambda text: None,
) -> Reproduction:
    """Rebuild a published winner from its lock and compare; with `score` measure its items again, too.

    Where its parents are folders of the publisher, it cannot be rebuilt: then the published weights are compared with
    the lock's hash, and scored as they are.

    source: a repository (`org/name`, `org/name@revision`), a published lock.yaml, or a folder with one. include_path:
    folder with the tasks that are not lm-eval's own; without it their items are taken from what was published. trust_tasks:
    use task YAML that the repository holds, which can run code on this machine.

    Raises:
        PublishError: it cannot be fetched or rebuilt, or a task is neither here nor published. EvaluationError, CheckpointError: tasks
            or parents cannot be loaded. What merely differs is no error but a check that does not agree.
    """
    with _opened(source, trust_tasks, limits, say) as opened:
        tasks = _supply(opened, include_path, trust_tasks, say) if score else None
        if opened.local_parents() and opened.lock.weights_published:
            return _as_published(opened, tasks, device, say)
        lock = parents_here(opened, None if tasks is None else tasks.include, say)
        winner = opened.lock.winner
        count = sum(len(model.files) for model in lock.models)
        checks = [
            Check("parents", f"{count} files", "same hashes", True),
        ]
        say("merging")
        found = rebuilt_sha256(opened, lock)
        checks.append(
            Check("weights_sha256", winner.weights_sha256[:16], found[:16], found == winner.weights_sha256)
        )
        if opened.lock.weights_published:
            checks.append(_published_weights(opened))
        versions = other_versions(lock)
        notes = [f"libraries differ: {', '.join(versions)}"] if versions else []
        if tasks is None:
            return Reproduction(opened.where, tuple(checks), notes=tuple(notes))
        return _scored(opened, lock, tasks, winner.merge_plan(), device, checks, notes, say)


def _as_published(opened: Opened, tasks: Supply | None, device: str, say: Say) -> Reproduction:
    """The published weights by their hash, and their scores: what can be said without the parents."""
    names = ", ".join(opened.local_parents())
    say("checking the weights")
    checks = [_published_weights(opened)]
    notes = [
        f"not rebuilt: its parents {names} are folders that were not published; the weights here are the published ones"
    ]
    found = Reproduction(opened.where, tuple(checks), notes=tuple(notes), rebuilt=False)
    if tasks is None or not found.agrees:
        return found
    lock, plan = weights_alone(opened, tasks.include)
    return replace(_scored(opened, lock, tasks, plan, device, checks, notes, say), rebuilt=False)


@contextmanager
def _opened(source: str | Path, trust_tasks: bool, limits: Limits, say: Say) -> Iterator[Opened]:
    path = Path(source)
    if path.is_file() or (path / LOCK).is_file():
        yield open_publication(path.parent if path.is_file() else path, str(source))
        return
    repo, revision = split_revision(str(source))
    allow = (*DATA, *DOCUMENTS, *MODEL, *(_TASK_FILES if trust_tasks else ()))
    with (
        tempfile.TemporaryDirectory(prefix="shoal-") as scratch,
        fetched(repo, revision, Path(scratch) / "publication", allow, limits, say) as (opened, _),
    ):
        yield opened


def _supply(opened: Opened, include_path: str | Path | None, trust_tasks: bool, say: Say) -> Supply:
    """Custom tasks from your folder, from the repository's where you trust it, from a zoo, or as data.

    Raises:
        PublishError: there must be one of them, and is none.
    """
    if include_path is not None:
        given, words = resolve_include_path(str(include_path), Path(), say), "--include-path"
    elif trust_tasks:
        given, words = opened.folder / TASKS, "the repository's task files (--trust-tasks)"
    else:
        named = opened.recipe.evaluation.include_path
        if named is None or not named.startswith("zoo:"):
            return supply(opened, None)
        given, words = resolve_include_path(named, Path(), say), named
    if given is None or not given.is_dir():
        raise PublishError(f"{given}: no such folder with tasks")
    return supply(opened, given.resolve(), words)


def _published_weights(opened: Opened) -> Check:
    expected = opened.lock.winner.weights_sha256[:16]
    try:
        check_weights(opened)
    except PublishError:
        return Check("published weights", expected, "others", False)
    return Check("published weights", expected, expected, True)


def _scored(
    opened: Opened,
    lock: Lock,
    tasks: Supply,
    plan: MergePlan,
    device: str,
    checks: list[Check],
    notes: list[str],
    say: Say,
) -> Reproduction:
    """The same with the scores of `plan`, which merges the models of `lock`."""
    published = read_scores(opened.folder, opened.lock, opened.where)
    say("building requests")
    here = tasks_here(opened, lock, tasks)
    for task in opened.lock.run.tasks:
        counts = ", ".join(f"{len(task.roles[role].items)} {role}" for role in COMPARED)
        checks.append(Check(f"items {task.task}", counts, f"from {here.origins[task.task]}", True))
    for one in opened.lock.tasks:
        for role in COMPARED:
            expected = (one.requests or {}).get(role)
            found = here.digests.get((one.task, role))
            if expected is not None:
                same = expected == found
                checks.append(
                    Check(f"requests {one.task} {role}", expected[:16], (found or "none")[:16], same)
                )
    worker = LocalWorker(opened.recipe, lock, device, say, tasks=here.planned)
    try:
        where = worker.capabilities().device
        measured = _measured(opened, worker, plan, say)
    finally:
        worker.close()
    same_kind = _same_kind(opened.lock.device, where)
    if not same_kind:
        notes.append(
            f"scored on {where}, the publisher on {opened.lock.device.words}: the lock's allowance counts"
        )
    notes += here.notes
    for name, why in here.unjudged.items():
        metric = lock.task(name).metric
        notes.append(
            f"{name}: only log-likelihoods are compared; {metric} needs the task's own files ({why}): --include-path"
        )
    rows = compare(published, measured, opened.lock, same_kind, here.unjudged)
    limit = opened.lock.tolerance.loglik
    for row in rows:
        what = f"{row.task} {row.role}"
        allowed = f"at most {row.allowed:.2%}" if row.allowed else "none"
        if row.judged:
            checks.append(Check(f"flips {what}", allowed, f"{row.flips} of {row.items}", row.agrees))
        if row.largest is not None and row.median is not None:
            words = f"median {row.median:.2g}, largest {row.largest:.2g}"
            checks.append(
                Check(f"log-likelihood {what}", f"within {limit:g} nats", words, row.largest <= limit)
            )
    return Reproduction(
        opened.where, tuple(checks), tuple(rows), tuple(notes), where, unjudged=tuple(here.unjudged)
    )


def _measured(opened: Opened, worker: LocalWorker, plan: MergePlan, say: Say) -> list[ItemScore]:
    """The winner's scores, role by role as the run scored it."""
    winner = opened.lock.winner
    found: list[ItemScore] = []
    for role in COMPARED:
        ids = {(task.task, role): task.roles[role].items for task in opened.lock.run.tasks}
        say(f"scoring {sum(map(len, ids.values()))} {role} items")
        worker.submit(Job(winner.id, plan, ids, canonical=True))
        done: Completed | Failed = worker.poll()
        if isinstance(done, Failed):
            raise EvaluationError(
                f"{opened.where}: the winner cannot be scored on {role} items: {done.error}"
            )
        found += done.scores
    return found


def _same_kind(published: Device, here: str) -> bool:
    """CPUs are of one kind; GPUs are where they have one name."""
    kind = here.partition(" ")[0].partition(":")[0]
    if kind != published.kind:
        return False
    return kind == "cpu" or published.words.partition(" (")[2] == here.partition(" (")[2]
