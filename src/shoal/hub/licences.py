"""Under which licence a merge may be published: a table of facts (licences.yaml), and a rule over all parents.

It reads the table as it stands, and no licence: no legal advice. What it does not know, it refuses, unless the
publisher says which licence it is; then the card quotes that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

from shoal.errors import PublishError

ADVICE = "A rule over a table of licences made this, not a lawyer: no legal advice."
OWN_TEXT = "LICENSE.md"  # in a published folder: what holds where no single licence does


@dataclass(frozen=True)
class Licence:
    """One licence of the table; see the head of licences.yaml for what each field says."""

    id: str
    name: str
    link: str
    source: str = ""
    checked: str = ""
    hub: bool = False
    derivatives: bool = True
    share_alike: bool = False
    passes_on: bool = False
    non_commercial: bool = False
    copy: bool = True
    prefix: str = ""
    statement: str = ""
    notice: str = ""
    remark: str = ""
    compatible: tuple[str, ...] = ()
    incompatible: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def may_become(self, other: str) -> bool:
        """Whether a derivative of what is under this licence may be given under `other` alone."""
        if other == self.id or other in self.compatible:
            return True
        return not (self.share_alike or self.passes_on) and other not in self.incompatible


@dataclass(frozen=True)
class ParentLicence:
    """A parent, and what is known of its licence. where: the place that says so.

    stated: as written there; licence: the table's entry, None where none is known. link: of a licence that is not the
    Hub's. files: licence and notice files of the parent, name -> text.
    """

    parent: str
    stated: str
    where: str
    licence: Licence | None
    link: str = ""
    files: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Terms:
    """What holds for the merge. license: metadata of the card (`license`, and `license_name`, `license_link`).

    quoted: what the publisher stated by --license, with the parents that it was stated for; empty without.
    """

    license: Mapping[str, str]
    parents: tuple[ParentLicence, ...]
    statements: tuple[str, ...]
    notices: tuple[str, ...]
    prefixes: tuple[str, ...]
    remarks: tuple[str, ...]
    non_commercial: bool
    quoted: str = ""


@lru_cache(maxsize=1)
def table() -> Mapping[str, Licence]:
    """Every known licence by id, in the table's order."""
    text = (files("shoal.hub") / "licences.yaml").read_text(encoding="utf-8")
    return {key: _entry(key, fields) for key, fields in yaml.safe_load(text).items()}


def _entry(key: str, fields: Mapping[str, Any]) -> Licence:
    lists = ("compatible", "incompatible", "marks", "aliases")
    values: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in fields.items()}
    return Licence(id=key, **values)


def lookup(text: str) -> Licence | None:
    """The licence of an id, a license_name or another spelling of it; None where the table has none."""
    wanted = text.strip().lower()
    for licence in table().values():
        if wanted in (licence.id, licence.name.lower(), *licence.aliases):
            return licence
    return None


def recognise(text: str) -> Licence | None:
    """The licence whose marks all stand in a licence file; the one with the longest where several do."""
    flat = " ".join(text.split())
    found = [x for x in table().values() if x.marks and all(" ".join(m.split()) in flat for m in x.marks)]
    return max(found, key=lambda x: max(map(len, x.marks)), default=None)


def terms(parents: Sequence[ParentLicence], repo: str, stated: str | None = None) -> Terms:
    """The terms of a merge of these parents, published as `repo`.

    stated: the publisher's --license, for parents whose licence is unknown or missing.

    Raises:
        PublishError: a licence that is unknown and not stated, forbids derivatives, or contradicts another's; or a repo
            whose name does not begin as a licence asks.
    """
    known, quoted = _known(parents, stated)
    entries = list(dict.fromkeys(p.licence for p in known if p.licence is not None))
    for parent in known:
        if parent.licence is not None and not parent.licence.derivatives:
            raise PublishError(
                f"licence of {parent.parent}: {parent.licence.name} allows no derivatives to be given to others"
                f" ({parent.licence.source}), and a merge is one; take another parent"
            )
    license_ = _combined(entries, known)
    if stated is not None and not quoted:
        license_ = _chosen(stated, entries, license_)
    found = Terms(
        license=license_,
        parents=tuple(known),
        statements=_each(e.statement for e in entries),
        notices=_each(e.notice for e in entries),
        prefixes=_each(e.prefix for e in entries),
        remarks=_each(f"{e.name}: {e.remark}" for e in entries if e.remark),
        non_commercial=any(e.non_commercial for e in entries),
        quoted=quoted,
    )
    check_name(repo, found.prefixes)
    return found


