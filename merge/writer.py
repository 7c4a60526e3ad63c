"""Write a merged model: sharded safetensors, configuration, tokenizer; all of it or nothing.

Everything goes into a temporary folder beside the target, the index last; then it is flushed to disk and renamed.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from shoal.errors import CheckpointError, nearest
from shoal.merge.checkpoint import INDEX, read_json
from shoal.merge.disk import SHARD_BYTES, create
from shoal.merge.resident import Output
from shoal.merge.tensors import Target
from shoal.types import MergePlan

MERGEKIT_CONFIG = "mergekit_config.yml"
TOKENIZER_FILES = (
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

Fill = Callable[[Callable[[Output], Target]], Iterable[Output]]
# what is complete: tensors, all tensors, their bytes, all bytes
Progress = Callable[[int, int, int, int], None]


class Merge(Protocol):
    """What makes the tensors of a plan; Merger is one. See there."""

    def outputs(self, plan: MergePlan) -> tuple[Output, ...]: ...

    def fill(self, plan: MergePlan, into: Callable[[Output], Target]) -> Iterator[Output]: ...


def write_model(
    out_dir: Path,
    plan: MergePlan,
    merger: Merge,
    base_path: Path,
    tokenizer_path: Path,
    chat_template: str | None = None,
    mergekit_yaml: str = "",
    max_shard_bytes: int = SHARD_BYTES,
    parent_paths: Sequence[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Write the merge of `plan` by `merger` as a model folder; in pieces, straight to the files.

    base_path: gives config.json and generation_config.json. tokenizer_path: its tokenizer files are copied as they
    are. chat_template: a Jinja text, one of mergekit's names (`chatml`, ...), `auto` (the commonest among
    `parent_paths`), or None to keep the tokenizer's. mergekit_yaml: text of mergekit_config.yml, if any.
    CheckpointError when out_dir exists and is not empty, or the disk is full; then nothing is left behind.
    """
    config = read_json(Path(base_path) / "config.json", "the base's configuration")
    template = chat_template_text(chat_template, [*parent_paths] or [Path(tokenizer_path)])
    with new_folder(out_dir) as folder:
        index = write_shards(
            folder, merger.outputs(plan), lambda into: merger.fill(plan, into), max_shard_bytes, progress
        )
        config["dtype"] = plan.dtype
        if "torch_dtype" in config:  # the name before transformers 5, still read by older tools
            config["torch_dtype"] = plan.dtype
        write_json(folder / "config.json", config)
        copy_files(Path(base_path), folder, ("generation_config.json",))
        copy_files(Path(tokenizer_path), folder, TOKENIZER_FILES)
        if template is not None:
            set_template(folder, template)
        if mergekit_yaml:
            (folder / MERGEKIT_CONFIG).write_text(mergekit_yaml, encoding="utf-8")
        if index is not None:
            write_json(folder / INDEX, index)


def write_shards(
    folder: Path,
    outputs: Sequence[Output],
    fill: Fill,
    limit: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Let `fill` write `outputs` into safetensors files in `folder`; the index to write last, None for a single file.

    fill(into) writes every output to the target that `into` gives and yields it when it is complete.
    CheckpointError when it does not yield each of them once.
    """
    total = sum(o.nbytes for o in outputs)
    made: set[str] = set()
    size = 0
    with create(folder, outputs, limit) as files:
        for output in fill(files.into):
            files.done(output)
            made.add(output.name)
            size += output.nbytes
            if progress is not None:
                progress(len(made), len(outputs), size, total)
        if missing := [o.name for o in outputs if o.name not in made]:
            raise CheckpointError(
                f"the merge did not make tensor {missing[0]!r} ({len(missing)} of {len(outputs)} are missing); "
                "please report this"
            )
    return files.index()


@contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out_dir` when the block ends well, and is gone when it does not.

    A process that is killed leaves `.NAME.shoal-merging-PID-...` behind; the next merge to the same place removes it.
    """
    out_dir = Path(out_dir)
    if out_dir.is_symlink():  # a folder cannot be renamed onto a link, only onto what it points to
        out_dir = out_dir.resolve()
    _refuse_existing(out_dir)
    prefix = f".{out_dir.name}.shoal-merging-"
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out_dir.parent, prefix)
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=out_dir.parent))
    except OSError as error:
        raise CheckpointError(f"{out_dir}: cannot be created: {error}") from error
    lock = _lock(folder)
    try:
        yield folder
        for path in sorted(folder.rglob("*")):
            _sync(path)
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        _sync(folder)
        if out_dir.exists():
            _refuse_existing(out_dir)  # somebody else may have been faster
            out_dir.rmdir()
        folder.rename(out_dir)
        _sync(out_dir.parent)
    except OSError as error:
        raise CheckpointError(_refusal(out_dir, error)) from error
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_existing(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointError(f"{out_dir}: exists and is not empty; choose another folder, or remove it")


def _refusal(out_dir: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(out_dir.parent).free / 1e9:.2f} GB are free"
        return (
            f"{out_dir.parent}: the disk is full{free}; free some space or choose another disk "
            "(nothing was written)"
        )
    if error.errno == errno.EFBIG:
        return (
            f"{out_dir}: a file would be larger than this system allows; merge into smaller shards, or raise the "
            "limit (ulimit -f) (nothing was written)"
        )
    return f"{out_dir}: cannot be written: {error}"


def _lock(folder: Path) -> int | None:
    """A lock that lasts as long as this process: a folder without one belongs to nobody."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_leftovers(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        pid = folder.name.removeprefix(prefix).partition("-")[0]
        if not pid.isdigit() or folder.is_symlink() or not folder.is_dir():
            continue
        lock = _lock(folder)
        if lock is None:  # somebody holds it, perhaps in another container, where processes count differently
            continue
        os.close(lock)
        if not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


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


def set_template(folder: Path, template: str) -> None:
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        data = read_json(settings, "the tokenizer's settings")
        if data.pop("chat_template", None) is not None:
            write_json(settings, data)
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / _TEMPLATE).write_text(template, encoding="utf-8")


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_json(path: Path, data: Any) -> None:
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
