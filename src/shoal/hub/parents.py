"""The parents of a merge as others see them: how they are named on the Hub, what their cards say, what they came from.

A LoRA parent counts as two (the adapter and its base), and so does the base of task vectors; a merge of ours counts with
all of its roots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shoal import zoo
from shoal.endpoint import client_errors, reason, retried, without_bars
from shoal.errors import PublishError
from shoal.hub.kept import kept
from shoal.hub.licences import Licence, ParentLicence, lookup, recognise
from shoal.hub.safe_yaml import MAX_BYTES, read_yaml
from shoal.lock import ModelLock
from shoal.recipe import parse_model
from shoal.types import AdapterModel, HubModel, LocalModel, MergeModel, PlainModel, parts_of

CARD = "README.md"
LOCK = "lock.yaml"
_LEGAL = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_DOCUMENTS = (CARD, LOCK, *_LEGAL)
_MAX_CARD = 2 << 20
_MAX_LEGAL = 1 << 18
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Parent:
    """One model or adapter that went in. reference: what a reader can look up (`org/name`, `zoo:tiny/base`) or, for a
    folder of this machine, its name. commit: on the Hub. folder: None where it is not known. zoo: the zoo's name, of a
    zoo's model. merge: a merge of ours, rebuilt from its roots; folder is then that of its publication or run. root: it
    is a model of such a merge, at any depth, and none of the run's own."""

    reference: str
    kind: Literal["hub", "local", "zoo"]
    commit: str | None
    folder: Path | None
    adapter: bool = False
    zoo: str = ""
    merge: bool = False
    root: bool = False

    @property
    def pinned(self) -> str:
        return f"{self.reference}@{self.commit}" if self.commit else self.reference


@dataclass(frozen=True)
class Documents:
    """What a parent says of itself. metadata: front matter of its card; legal: name -> text; lock: a published one's.

    unasked: why the lock could not be asked for; empty where it is here or there is none.
    """

    metadata: dict[str, Any]
    legal: tuple[tuple[str, str], ...]
    lock: str | None
    where: str
    unasked: str = ""


def parents_of(models: Sequence[ModelLock]) -> tuple[Parent, ...]:
    """Every model and adapter once, in the lock's order, then the roots of merges of ours that are none of them."""
    found: dict[tuple[str, str], Parent] = {}
    for part in (*_parents(models, root=False), *_roots(models)):
        found.setdefault((part.reference, part.commit or str(part.folder)), part)
    return tuple(found.values())


def _parents(models: Sequence[ModelLock], *, root: bool) -> Iterator[Parent]:
    for model in models:
        ref = parse_model(model.ref, Path("/"))
        folder = Path(model.folder) if model.folder else None
        yield _parent(parts_of(ref)[0], model.commit, folder, model.origin, adapter=False, root=root)
        if isinstance(ref, AdapterModel):
            folder = Path(model.adapter) if model.adapter else None
            yield _parent(ref.adapter, model.adapter_commit, folder, {}, adapter=True, root=root)


def _roots(models: Sequence[ModelLock]) -> Iterator[Parent]:
    for model in models:
        if model.merge is not None:
            yield from _parents(model.merge.roots, root=True)
            yield from _roots(model.merge.roots)


def _parent(
    ref: PlainModel,
    commit: str | None,
    folder: Path | None,
    origin: dict[str, str],
    *,
    adapter: bool,
    root: bool,
) -> Parent:
    if isinstance(ref, MergeModel):
        if isinstance(ref.source, HubModel):
            return Parent(ref.source.repo, "hub", commit, None, merge=True, root=root)
        return Parent(ref.source.path.name, "local", None, ref.source.path, merge=True, root=root)
    if isinstance(ref, HubModel):
        return Parent(ref.repo, "hub", commit, folder, adapter, root=root)
    if isinstance(ref, LocalModel):
        return Parent(ref.path.name, "local", None, ref.path, adapter, root=root)
    if origin.get("repo") and origin.get("commit"):  # a zoo that is a copy of a repository
        return Parent(origin["repo"], "zoo", origin["commit"], folder, adapter, ref.zoo, root=root)
    return Parent(str(ref), "zoo", None, folder, adapter, ref.zoo, root=root)


def hub_ids(parents: Sequence[Parent]) -> list[str]:
    """What may stand under base_model: repositories of the Hub, a zoo's source among them; roots are their merge's."""
    named = [p for p in parents if p.kind == "hub" or (p.kind == "zoo" and p.commit)]
    return list(dict.fromkeys(p.reference for p in named if not p.root))


def documents(parent: Parent) -> Documents:
    """Card, licence files and published lock of a parent; of a Hub parent at its commit, from the cache when offline.

    Raises:
        PublishError: a merge of ours whose publication cannot be had: its lineage would be lost.
    """
    folder, where = parent.folder, f"{CARD} of {parent.reference}"
    if parent.merge and parent.kind == "hub":
        folder = _kept(parent)
    elif parent.kind == "hub":
        folder = _fetched(parent) or folder
    nothing = f"{parent.reference} (no {CARD}, no licence file)"
    lock, unasked = None, ""
    if parent.merge and folder is not None:
        lock = _read(folder / LOCK, MAX_BYTES)
    elif parent.kind == "hub" and not parent.root:
        try:
            lock = _asked(parent)
        except PublishError as error:
            unasked = str(error)
    if folder is None:
        return Documents({}, (), lock, nothing, unasked)
    text = _read(folder / CARD, _MAX_CARD)
    return Documents(
        metadata=front_matter(text, where) if text else {},
        legal=tuple(_legal_files(folder)),
        lock=lock,
        where=where if text else nothing,
        unasked=unasked,
    )