def check_name(repo: str, prefixes: Sequence[str]) -> None:
    """Raises PublishError where a repo's name does not begin with each prefix; case and punctuation do not count."""
    name = repo.rpartition("/")[2]
    for prefix in prefixes:
        if not _letters(name).startswith(_letters(prefix)):
            wanted = re.sub(r"\s+", "-", max(prefixes, key=len))
            raise PublishError(
                f"repo {repo}: a parent's licence asks that the model's name begins with {prefix!r}, found {name!r};"
                f" name it e.g. {repo[: -len(name)]}{wanted}-{name}"
            )


def _known(parents: Sequence[ParentLicence], stated: str | None) -> tuple[list[ParentLicence], str]:
    """Parents with the stated licence where none is known, and the words that quote it."""
    missing = [p for p in parents if p.licence is None]
    if not missing:
        return list(parents), ""
    if stated is None:
        first = missing[0]
        what = f"states {first.stated!r}, which shoal does not know" if first.stated else "states none"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise PublishError(
            f"licence of {first.parent}{more}: {first.where} {what}; look it up, and say by --license which one it is"
            f" (the card will quote you; known: {', '.join(table())})"
        )
    licence = lookup(stated) or _foreign(stated)
    names = ", ".join(dict.fromkeys(p.parent for p in missing))
    quoted = f'stated by the publisher for {names}: "{stated}"'
    return [replace(p, licence=licence) if p.licence is None else p for p in parents], quoted


def _foreign(stated: str) -> Licence:
    """A licence that is not in the table, taken on the publisher's word: its terms stay on the merge."""
    slug = re.sub(r"[^a-z0-9.]+", "-", stated.lower()).strip("-") or "stated-by-publisher"
    return Licence(id=slug, name=stated, link=OWN_TEXT, source="the publisher", passes_on=True)


def _combined(entries: Sequence[Licence], parents: Sequence[ParentLicence]) -> dict[str, str]:
    """The one licence that all others may become (the last of them in the table), else all together."""
    order = list(table())
    ranked = sorted(entries, key=lambda e: order.index(e.id) if e.id in order else len(order), reverse=True)
    for candidate in ranked:
        if all(other.may_become(candidate.id) for other in entries):
            return _metadata(candidate, parents)
    alike = [e for e in entries if e.share_alike]
    if alike:
        other = next(e for e in entries if not e.may_become(alike[0].id))
        raise PublishError(
            f"licences of the parents contradict each other: a derivative of {alike[0].name} must be under that licence"
            f" ({alike[0].source}), which {other.name} does not allow ({other.source}); leave one of them out"
        )
    binding = sorted(e.id for e in entries if e.passes_on)
    return {"license": "other", "license_name": "-and-".join(binding), "license_link": OWN_TEXT}


def _metadata(licence: Licence, parents: Sequence[ParentLicence]) -> dict[str, str]:
    if licence.hub:
        return {"license": licence.id}
    links = [p.link for p in parents if p.licence == licence and p.link.startswith("https://")]
    return {"license": "other", "license_name": licence.id, "license_link": (links or [licence.link])[0]}


def _chosen(stated: str, entries: Sequence[Licence], by_rule: Mapping[str, str]) -> dict[str, str]:
    """A licence that the publisher prefers, where every parent's allows it.

    It is a parent's, or the parents ask for none: some copyleft licences give way only to another part's (GPL to AGPL).
    """
    licence = lookup(stated)
    free = licence in entries or not any(e.share_alike or e.passes_on for e in entries)
    if licence is None or not free or not all(e.may_become(licence.id) for e in entries):
        name = by_rule.get("license_name", by_rule["license"])
        raise PublishError(
            f"--license {stated}: the licences of the parents are known ({', '.join(e.id for e in entries)}) and give"
            f" {name}; leave --license out"
        )
    return _metadata(licence, ())


def _each(texts: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text))


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
