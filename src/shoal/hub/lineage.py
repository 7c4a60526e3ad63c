"""Where a merge comes from: parents that are merges of ours, and the run that its search started from.

Their openings of the test items are inherited: an item that an ancestor was tested on is not new to its descendants.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shoal.errors import PublishError, RunError
from shoal.folder import RunFolder
from shoal.hub.parents import Parent, parents_of, published_lock
from shoal.hub.portable import Names
from shoal.hub.published import FORMAT, Ancestor, PublishedLock, load_published, parse_published
from shoal.journal import Journal
from shoal.lock import Inheritance, Lock, Opening
from shoal.recipe import Recipe

PUBLISHED = "published.yaml"  # the published lock in a folder that a search was started from
MAX_DEPTH = 16  # of runs on this machine that began from each other


def lineage(
    recipe: Recipe,
    run: Path,
    parents: Sequence[Parent],
    locks: Mapping[Parent, str | None],
    lock: Lock | None = None,
    depth: int = 0,
) -> tuple[Ancestor, ...]:
    """Ancestors of a run: parents with a published lock, merges of runs here, and the search's start.

    locks: texts of the parents' published locks, None of one that has none; a parent of the Hub that is no key could not be
    asked, and is an ancestor of whom nothing is known, like one whose lock cannot be read. lock: the run's own, for the test
    items that it shares with them. Roots are not asked: they are in the lineage of the merge that they are of.
    """
    tested = None if lock is None else _tested(lock)
    found = []
    for parent in parents:
        if parent.root:
            continue
        text = locks.get(parent)
        if text is not None and FORMAT in text[:400]:
            try:
                read = parse_published(text, f"lock.yaml of {parent.reference}")
            except PublishError:
                found.append(_unknown("parent", parent.pinned))
            else:
                found.append(_of_published(read, "parent", parent.pinned, tested))
        elif parent.kind == "hub" and parent not in locks:
            found.append(_unknown("parent", parent.pinned))
        elif parent.merge and parent.folder is not None:
            found.append(_of_folder(parent.folder, "parent", parent.reference, tested, depth))
    if recipe.search.warm_start is not None:
        found.append(_of_start(recipe.search.warm_start, run, tested, depth))
    return tuple(found)


def openings_before(recipe: Recipe, lock: Lock, run: Path) -> Inheritance:
    """Openings of a new run's test items by those that it descends from, and who could not be asked."""
    found = ancestors(recipe, lock, run)
    return Inheritance(tuple(inherited(found)), tuple(dict.fromkeys(unknown(found))))


def ancestors(recipe: Recipe, lock: Lock, run: Path, depth: int = 0) -> tuple[Ancestor, ...]:
    """As `lineage`, with the parents' published locks looked up.

    Raises:
        PublishError: the publication of a merge of ours cannot be had; without it there is no such parent.
    """
    own = [parent for parent in parents_of(lock.models) if not parent.root]
    locks: dict[Parent, str | None] = {}
    for parent in own:
        try:
            locks[parent] = published_lock(parent)
        except PublishError:
            if parent.merge:
                raise
    return lineage(recipe, run, own, locks, lock, depth)


def unknown(ancestors: Sequence[Ancestor]) -> Iterator[str]:
    """Ancestors, at any depth, that could not be asked."""
    for ancestor in ancestors:
        if ancestor.unknown:
            yield ancestor.reference
        yield from unknown(ancestor.lineage)


def known_before(lock: Lock, ancestors: Sequence[Ancestor]) -> tuple[Ancestor, ...]:
    """The same for a run whose lock tells what was known when it began.

    Of a parent that could be asked then and cannot now, only the openings are still known, from the lock: it is left out.
    """
    known = []
    for one in ancestors:
        if not one.unknown or one.reference in lock.unknown_ancestors:
            known.append(one)
        elif one.relation == "warm start":
            known.append(one.model_copy(update={"unknown": False}))
    return tuple(known)


def _unknown(relation: str, reference: str, name: str = "") -> Ancestor:
    return Ancestor.model_validate(
        {"relation": relation, "reference": reference, "name": name or reference, "unknown": True}
    )


def _tested(lock: Lock) -> tuple[str, ...]:
    """Content hashes of all test items; tasks on the same data have the same."""
    return tuple(digest for task in lock.tasks for digest in task.roles["test"].hashes)


