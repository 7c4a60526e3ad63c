"""Safetensors files that are written in place: created at their full size and filled piece by piece.

The sizes of a merge are known before it begins. So a disk that is too small is an error at once, no tensor is ever
held whole in memory, and the kernel writes finished parts to the disk while the next ones are computed. (Plain writes:
the page faults of a mapped file take several times as long on ext4.)
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.merge.checkpoint import SINGLE
from shoal.merge.resident import Output

SHARD_BYTES = 1 << 30
_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header, and where in the file (bytes from its start) every tensor begins."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def shards_of(outputs: Sequence[Output], limit: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """Files of at most `limit` bytes of tensors, in the order of `outputs`; a larger tensor gets a file of its own."""
    parts: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if parts[-1] and size + output.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(output)
        size += output.nbytes
    if len(parts) == 1:
        return (_shard(SINGLE, parts[0]),)
    return tuple(
        _shard(f"model-{number:05d}-of-{len(parts):05d}.safetensors", part)
        for number, part in enumerate(parts, start=1)
    )


def _shard(file: str, outputs: Sequence[Output]) -> Shard:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    # no gaps are allowed between tensors: with the widest numbers first, each is aligned to its own width
    for output in sorted(outputs, key=lambda o: -o.dtype.itemsize):
        starts[output.name] = end
        entries[output.name] = {
            "dtype": _NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [end, end + output.nbytes],
        }
        end += output.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, header, {n: len(header) + s for n, s in starts.items()}, len(header) + end)


@dataclass(frozen=True)
class Place:
    """A tensor's place in an open file: the target that its pieces are written to."""

    handle: int
    offset: int  # bytes from the file's start
    dtype: torch.dtype

    def put(self, start: int, values: Tensor) -> None:
        data = values.detach().cpu().to(self.dtype).contiguous().view(-1)
        if data.numel():
            _write(
                self.handle, data.view(torch.uint8).numpy().data, self.offset + start * self.dtype.itemsize
            )


@dataclass
class Files:
    """The shards of one model while they are filled. Make one with `create`."""

    shards: tuple[Shard, ...]
    _handles: list[int]
    _places: Mapping[str, int]  # tensor -> its shard
    _syncer: ThreadPoolExecutor
    _left: list[int] = field(default_factory=list)  # tensors to come, by shard
    _syncs: list[Future[None]] = field(default_factory=list)

    def into(self, output: Output) -> Place:
        """Where `output` is to be written."""
        number = self._places[output.name]
        return Place(self._handles[number], self.shards[number].offsets[output.name], output.dtype)

    def done(self, output: Output) -> None:
        """`output` is complete; when its file is, it goes to the disk while others are computed."""
        number = self._places[output.name]
        self._left[number] -= 1
        if self._left[number] == 0:
            self._syncs.append(self._syncer.submit(os.fsync, self._handles[number]))

    def finish(self) -> None:
        """Wait until everything is on the disk; OSError when it could not be written."""
        for sync in self._syncs:
            sync.result()

    def index(self) -> dict[str, Any] | None:
        """What model.safetensors.index.json holds; None for a single file, which needs none."""
        if len(self.shards) == 1:
            return None
        total = sum(s.size - len(s.header) for s in self.shards)
        weight_map = {name: s.file for s in self.shards for name in s.offsets}
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


@contextmanager
def create(folder: Path, outputs: Sequence[Output], limit: int = SHARD_BYTES) -> Iterator[Files]:
    """The files of `outputs` in `folder`, all of their space reserved.

    CheckpointError when two outputs have one name or a dtype cannot be stored, OSError when there is no space.
    """
    names = [o.name for o in outputs]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise CheckpointError(f"tensor {twice!r} would be written twice; every tensor is made once")
    if odd := next((o for o in outputs if o.dtype not in _NAMES), None):
        raise CheckpointError(f"tensor {odd.name!r} has dtype {odd.dtype}, which safetensors cannot hold")
    shards = shards_of(outputs, limit)
    handles: list[int] = []
    syncer = ThreadPoolExecutor(1, thread_name_prefix="shoal-sync")
    try:
        for shard in shards:
            handles.append(os.open(folder / shard.file, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666))
            _reserve(handles[-1], shard.size)
            _write(handles[-1], memoryview(shard.header), 0)
        places = {name: number for number, shard in enumerate(shards) for name in shard.offsets}
        files = Files(shards, handles, places, syncer)
        files._left = [len(s.offsets) for s in shards]
        yield files
        files.finish()
    finally:
        syncer.shutdown(wait=True, cancel_futures=True)
        for handle in handles:
            os.close(handle)


_BINARY = getattr(os, "O_BINARY", 0)  # Windows


def _reserve(handle: int, size: int) -> None:
    """All blocks of the file now: a disk that is too small is found before hours of work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def _write(handle: int, data: memoryview, offset: int) -> None:
    data = data.cast("B")
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(handle, data, offset)
        else:  # Windows: the position is the file's, not the thread's
            with _POSITION:
                os.lseek(handle, offset, os.SEEK_SET)
                written = os.write(handle, data)
        data, offset = data[written:], offset + written


_POSITION = threading.Lock()
