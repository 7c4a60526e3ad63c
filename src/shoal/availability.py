"""What the Hub says of a recipe's models before anything of them is fetched: metadata only.

Access, a form that can be read, bytes to fetch and room for them are told for all models, in seconds; what is inside
the files is for `preflight`.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.endpoint import Say, client_errors, offline, open_api, page, reason, retried, speaking
from shoal.errors import CheckpointError
from shoal.types import HubModel, ModelRef, parts_of

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHTS = ("*.safetensors",)
# weights of other forms, to name what was found instead
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt")


@dataclass(frozen=True)
class Availability:
    """A repository of the Hub that a recipe names.

    ref: as the recipe writes it. commit: its SHA. weights: bytes of safetensors. missing: bytes that are not in the
    cache. note: why only the cache was asked, empty where the Hub answered.
    """

    ref: HubModel
    commit: str
    weights: int
    missing: int
    gated: bool = False
    private: bool = False
    note: str = ""

    def words(self) -> str:
        if self.note:
            return f"{self.ref}: {self.note}; in the cache at commit {self.commit[:12]}"
        access = "gated (you have access), " if self.gated else "private, " if self.private else ""
        where = f"{size_words(self.missing)} to fetch" if self.missing else "all in the cache"
        return f"{self.ref}: commit {self.commit[:12]}, {access}{size_words(self.weights)} of safetensors, {where}"


def look_up(refs: Sequence[ModelRef], say: Say) -> tuple[Availability, ...]:
    """Every Hub repository among `refs` (a LoRA's base and adapter are two), each once, in order.

    A model that is completely in the cache is available whatever the Hub says.

    Raises:
        CheckpointError: a repository is missing, gated or private without access, has no safetensors, or what is to be
            fetched does not fit on the cache's disk.
    """
    wanted = list(dict.fromkeys(_hub_models(refs)))
    if not wanted:
        return ()
    say(f"asking the Hub for {len(wanted)} model{'s' if len(wanted) > 1 else ''}")
    with speaking(say):
        api = open_api()
        found = tuple(_ask(api, ref, say) for ref in wanted)
    missing, free, place = missing_bytes(found), free_bytes(), cache_place()
    if missing > free:
        raise CheckpointError(
            f"models: {size_words(missing)} are to be fetched into {place}, but only {size_words(free)} are free there;"
            " make room, or set HF_HOME to a folder on another disk"
        )
    return found


def rows(found: Sequence[Availability]) -> list[tuple[str, str]]:
    """(topic, sentence) rows for `shoal validate`."""
    told = [("Hub" if index == 0 else "", one.words()) for index, one in enumerate(found)]
    missing = missing_bytes(found)
    if missing:
        told.append(
            (
                "download",
                f"{size_words(missing)} into {cache_place()}, where {size_words(free_bytes())} are free",
            )
        )
    return told


def missing_bytes(found: Sequence[Availability]) -> int:
    """To fetch for all of them; a commit that is named twice is fetched once."""
    return sum({(one.ref.repo, one.commit): one.missing for one in found}.values())


def cache_place() -> Path:
    """The cache of huggingface_hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def free_bytes() -> int:
    """On the disk of the cache, which may not exist yet."""
    place = cache_place().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def size_words(size: int) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def _hub_models(refs: Iterable[ModelRef]) -> Iterable[HubModel]:
    """Without merges of ours: what they need is their roots."""
    for ref in refs:
        yield from (one for one in parts_of(ref) if isinstance(one, HubModel))


def _ask(api: Any, ref: HubModel, say: Say) -> Availability:
    if offline():
        return _cached(ref, "HF_HUB_OFFLINE is set")
    try:
        info = retried(lambda: api.model_info(ref.repo, revision=ref.revision, files_metadata=True), say)
        if info.gated:
            retried(lambda: api.auth_check(ref.repo), say)
    except client_errors() as error:
        return _cached(ref, reason(error, ref.repo))
    return _described(ref, info)


def _described(ref: HubModel, info: Any) -> Availability:
    files = {sibling.rfilename: int(sibling.size or 0) for sibling in info.siblings or []}
    weights = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    if not weights:
        others = sorted(name for name in files if name.endswith(OTHER_WEIGHTS))
        instead = f"found {', '.join(others[:3])}" if others else "found no weights at all"
        raise CheckpointError(
            f"model {ref}: expected safetensors, {instead}; only safetensors are read: look for a revision that has"
            f" them at {page(ref.repo)}, or convert it and name the folder"
        )
    # as the client understands patterns: folders' files are meant, too
    needed = [name for name in files if any(fnmatch.fnmatch(name, p) for p in (*SMALL_FILES, *WEIGHTS))]
    return Availability(
        ref=ref,
        commit=str(info.sha),
        weights=sum(files[name] for name in needed if name.endswith(".safetensors")),
        missing=sum(files[name] for name in needed if not _is_cached(ref.repo, name, str(info.sha))),
        gated=bool(info.gated),
        private=bool(info.private),
    )


def _is_cached(repo: str, name: str, commit: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, name, revision=commit), str)


def _cached(ref: HubModel, why: str) -> Availability:
    """The model as the cache has it, where that is complete."""
    from huggingface_hub import snapshot_download

    try:
        place = Path(
            snapshot_download(
                ref.repo,
                revision=ref.revision,
                allow_patterns=[*SMALL_FILES, *WEIGHTS],
                local_files_only=True,
            )
        )
        sizes = [path.stat().st_size for path in place.glob("*.safetensors")]
        if not sizes:
            raise FileNotFoundError
    except (OSError, ValueError):
        raise CheckpointError(f"model {ref}: {why}{_local_hint(why)}") from None
    return Availability(ref, place.name, sum(sizes), 0, note=why)


def _local_hint(why: str) -> str:
    if why.startswith("no such repository"):
        return "; a local folder starts with './', '../', '/' or '~/'"
    no_answer = ("HF_HUB_OFFLINE", "the connection", "the Hub has", "the Hub asks")
    return ", and the cache does not have it" if why.startswith(no_answer) else ""
