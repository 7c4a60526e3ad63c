"""A built publication, and what is told of it before anybody says yes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shoal.hub.licences import Terms
from shoal.hub.published import PublishedLock


@dataclass(frozen=True)
class PublishedFile:
    """path: in the repository. size: bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Publication:
    """What would be published. left_out: what is not, and why, in sentences. terms: licence of the merge.

    notes: what the publisher should know before saying yes.
    """

    folder: Path
    repo: str
    weights: bool
    files: tuple[PublishedFile, ...]
    lock: PublishedLock
    terms: Terms
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def describe(found: Publication) -> str:
    """Exactly what would be published: every file with its size, the licence, and what stays here."""
    kind = "with weights" if found.weights else "recipe only, no weights"
    name = found.terms.license.get("license_name", found.terms.license["license"])
    width = max(len(file.path) for file in found.files)
    lines = [f"{found.repo} ({kind}), {len(found.files)} files, {_size(found.size)}:"]
    lines += [f"  {file.path:<{width}}  {_size(file.size):>9}" for file in found.files]
    lines.append(f"licence: {name}" + (f" ({found.terms.quoted})" if found.terms.quoted else ""))
    if found.notes:
        lines += ["note:", *(f"  {note}" for note in found.notes)]
    lines += ["not published:", *(f"  {reason}" for reason in (*found.left_out, *_NEVER))]
    return "\n".join(lines)


_NEVER = (
    "paths, host and user names, tokens and tracebacks: taken out everywhere, and looked for in every file",
    "journal.sqlite, tokenised requests and what the models wrote to items",
)


def _size(size: float) -> str:
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} GB"
