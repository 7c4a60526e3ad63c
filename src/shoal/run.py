"""The run: anchors, search, finalists, one opening of the test items, result. Every step is journalled first.

A resumed run rebuilds the optimizer by replaying the journal, so it asks the genomes that an uninterrupted run would
have asked. Work on candidates goes through the Worker protocol; this module and its stages know no tensors and no
lm-eval.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.claim import make_result
from shoal.errors import RunError
from shoal.folder import RunFolder
from shoal.journal import Journal
from shoal.lock import Inheritance, Lock, write_text
from shoal.models import NO_MERGES, Merges
from shoal.output import read_plan, winner_sha256, write_best
from shoal.preflight import Prepared, prepare, restore
from shoal.recipe import Recipe
from shoal.search.optimizer import warm_sigma0
from shoal.stages.anchors import Anchors
from shoal.stages.evaluator import Evaluator
from shoal.stages.finalists import open_test, select
from shoal.stages.observer import Follower, Observer, Silent
from shoal.stages.search import Search
from shoal.stages.start import move_start
from shoal.types import MergePlan, Worker
from shoal.warm import warm_genome
from shoal.worker import LocalWorker

# recipe, lock and folder of a new run -> what it takes over from the runs that it descends from
Openings = Callable[[Recipe, Lock, Path], Inheritance]


def evolve(
    recipe: Recipe,
    run: Path,
    *,
    base_folder: Path = Path(),
    device: str = "auto",
    memory: str = "auto",
    memory_limit: int | None = None,
    reopen_test: bool = False,
    save_weights: bool = False,
    observer: Observer | None = None,
    worker: Callable[[Prepared, str], Worker] | None = None,
    merges: Merges = NO_MERGES,
    openings: Openings | None = None,
) -> dict[str, Any]:
    """Start a run in folder `run`, or continue the one that is there; returns the content of result.json.

    base_folder: what relative paths in the recipe are relative to. memory: where the parents are kept (`auto`,
    `device`, `host`, `disk`); memory_limit: bytes of device memory to stay under. worker: makes the worker; the default
    loads the models into this process. merges: how the merges of ours among the models were made. openings: looks up
    which openings of its test items a new run inherits.

    Raises:
        ShoalError: one clear message; the run folder keeps everything that was finished.
        KeyboardInterrupt: after Ctrl-C; likewise.
    """
    seen = observer or Silent()
    folder = RunFolder(run)
    with folder.held():
        prepared = _open(folder, recipe, base_folder, reopen_test, seen, merges, openings)
        if folder.done.is_file():
            if save_weights:
                write_best(folder.best, prepared.lock, recipe, read_plan(folder.best), save_weights)
            return dict(json.loads(folder.result.read_text(encoding="utf-8")))
        journal = Journal(folder.journal)
        try:
            loaded = _load(folder, prepared, journal, device, (memory, memory_limit), seen, worker)
            try:
                return _go(
                    Evaluator(folder, prepared, journal, loaded, seen),
                    save_weights or recipe.output.save_weights,
                )
            finally:
                loaded.close()
        finally:
            journal.close()


def _open(
    folder: RunFolder,
    recipe: Recipe,
    base_folder: Path,
    reopen_test: bool,
    seen: Observer,
    merges: Merges,
    openings: Openings | None,
) -> Prepared:
    """A new run: prepare and write its lock. An existing one: check that this recipe may continue it."""
    if not folder.started:
        prepared = warmed(prepare(recipe, base_folder, seen.say, merges=merges), base_folder)
        if openings is not None:
            prepared = inheriting(prepared, openings(placed(recipe, base_folder), prepared.lock, folder.path))
        folder.start(recipe, prepared.lock)
        return prepared
    grown = folder.check_same(recipe)
    _, lock = folder.open()
    prepared = restore(recipe, lock, seen.say)
    if grown is not None:
        journal = Journal(folder.journal)
        try:
            opened = len(journal.events("test opened"))
            if opened and not reopen_test:
                raise RunError(
                    f"{folder.path}: the test items of this run were opened already; searching on and testing again"
                    " makes the claim weaker: allow it by --reopen-test (the claim will say how often they were opened)"
                )
            journal.event("budget", before=grown[0], after=grown[1], max_seconds=recipe.search.max_seconds)
        finally:
            journal.close()
        folder.done.unlink(missing_ok=True)
        write_text(folder.recipe, recipe.to_yaml())
    return prepared


def warmed(prepared: Prepared, base_folder: Path) -> Prepared:
    """The same, started from the merge that the recipe names, with smaller steps; the lock holds the start itself."""
    source, lock = placed(prepared.recipe, base_folder).search.warm_start, prepared.lock
    if source is None:
        return prepared
    genome, note = warm_genome(Path(source), prepared.space, lock.models)
    start = lock.search.model_copy(update={"x0": tuple(float(x) for x in genome)})
    sigma0 = prepared.recipe.search.sigma0 or warm_sigma0(prepared.space.size)
    return replace(
        prepared,
        lock=lock.model_copy(update={"search": start, "sigma0": sigma0}),
        notes=(*prepared.notes, note),
    )


def placed(recipe: Recipe, base_folder: Path) -> Recipe:
    """The recipe with its warm start as an absolute path."""
    source = recipe.search.warm_start
    if source is None:
        return recipe
    place = str((base_folder / Path(source).expanduser()).resolve())
    return recipe.model_copy(update={"search": recipe.search.model_copy(update={"warm_start": place})})


def inheriting(prepared: Prepared, before: Inheritance) -> Prepared:
    """The same, with what is known of openings of its test items by ancestors in its lock and in its notes."""
    notes = []
    if before.openings:
        runs = ", ".join(dict.fromkeys(opening.run for opening in before.openings))
        number = "once" if len(before.openings) == 1 else f"{len(before.openings)} times"
        notes.append(
            f"its test items were opened {number} before, by runs that it descends from ({runs}); the claim will say so"
        )
    if before.unknown:
        notes.append(
            f"whether ancestors opened its test items before is unknown for {', '.join(before.unknown)}: their locks could not"
            " be asked for; the claim will say so. With the Hub in reach, a new run knows"
        )
    changes = {"inherited": before.openings, "unknown_ancestors": before.unknown}
    lock = prepared.lock.model_copy(update=changes)
    return replace(prepared, lock=lock, notes=(*prepared.notes, *notes))


def _load(
    folder: RunFolder,
    prepared: Prepared,
    journal: Journal,
    device: str,
    memory: tuple[str, int | None],
    seen: Observer,
    worker: Callable[[Prepared, str], Worker] | None,
) -> Worker:
    """The worker; where it computes and how long it took to load are journalled."""
    started = time.perf_counter()
    if worker is None:
        local = LocalWorker(prepared.recipe, prepared.lock, device, seen.say, *memory, folder.plan)
        for note in (*prepared.notes, *local.notes):
            journal.event("note", text=note)
            seen.say(f"note: {note}")
        loaded: Worker = local
    else:
        loaded = worker(prepared, device)
    where = loaded.capabilities().device
    earlier = journal.events("start")
    if earlier and earlier[-1]["device"] != where:
        seen.say(
            f"note: continued on {where}, before on {earlier[-1]['device']}; results may differ in last digits"
        )
    journal.event("start", device=where)
    journal.event("loaded", seconds=time.perf_counter() - started)
    return loaded


def _go(evaluator: Evaluator, save_weights: bool) -> dict[str, Any]:
    """All stages; what is journalled is not done again."""
    evaluator.seen.begin(evaluator.prepared, len(evaluator.journal.evaluations()))
    anchors = Anchors(evaluator)
    anchors.score()
    move_start(evaluator, anchors)
    search = Search(evaluator, anchors)
    if isinstance(evaluator.seen, Follower):
        evaluator.seen.follow(lambda: search.mean)
    search.run()
    winner, plan = select(evaluator, search.mean, search.best, anchors.contenders())
    searched = open_test(evaluator, winner, plan)
    return _finish(evaluator, winner, plan, searched, save_weights)


def _finish(
    evaluator: Evaluator, winner: str, plan: MergePlan, searched: str, save_weights: bool
) -> dict[str, Any]:
    folder, recipe, lock = evaluator.folder, evaluator.recipe, evaluator.lock
    evaluator.seen.say("writing the winner")
    digest = winner_sha256(lock, plan)
    kinds = {name: kind for name, (kind, _) in evaluator.baselines.items()}
    result = make_result(recipe, lock, evaluator.journal, winner, searched, kinds, digest)
    write_best(folder.best, lock, recipe, plan, save_weights)
    write_text(folder.result, json.dumps(result, indent=2) + "\n")
    write_text(folder.done, f"{result['verdict']}\n")
    return result