def _kept(parent: Parent) -> Path | None:
    """The publication of a merge of ours; one that is a root only is told of by the merge that it is a root of."""
    try:
        return kept(parent.reference, parent.commit)[0].folder
    except PublishError:
        if parent.root:
            return None
        raise


def published_lock(parent: Parent) -> str | None:
    """The published lock of a parent alone, None where it has none.

    Raises:
        PublishError: it could not be asked for, or is too large or no text.
    """
    if parent.merge or parent.kind != "hub":
        return documents(parent).lock if parent.merge else None
    return _asked(parent)


def _asked(parent: Parent) -> str | None:
    """A Hub parent's lock.yaml at its commit: from the cache, which also knows that there is none, or asked for."""
    import huggingface_hub
    from huggingface_hub import _CACHED_NO_EXIST, errors

    repo, commit = parent.reference, parent.commit
    known = huggingface_hub.try_to_load_from_cache(repo, LOCK, revision=commit)
    if known is _CACHED_NO_EXIST:
        return None
    try:
        with without_bars():
            found = retried(
                lambda: huggingface_hub.hf_hub_download(repo, LOCK, revision=commit),
                lambda text: None,
                attempts=2,
            )
    except errors.RemoteEntryNotFoundError:
        return None
    except client_errors() as error:
        raise PublishError(f"{LOCK} of {repo} could not be asked for: {reason(error, repo)}") from None
    text = _read(Path(found), MAX_BYTES)
    if text is None:
        raise PublishError(f"{LOCK} of {repo} is larger than {MAX_BYTES:,} bytes, or no text")
    return text


def _fetched(parent: Parent) -> Path | None:
    """The snapshot with the repository's documents; None where it cannot be had."""
    import huggingface_hub

    return _got(
        lambda: huggingface_hub.snapshot_download(
            parent.reference, revision=parent.commit, allow_patterns=list(_DOCUMENTS)
        )
    )


def _got(fetch: Callable[[], str]) -> Path | None:
    """What the client fetched or found in its cache, None where it could not."""
    from huggingface_hub import errors

    try:
        with without_bars():
            return Path(fetch())
    except (
        errors.HfHubHTTPError,
        errors.EntryNotFoundError,
        errors.OfflineModeIsEnabled,
        OSError,
    ):
        return None


def front_matter(text: str, where: str) -> dict[str, Any]:
    """The metadata of a model card; empty where it has none or none that can be read."""
    match = _FRONT.match(text.removeprefix("\ufeff"))
    if match is None:
        return {}
    try:
        data = read_yaml(match[1], where, _MAX_CARD)
    except PublishError:
        return {}
    return data if isinstance(data, dict) else {}


def licences_of(parents: Sequence[Parent], found: Mapping[Parent, Documents]) -> list[ParentLicence]:
    """Of all parents, roots among them.

    A merge of ours counts by what its card says; what shoal wrote there for several licences that hold together counts
    as those. A run of one's own says nothing, nor does a publication among the roots that is gone: their roots do.
    """
    licences: list[ParentLicence] = []
    for parent in parents:
        one = licence_of(parent, found[parent])
        if parent.merge and not one.stated and (parent.root or parent.kind == "local"):
            continue
        names = one.stated.split("-and-") if parent.merge and one.licence is None else []
        several = [lookup(name) for name in names]
        if len(several) > 1 and all(several):
            for name, known in zip(names, several, strict=True):
                files = one.files if name == names[0] else ()  # once
                licences.append(replace(one, stated=name, licence=known, files=files))
        else:
            licences.append(one)
    return licences


def licence_of(parent: Parent, found: Documents) -> ParentLicence:
    """What is known of a parent's licence: its card's metadata, else its licence file, else its zoo's."""
    if parent.kind == "zoo":
        name = zoo.licence(parent.zoo)
        return ParentLicence(parent.reference, name, "shoal's zoo", lookup(name))
    stated = _stated(found.metadata)
    if stated:
        link = found.metadata.get("license_link")
        return ParentLicence(
            parent.reference,
            stated,
            found.where,
            lookup(stated),
            link if isinstance(link, str) else "",
            found.legal,
        )
    for name, text in found.legal:
        licence: Licence | None = recognise(text)
        if licence is not None:
            return ParentLicence(
                parent.reference, licence.id, f"{name} of {parent.reference}", licence, "", found.legal
            )
    return ParentLicence(parent.reference, "", found.where, None, "", found.legal)


def _stated(metadata: dict[str, Any]) -> str:
    """`license`, or the name that `license: other` has; unknown counts as none."""
    value = metadata.get("license")
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else ", ".join(map(str, value))
    if value == "other":
        value = metadata.get("license_name") or "other"
    return str(value) if value not in (None, "", "unknown") else ""


def languages(found: Sequence[Documents]) -> list[str]:
    """Language codes that any parent's card names."""
    codes: list[str] = []
    for one in found:
        value = one.metadata.get("language")
        codes += [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return list(
        dict.fromkeys(c for c in map(str, codes) if re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code", c))
    )


def _legal_files(folder: Path) -> list[tuple[str, str]]:
    paths = sorted({path for pattern in _LEGAL for path in folder.glob(pattern) if path.is_file()})
    return [(path.name, text) for path in paths if (text := _read(path, _MAX_LEGAL)) is not None]


def _read(path: Path, limit: int) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > limit:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
