"""A finished run as the folder that is published: complete, without anything private, checked before it is handed over.

Nothing is sent from here (see `shoal.hub.upload`): what lies in the folder is exactly what others will see.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import EvaluationError, PublishError, RecipeError
from shoal.folder import RunFolder
from shoal.hub import items, portable, structured, tables, weights
from shoal.hub.card import CardContent, card
from shoal.hub.described import Publication, PublishedFile, describe
from shoal.hub.legal import write_legal
from shoal.hub.licences import terms
from shoal.hub.lineage import inherited, known_before, lineage, openings
from shoal.hub.parents import Documents, Parent, documents, languages, licences_of, parents_of
from shoal.hub.privacy import Scrubber, Secrets, leaks
from shoal.hub.published import Ancestor, Device, PublishedLock, Winner, json_schema
from shoal.hub.tolerance import tolerance
from shoal.journal import Journal
from shoal.lock import Lock
from shoal.models import rebuilt_here
from shoal.output import read_plan
from shoal.preflight import open_catalogue
from shoal.recipe import Recipe
from shoal.report import PLOTS, load_result, write_plots
from shoal.sanity import Written, read_written
from shoal.types import MergePlan

__all__ = ["Publication", "PublishedFile", "build", "describe"]

Say = Callable[[str], None]
_REPO = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*[\w]|[A-Za-z0-9][\w-]*/[A-Za-z0-9]", re.ASCII)
_WORDS = (
    "shoal mergekit merge model card licence license points interval baseline verdict candidates winner parents",
)


@dataclass
class _Work:
    """What the parts of a build share. left_out, notes: filled on the way."""

    run: Path
    repo: str
    recipe: Recipe
    lock: Lock
    result: dict[str, Any]
    plan: MergePlan
    secrets: Secrets
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def scrubber(self) -> Scrubber:
        return Scrubber(self.secrets)


def build(
    run: str | Path,
    repo: str,
    *,
    weights: bool = False,
    include_item_text: bool = False,
    license: str | None = None,
    out: str | Path,
    say: Say = lambda text: None,
) -> Publication:
    """Write the folder that `repo` would show to `out`, whole or not at all; nothing is sent anywhere.

    weights: the merged model as well; without them others rebuild it from its parents. include_item_text: rendered
    requests of custom tasks, for those who cannot render them; never of gated data sets. license: of parents for which
    none is found. Parents' cards are read from the Hub, or from the cache when offline.

    Raises:
        PublishError: a licence that does not allow it, parents that others cannot have, private content that is left.
        RunError: no finished run. CheckpointError: `out` is not empty, the disk is full, a parent's files have changed.
    """
    from shoal.merge.writer import new_folder

    run, out = Path(run), Path(out)
    work = _opened(run, repo, out)
    if not weights:
        portable.check_recipe_only(work.lock)
    parents = parents_of(work.lock.models)
    said = {parent: documents(parent) for parent in parents}
    found_terms = terms(licences_of(parents, said), repo, license)
    say("rendering the requests of the tasks")
    found_items = items.rendered(work.recipe, work.lock)
    with new_folder(out) as folder:
        if weights:
            say("merging and writing the weights")
            _weights(folder, work)
        recipe, changed = portable.recipe_here(work.recipe, work.lock, work.scrubber)
        work.left_out += changed
        ancestors = _ancestors(work, parents, said)
        found_items, written_items = _items(folder, work, found_items, include_item_text)
        lock = _published(work, recipe, found_items, ancestors, weights)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (folder / "lock.yaml").write_text(lock.to_yaml(), encoding="utf-8")
        config = portable.mergekit_here(work.lock, work.recipe, work.plan)
        (folder / "mergekit_config.yml").write_text(config, encoding="utf-8")
        _json(folder / "result.json", work.scrubber.known_data(work.result))
        say("writing journal, plots and card")
        hidden = tables.write_tables(RunFolder(run).journal, folder, work.lock, work.scrubber)
        work.left_out += [f"journal: events of kind {kind!r} are not published" for kind in hidden]
        plots = _plots(run, folder)
        _report(run, folder, work)
        write_legal(folder, found_terms)
        _structured(folder, work, lock)
        content = CardContent(
            repo=repo,
            weights=weights,
            recipe=recipe,
            lock=lock,
            result=work.scrubber.known_data(work.result),
            parents=parents,
            terms=found_terms,
            languages=languages([said[p] for p in parents]),
            plots=plots,
            written=_written(run, work.scrubber),
            mergekit_head=_head(config),
            met=tables.items_met(RunFolder(run).journal),
            left_out=work.left_out,
            included=[p.name for p in folder.iterdir()],
        )
        (folder / "README.md").write_text(card(content), encoding="utf-8")
        _check(folder, work, found_items.texts(written_items))
        files = tuple(
            PublishedFile(p.relative_to(folder).as_posix(), p.stat().st_size, _sha256(p))
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        )
    return Publication(
        folder=out,
        repo=repo,
        weights=weights,
        files=files,
        lock=lock,
        terms=found_terms,
        left_out=tuple(dict.fromkeys(work.left_out)),
        notes=tuple(dict.fromkeys([*_notes(work, parents), *work.notes])),
    )


def _opened(run: Path, repo: str, out: Path) -> _Work:
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo or len(repo) > 96:
        raise PublishError(
            f"{repo!r}: expected a repository as user/name or organization/name, of letters, digits, '-', '_' and '.'"
        )
    result = load_result(run)
    folder = RunFolder(run)
    recipe, lock = folder.open()
    lock = rebuilt_here(lock)
    unclear = [m.name for m in lock.models if m.name.removeprefix("merge:").startswith(("/", "~"))]
    if unclear:
        raise PublishError(
            f"parents are folders of one name ({', '.join(sorted({Path(n).name for n in unclear}))}), so the run calls them"
            " by their paths, in every table; give the folders different names and run again"
        )
    keep = [repo, recipe.name, *(m.name for m in lock.models), *(t.task for t in lock.tasks)]
    keep += [portable.Names(lock.models).reference(m) for m in lock.models]
    # words that stand in every publication, so that nobody is betrayed by them who is called so
    keep += [json_schema(), *_WORDS, *lock.libraries]
    places = [run, run.absolute(), out.absolute().parent]
    places += [Path(f) for m in lock.models for f in (m.folder, m.adapter) if f]
    places += [p.folder for p in parents_of(lock.models) if p.kind == "local" and p.folder is not None]
    if lock.include_path is not None:
        places.append(Path(lock.include_path))
    secrets = Secrets.of_machine([p for p in places if p.is_absolute()], keep)
    return _Work(run, repo, recipe, lock, result, read_plan(folder.best), secrets)


def _weights(folder: Path, work: _Work) -> None:
    weights.write(folder, work.lock, work.recipe, work.plan)
    found = weights.sha256(folder)
    if found != work.result["weights_sha256"]:
        raise PublishError(
            f"the weights that were written have the hash {found[:12]}, the run's winner {work.result['weights_sha256'][:12]};"
            " nothing is published. Use the library versions that the run's lock names"
        )
    for name in weights.scrub_settings(folder, work.scrubber):
        work.left_out.append(f"{name}: paths of this machine were removed")


def _ancestors(
    work: _Work, parents: Sequence[Parent], said: Mapping[Parent, Documents]
) -> tuple[Ancestor, ...]:
    """The lineage; who could not be asked for it is told."""
    for parent in parents:
        if said[parent].unasked:
            work.notes.append(
                f"whether {parent.reference} descends from other merges is not known: {said[parent].unasked}"
            )
    locks = {parent: said[parent].lock for parent in parents if not said[parent].unasked}
    return known_before(work.lock, lineage(work.recipe, work.run, parents, locks, work.lock))


def _published(
    work: _Work, recipe: Recipe, found: items.Rendered, ancestors: Sequence[Ancestor], with_weights: bool
) -> PublishedLock:
    if found.planned is None:
        work.notes.append(
            f"requests could not be rendered here, so lock.yaml has no hashes of them: {found.why}"
        )
    words = work.result["devices"][-1] if work.result["devices"] else "unknown"
    dtype = str(work.recipe.evaluation.model_args.get("dtype", "auto"))
    own = openings(work.run, recipe.name)
    return PublishedLock(
        name=recipe.name,
        verdict=work.result["verdict"],
        weights_published=with_weights,
        device=Device(
            kind=words.partition(" ")[0].partition(":")[0],
            words=work.scrubber.text(words),
            dtype=work.lock.dtype if dtype == "auto" else dtype,
        ),
        tolerance=tolerance(work.run, work.lock, work.result["winner"]["id"], dtype),
        winner=Winner(
            id=work.result["winner"]["id"],
            plan=json.loads(work.plan.to_json()),
            plan_digest=work.plan.digest(),
            weights_sha256=work.result["weights_sha256"],
        ),
        openings=tuple(dict.fromkeys([*own, *work.lock.inherited, *inherited(ancestors)])),
        lineage=tuple(ancestors),
        tasks=found.tasks,
        run=portable.lock_here(work.lock, recipe),
    )


def _items(
    folder: Path, work: _Work, found: items.Rendered, wanted: bool
) -> tuple[items.Rendered, list[str]]:
    """The tasks, and the names of the custom ones whose items were written."""
    custom = [t.task for t in found.tasks if t.custom]
    if not wanted:
        if custom:
            work.left_out.append(
                f"prompts and targets of {', '.join(custom)} are not published (--include-item-text would)"
            )
        return found, []
    forbidden = items.private_data([t for t in found.tasks if t.custom])
    work.left_out += [f"{reason}; its items are not published" for reason in forbidden.values()]
    found, written = items.write_items(folder, work.lock, found, forbidden)
    if written:
        work.notes.append(f"items.parquet publishes prompts and targets of {', '.join(written)}")
    for task, why in written.items():
        if why:
            work.notes.append(
                f"{task}: others compare log-likelihoods, but its metric only with the task's own files: {why}"
            )
    return found, list(written)


def _plots(run: Path, folder: Path) -> list[str]:
    if not (run / PLOTS[0]).is_file():
        write_plots(run)
    found = [name for name in PLOTS if (run / name).is_file()]
    for name in found:
        shutil.copyfile(run / name, folder / name)
    return found


def _report(run: Path, folder: Path, work: _Work) -> None:
    """The report without texts of items, made from a journal without what is private."""
    from shoal.page import write_page

    path = folder / "report.html"
    with tempfile.TemporaryDirectory() as scratch:
        clean = Path(scratch) / "run"
        shutil.copytree(
            run,
            clean,
            ignore=shutil.ignore_patterns("model", "*.safetensors", "journal.*", ".*", "report.html"),
        )
        tables.clean_journal(RunFolder(run).journal, RunFolder(clean).journal, work.scrubber)
        write_page(clean, path, item_text=False)
    text = work.scrubber.page(path.read_text(encoding="utf-8"))
    # without the time: a repeated upload must send the same bytes, or it cannot find what arrived
    path.write_text(re.sub(r"(Written by shoal \S+) at [^<]{,40} UTC", r"\1", text), encoding="utf-8")


def _structured(folder: Path, work: _Work, lock: PublishedLock) -> None:
    catalogue = open_catalogue(None if work.lock.include_path is None else Path(work.lock.include_path))
    sizes = {}
    for task in work.lock.tasks:
        try:
            sizes[task.task] = len(catalogue.load(task.task).docs(task.eval_split))
        except (EvaluationError, RecipeError):
            continue
    files, without = structured.eval_results(
        work.recipe,
        work.lock,
        {task.task: task for task in lock.tasks},
        work.result["winner"]["tasks"],
        sizes,
        work.repo,
    )
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    work.left_out += [f"no structured result for {reason}" for reason in without]


def _written(run: Path, scrubber: Scrubber) -> Mapping[str, Written]:
    """What candidates wrote to the sanity guard's prompts; empty for a run that asked for none."""
    journal = Journal(RunFolder(run).journal)
    try:
        return read_written([_clean(event, scrubber) for event in journal.events("written")])
    finally:
        journal.close()


def _clean(event: Mapping[str, Any], scrubber: Scrubber) -> dict[str, Any]:
    return {**event, "texts": {key: scrubber.known(text) for key, text in event["texts"].items()}}


def _head(config: str) -> list[str]:
    lines = []
    for line in config.splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    return lines


def _check(folder: Path, work: _Work, texts: Sequence[str]) -> None:
    """Raises PublishError where anything private is left."""
    found = leaks(folder, work.secrets, texts)
    if found:
        named = "; ".join(f"{leak.file} holds {leak.what}" for leak in found[:4])
        raise PublishError(
            f"private content would be published: {named}; nothing was written. Please report this, with the kind of file"
        )


def _notes(work: _Work, parents: Sequence[Parent]) -> list[str]:
    notes = []
    if any(p.kind == "zoo" and not p.commit for p in parents):
        notes.append(
            "parents of the zoo are trained on each machine: others get the same bytes only with the same library versions"
            " on the same kind of machine"
        )
    if work.result["verdict"] != "beats":
        notes.append(f"the verdict is {work.result['verdict']!r}, and the card says so")
    return notes


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
