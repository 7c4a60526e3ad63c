"""Write a merged model: sharded safetensors, configuration, tokenizer; all of it or nothing.

Everything goes into a temporary folder beside the target, the index last; then it is flushed to disk and renamed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from shoal.errors import CheckpointError, nearest
from shoal.merge.checkpoint import INDEX, SINGLE, read_json
from shoal.types import MergePlan

MERGEKIT_CONFIG = "mergekit_config.yml"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATE = "chat_template.jinja"


def write_model(
    out_dir: Path,
    plan: MergePlan,
    tensors: Iterable[tuple[str, Tensor]],
    base_path: Path,
    tokenizer_path: Path,
    chat_template: str | None = None,
    mergekit_yaml: str = "",
    max_shard_bytes: int = 1 << 30,
    parent_paths: Sequence[Path] = (),
) -> None:
    """Write `tensors` (checkpoint names, in plan.dtype; streamed, one shard in memory) as a model folder.

    base_path: gives config.json and generation_config.json. tokenizer_path: its tokenizer files are copied as they
    are. chat_template: a Jinja text, one of mergekit's names (`chatml`, ...), `auto` (the commonest among
    `parent_paths`), or None to keep the tokenizer's. mergekit_yaml: text of mergekit_config.yml, if any.
    CheckpointError when out_dir exists and is not empty, or the disk is full; then nothing is left behind.
    """
    config = read_json(Path(base_path) / "config.json", "the base's configuration")
    template = chat_template_text(chat_template, [*parent_paths] or [Path(tokenizer_path)])
    with new_folder(out_dir) as folder:
        index = _write_shards(folder, tensors, max_shard_bytes)
        config["dtype"] = plan.dtype
        if "torch_dtype" in config:  # the name before transformers 5, still read by older tools
            config["torch_dtype"] = plan.dtype
        _write_json(folder / "config.json", config)
        _copy(Path(base_path), folder, ("generation_config.json",))
        _copy(Path(tokenizer_path), folder, _TOKENIZER_FILES)
        if template is not None:
            _set_template(folder, template)
        if mergekit_yaml:
            (folder / MERGEKIT_CONFIG).write_text(mergekit_yaml, encoding="utf-8")
        if index is not None:
            _write_json(folder / INDEX, index)


@contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out_dir` when the block ends well, and is gone when it does not."""
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointError(f"{out_dir}: exists and is not empty; choose another folder, or remove it")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    except OSError as error:
        raise CheckpointError(f"{out_dir}: cannot be created: {error}") from error
    try:
        yield folder
        for path in sorted(folder.rglob("*")):
            _sync(path)
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        _sync(folder)
        if out_dir.exists():
            out_dir.rmdir()  # empty, as checked above
        folder.rename(out_dir)
        _sync(out_dir.parent)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full:
            raise CheckpointError(
                f"{out_dir.parent}: the disk is full; free some space or choose another disk (nothing was written)"
            ) from error
        raise CheckpointError(f"{out_dir}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> dict[str, Any] | None:
    """Shards of at most `limit` bytes (a larger tensor gets its own); the index, or None for a single file."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        save_file(pending, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if pending and size + bytes_ > limit:
            flush()
        pending[name] = tensor.detach().cpu().contiguous()
        size += bytes_
        total += bytes_
    if pending:
        flush()
    if len(shards) <= 1:
        if shards:
            (folder / "part-0").rename(folder / SINGLE)
        return None
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def chat_template_text(wanted: str | None, paths: Sequence[Path]) -> str | None:
    """The template's text; mergekit's words: `auto`, a name, or the text itself. None keeps what is there."""
    if wanted is None:
        return None
    if wanted == "auto":
        found = [t for t in map(_own_template, paths) if t]
        return Counter(found).most_common(1)[0][0] if found else None
    if "{" in wanted:
        return wanted
    from importlib.resources import files

    names = {f.name.removesuffix(".jinja"): f for f in files("mergekit._data.chat_templates").iterdir()}
    names = {name: f for name, f in names.items() if f.name.endswith(".jinja")}
    if wanted not in names:
        raise CheckpointError(
            f"chat_template: {wanted!r} is neither a Jinja text nor a name; {nearest(wanted, names)}"
        )
    return names[wanted].read_text(encoding="utf-8")


def _own_template(path: Path) -> str | None:
    file = Path(path) / _TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    settings = Path(path) / "tokenizer_config.json"
    template = (
        read_json(settings, "the tokenizer's settings").get("chat_template") if settings.is_file() else None
    )
    if isinstance(template, list):  # several named ones
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template.strip() if isinstance(template, str) else None


def _set_template(folder: Path, template: str) -> None:
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        data = read_json(settings, "the tokenizer's settings")
        if data.pop("chat_template", None) is not None:
            _write_json(settings, data)
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / _TEMPLATE).write_text(template, encoding="utf-8")


def _copy(source: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
