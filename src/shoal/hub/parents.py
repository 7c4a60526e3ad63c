"""The parents of a merge as others see them: how they are named on the Hub, what their cards say, what they came from.

A LoRA parent counts as two (the adapter and its base), and so does the base of task vectors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shoal import zoo
from shoal.endpoint import without_bars
from shoal.errors import PublishError
from shoal.hub.licences import Licence, ParentLicence, lookup, recognise
from shoal.hub.safe_yaml import read_yaml
from shoal.lock import ModelLock
from shoal.recipe import parse_model
from shoal.types import AdapterModel, HubModel, LocalModel, ZooModel

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
    folder of this machine, its name. commit: on the Hub. zoo: the zoo's name, of a zoo's model."""

    reference: str
    kind: Literal["hub", "local", "zoo"]
    commit: str | None
    folder: Path
    adapter: bool = False
    zoo: str = ""

    @property
    def pinned(self) -> str:
        return f"{self.reference}@{self.commit}" if self.commit else self.reference


@dataclass(frozen=True)
class Documents:
    """What a parent says of itself. metadata: front matter of its card; legal: name -> text; lock: a published one's."""

    metadata: dict[str, Any]
    legal: tuple[tuple[str, str], ...]
    lock: str | None
    where: str


def parents_of(models: Sequence[ModelLock]) -> tuple[Parent, ...]:
    """Every model and adapter once, in the lock's order."""
    found: dict[tuple[str, Path], Parent] = {}
    for model in models:
        ref = parse_model(model.ref, Path("/"))
        base = ref.base if isinstance(ref, AdapterModel) else ref
        parts = [_parent(base, model.commit, Path(model.folder), model.origin, adapter=False)]
        if isinstance(ref, AdapterModel):
            assert model.adapter is not None
            parts.append(_parent(ref.adapter, model.adapter_commit, Path(model.adapter), {}, adapter=True))
        for part in parts:
            found.setdefault((part.reference, part.folder), part)
    return tuple(found.values())


def _parent(
    ref: HubModel | LocalModel | ZooModel,
    commit: str | None,
    folder: Path,
    origin: dict[str, str],
    *,
    adapter: bool,
) -> Parent:
    if isinstance(ref, HubModel):
        return Parent(ref.repo, "hub", commit, folder, adapter)
    if isinstance(ref, LocalModel):
        return Parent(ref.path.name, "local", None, folder, adapter)
    if origin.get("repo") and origin.get("commit"):  # a zoo that is a copy of a repository
        return Parent(origin["repo"], "zoo", origin["commit"], folder, adapter, ref.zoo)
    return Parent(str(ref), "zoo", None, folder, adapter, ref.zoo)


def hub_ids(parents: Sequence[Parent]) -> list[str]:
    """What may stand under base_model: repositories of the Hub, a zoo's source among them."""
    return list(
        dict.fromkeys(p.reference for p in parents if p.kind == "hub" or (p.kind == "zoo" and p.commit))
    )


def documents(parent: Parent) -> Documents:
    """Card, licence files and published lock of a parent; of a Hub parent at its commit, from the cache when offline."""
    folder, where = parent.folder, f"{CARD} of {parent.reference}"
    if parent.kind == "hub":
        folder = _fetched(parent) or folder
    text = _read(folder / CARD, _MAX_CARD)
    lock = folder / LOCK
    return Documents(
        metadata=front_matter(text, where) if text else {},
        legal=tuple(_legal_files(folder)),
        lock=_read(lock, 64 << 20) if parent.kind == "hub" else None,
        where=where if text else f"{parent.reference} (no {CARD}, no licence file)",
    )


def _fetched(parent: Parent) -> Path | None:
    """The snapshot with the repository's documents; None where it cannot be had."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        with without_bars():
            path = huggingface_hub.snapshot_download(
                parent.reference, revision=parent.commit, allow_patterns=list(_DOCUMENTS)
            )
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError):
        return None
    return Path(path)


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
