"""`shoal download`: a published merge as a model folder, every hash checked before the folder is there.

What the repository holds as weights is compared with its lock; a recipe without weights is made from its parents.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from shoal.endpoint import Say
from shoal.errors import PublishError, RecipeError
from shoal.hub import weights
from shoal.hub.fetch import DEFAULT_LIMITS, Limits
from shoal.hub.opened import Opened
from shoal.hub.rebuild import parents_here, versions_hint
from shoal.hub.repository import DATA, fetched, split_revision
from shoal.merge.writer import TOKENIZER_FILES

# what a publication consists of, and nothing that a library would load on its own beside it (an adapter, say)
DOCUMENTS = (
    "README.md",
    "mergekit_config.yml",
    "LICENSE*",
    "NOTICE*",
    "*.png",
    "journal/*.parquet",
    "items.parquet",
)
MODEL = (
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
)
# copied from a parent byte by byte, so the lock knows their hashes; the others may be set or scrubbed on the way
_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class Downloaded:
    """folder: a model folder. commit: that was downloaded. rebuilt: the weights were made here, from the parents."""

    folder: Path
    repo: str
    commit: str
    rebuilt: bool
    weights_sha256: str


def download(
    repo: str,
    out: str | Path | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
    say: Say = lambda text: None,
) -> Downloaded:
    """Fetch a published merge (`org/name`, or `org/name@revision`) as a model folder with its publication beside it.

    out: must not exist, or be empty; default: the repository's name in the working directory.

    Raises:
        PublishError: it cannot be fetched, is no publication of shoal, or anything in it has another hash than it says;
            then `out` is not there.
        CheckpointError: a parent cannot be fetched or read, or the disk is full.
    """
    repo, revision = split_revision(repo)
    target = Path(repo.rpartition("/")[2]) if out is None else Path(out)
    check_new(target)
    with fetched(repo, revision, target, (*DATA, *DOCUMENTS, *MODEL), limits, say) as (opened, commit):
        lock = opened.lock
        if lock.weights_published:
            say("checking the weights")
            check_weights(opened)
        else:
            _materialise(opened, say)
        check_new(target)
        if target.exists():
            target.rmdir()
        opened.folder.rename(target)
    return Downloaded(target, repo, commit, not lock.weights_published, lock.winner.weights_sha256)


def check_new(target: Path) -> None:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise PublishError(f"{target}: exists; choose a folder that does not, by -o")


def check_weights(opened: Opened) -> None:
    """That the weights and the tokenizer of a folder are those of its lock.

    Raises:
        PublishError: they are not. CheckpointError: no safetensors that can be read.
    """
    folder, lock = opened.folder, opened.lock
    found = weights.sha256(folder)
    if found != lock.winner.weights_sha256:
        raise PublishError(
            f"{opened.where}: its weights have the hash {found[:12]}, lock.yaml says {lock.winner.weights_sha256[:12]};"
            " do not use them"
        )
    source = lock.run.models[lock.run.tokenizer].files
    for name in _COPIED:
        path = folder / name
        here = _sha256(path) if path.is_file() else None
        if here != source.get(name):
            raise PublishError(
                f"{opened.where}: {name} is not that of {lock.run.models[lock.run.tokenizer].name}, which lock.yaml names"
            )


def _materialise(opened: Opened, say: Say) -> None:
    """Write the weights into the publication's folder, and check that they are those that the lock names."""
    lock = parents_here(opened, None, say)
    for path in opened.folder.iterdir():
        if any(
            path.match(pattern) for pattern in MODEL
        ):  # a recipe has none; they are not the publisher's to give
            path.unlink()
    say("merging and writing the weights")
    try:
        weights.write(opened.folder, lock, opened.recipe, opened.lock.winner.merge_plan())
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise PublishError(f"{opened.where}: winner.plan cannot be merged: {error!r}") from None
    except RecipeError as error:
        raise PublishError(f"{opened.where}: {error}") from None
    say("checking the weights")
    found = weights.sha256(opened.folder)
    if found != opened.lock.winner.weights_sha256:
        raise PublishError(
            f"{opened.where}: the merge has the hash {found[:12]}, lock.yaml says {opened.lock.winner.weights_sha256[:12]};"
            f" nothing was kept{versions_hint(lock)}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