def _shared(tested: Sequence[str] | None, lock: Lock) -> int | None:
    theirs = frozenset(_tested(lock))
    return None if tested is None else sum(digest in theirs for digest in tested)


def _of_published(
    lock: PublishedLock, relation: str, reference: str, tested: Sequence[str] | None
) -> Ancestor:
    return Ancestor.model_validate(
        {
            "relation": relation,
            "reference": reference,
            "name": lock.name,
            "verdict": lock.verdict,
            "weights_sha256": lock.winner.weights_sha256,
            "parents": tuple(model.ref for model in lock.run.models),
            "openings": lock.openings,
            "shared": _shared(tested, lock.run),
            "lineage": lock.lineage,
        }
    )


def _of_start(source: str, run: Path, tested: Sequence[str] | None, depth: int) -> Ancestor:
    """The start of a search: a finished run or a published recipe where it can be found, else only its name."""
    written = Path(source).expanduser()
    name = written.name or "start"
    for place in (written, Path.cwd() / written, run.parent / written):
        if (place / PUBLISHED).is_file():  # ORG/NAME@COMMIT in the cache
            reference = f"{place.parent.name}/{place.name}"
            return _of_published(load_published(place / PUBLISHED), "warm start", reference, tested)
        if (place / "lock.yaml").is_file():
            return _of_folder(place, "warm start", name, tested, depth)
    return _unknown("warm start", name)


def _of_folder(
    place: Path, relation: str, reference: str, tested: Sequence[str] | None, depth: int
) -> Ancestor:
    """A publication's folder, or a run of this machine."""
    try:
        return _of_published(load_published(place / "lock.yaml"), relation, reference, tested)
    except PublishError:
        pass  # a run of this machine
    try:
        recipe, lock = RunFolder(place).open()
        result = json.loads(RunFolder(place).result.read_text(encoding="utf-8"))
        names = Names(lock.models)
        older = known_before(lock, ancestors(recipe, lock, place, depth + 1) if depth < MAX_DEPTH else ())
        return Ancestor.model_validate(
            {
                "relation": relation,
                "reference": reference,
                "name": recipe.name,
                "verdict": result["verdict"],
                "weights_sha256": result["weights_sha256"],
                "parents": tuple(names.reference(model, pinned=True) for model in lock.models),
                "openings": tuple(
                    dict.fromkeys([*openings(place, recipe.name), *lock.inherited, *inherited(older)])
                ),
                "shared": _shared(tested, lock),
                "lineage": older,
            }
        )
    except (RunError, OSError, ValueError, KeyError):
        return _unknown(relation, reference)


def openings(run: Path, name: str) -> tuple[Opening, ...]:
    """Every opening of the test items that a run's journal holds."""
    journal = Journal(RunFolder(run).journal)
    try:
        return tuple(
            Opening(run=name, winner=str(event["winner"]), generations=int(event["generations"]))
            for event in journal.events("test opened")
        )
    finally:
        journal.close()


def inherited(ancestors: Sequence[Ancestor]) -> Iterator[Opening]:
    """Openings of all ancestors, each once; without those of an ancestor that shares no test item."""
    seen: set[Opening] = set()
    for ancestor in ancestors:
        own = () if ancestor.shared == 0 else ancestor.openings
        # whether older ones share items is not known: what their locks say of it is about their own descendants
        older = (one.model_copy(update={"shared": None}) for one in ancestor.lineage)
        for opening in (*own, *inherited(tuple(older))):
            if opening not in seen:
                seen.add(opening)
                yield opening


def drawn(ancestors: Sequence[Ancestor], depth: int = 0) -> list[str]:
    """The lineage as an indented list of Markdown."""
    lines = []
    for one in ancestors:
        verdict = f", verdict: {one.verdict}" if one.verdict else ""
        opened = f", test items opened {len(one.openings)} times" if len(one.openings) > 1 else ""
        other = ", tested on other items" if one.shared == 0 else ""
        other += ", could not be asked for its own lineage" if one.unknown else ""
        lines.append(
            f"{'  ' * depth}- {one.relation}: `{one.reference}` ({one.name}{verdict}{opened}{other})"
        )
        lines += drawn(one.lineage, depth + 1)
        of_our_own = {a.reference for a in one.lineage}
        lines += [
            f"{'  ' * (depth + 1)}- parent: `{p}`"
            for p in one.parents
            if p.removeprefix("merge:") not in of_our_own
        ]
    return lines
