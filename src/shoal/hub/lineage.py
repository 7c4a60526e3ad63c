"""Where a merge comes from: parents that are merges of ours, and the run that its search started from.

Their openings of the test items are inherited: an item that an ancestor was tested on is not new to its descendants.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shoal.errors import PublishError, RunError
from shoal.folder import RunFolder
from shoal.hub.parents import Documents, Parent
from shoal.hub.portable import Names
from shoal.hub.published import FORMAT, Ancestor, Opening, PublishedLock, load_published, parse_published
from shoal.journal import Journal
from shoal.recipe import Recipe

PUBLISHED = "published.yaml"  # the published lock in a folder that a search was started from


def lineage(
    recipe: Recipe, run: Path, parents: Sequence[Parent], documents: Mapping[Parent, Documents]
) -> tuple[Ancestor, ...]:
    """Ancestors of a run. A parent counts where its repository holds a published lock that can be read."""
    found = []
    for parent in parents:
        text = documents[parent].lock
        if text is None or FORMAT not in text[:400]:
            continue
        try:
            lock = parse_published(text, f"lock.yaml of {parent.reference}")
        except PublishError:
            continue
        found.append(_of_published(lock, "parent", parent.pinned))
    if recipe.search.warm_start is not None:
        found.append(_of_start(recipe.search.warm_start, run))
    return tuple(found)


def _of_published(lock: PublishedLock, relation: str, reference: str) -> Ancestor:
    return Ancestor.model_validate(
        {
            "relation": relation,
            "reference": reference,
            "name": lock.name,
            "verdict": lock.verdict,
            "weights_sha256": lock.winner.weights_sha256,
            "parents": tuple(model.ref for model in lock.run.models),
            "openings": lock.openings,
            "lineage": lock.lineage,
        }
    )


def _of_start(source: str, run: Path) -> Ancestor:
    """The start of a search: a finished run or a published recipe where it can be found, else only its name."""
    written = Path(source).expanduser()
    name = written.name or "start"
    for place in (written, Path.cwd() / written, run.parent / written):
        if (place / PUBLISHED).is_file():  # ORG/NAME@COMMIT in the cache
            reference = f"{place.parent.name}/{place.name}"
            return _of_published(load_published(place / PUBLISHED), "warm start", reference)
        if (place / "lock.yaml").is_file():
            return _of_folder(place, name)
    return Ancestor(relation="warm start", reference=name, name=name)


def _of_folder(place: Path, name: str) -> Ancestor:
    try:
        return _of_published(load_published(place / "lock.yaml"), "warm start", name)
    except PublishError:
        pass  # a run of this machine
    try:
        recipe, lock = RunFolder(place).open()
        result = json.loads(RunFolder(place).result.read_text(encoding="utf-8"))
        names = Names(lock.models)
        return Ancestor(
            relation="warm start",
            reference=name,
            name=recipe.name,
            verdict=result["verdict"],
            weights_sha256=result["weights_sha256"],
            parents=tuple(names.reference(model, pinned=True) for model in lock.models),
            openings=openings(place, recipe.name),
        )
    except (RunError, OSError, ValueError, KeyError):
        return Ancestor(relation="warm start", reference=name, name=name)


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
    """Openings of all ancestors, each once."""
    seen: set[Opening] = set()
    for ancestor in ancestors:
        for opening in (*ancestor.openings, *inherited(ancestor.lineage)):
            if opening not in seen:
                seen.add(opening)
                yield opening


def drawn(ancestors: Sequence[Ancestor], depth: int = 0) -> list[str]:
    """The lineage as an indented list of Markdown."""
    lines = []
    for one in ancestors:
        verdict = f", verdict: {one.verdict}" if one.verdict else ""
        opened = f", test items opened {len(one.openings)} times" if len(one.openings) > 1 else ""
        lines.append(f"{'  ' * depth}- {one.relation}: `{one.reference}` ({one.name}{verdict}{opened})")
        lines += drawn(one.lineage, depth + 1)
        of_our_own = {a.reference for a in one.lineage}
        lines += [f"{'  ' * (depth + 1)}- parent: `{p}`" for p in one.parents if p not in of_our_own]
    return lines
