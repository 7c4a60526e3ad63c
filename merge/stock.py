"""The parents of a search as flat buffers in the runtime model's layout, on the device or in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.merge import chunks
from shoal.merge.checkpoint import Parent
from shoal.merge.keeps import Keep, keep_or_base
from shoal.merge.layout import Entry, Layout
from shoal.merge.memory import flat_dtype

TILE = 1 << 24  # elements per streamed tile


@dataclass
class Stock:
    """Flat copies of the parents' tensors, made when first asked for.

    device: where merges are computed. resident: buffers are kept there; otherwise in host memory (pinned for a GPU).
    A source whose method drops elements of its delta has a second buffer, in which dropped elements are the base's:
    merges then need no masks, and it changes only when the densities do.
    """

    layout: Layout
    parents: Sequence[Parent]
    device: torch.device
    resident: bool = True
    _plain: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _kept: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _keys: dict[int, list[Any]] = field(default_factory=dict, repr=False)

    def plain(self, model: int) -> Tensor:
        """(rows, block) buffer of the parent's tensors as they are stored."""
        if model not in self._plain:
            parent = self.parents[model]
            flat = self._new(flat_dtype([parent.dtype(e.name) for e in self.layout.entries]))
            for entry in self.layout.entries:
                self.layout.view(flat, entry).copy_(parent.tensor(entry.name).reshape(-1))
            self._plain[model] = flat
        return self._plain[model]

    def kept(self, model: int, base: int, keeps: Mapping[int, Keep | None]) -> Tensor:
        """(rows, block) buffer of the parent, its dropped elements replaced by the base's.

        keeps: by index of the entry, for all entries that will be used.
        """
        if model not in self._kept:
            dtypes = [self.parents[m].dtype(e.name) for m in (model, base) for e in self.layout.entries]
            self._kept[model] = self._new(flat_dtype(dtypes))
            self._keys[model] = [None] * len(self.layout.entries)
        flat, keys = self._kept[model], self._keys[model]
        for index, keep in keeps.items():
            key = (base, None if keep is None else keep.key)
            if keys[index] != key:
                keys[index] = None  # until it is done
                self._fill(flat, self.layout.entries[index], model, base, keep)
                keys[index] = key
        return flat

    def load(self, model: int, name: str) -> Tensor:
        """A parent's tensor, flat, on the device."""
        return self.parents[model].tensor(name).to(self.device).reshape(-1)

    def _fill(self, flat: Tensor, entry: Entry, model: int, base: int, keep: Keep | None) -> None:
        out = self.layout.view(flat, entry)
        source = self.load(model, entry.name)
        if keep is None:
            out.copy_(source)
            return
        origin = self.load(base, entry.name)
        keep.prepare()

        def work(part: slice) -> None:
            out[part] = keep_or_base(keep, part.start, source[part], origin[part])

        chunks.each(source.numel(), work, self.device)
        keep.release()

    def _new(self, dtype: torch.dtype) -> Tensor:
        where = self.device if self.resident else torch.device("cpu")
        pinned = not self.resident and self.device.type == "cuda"
        return torch.zeros(self.layout.rows, self.layout.block, dtype=dtype, device=where, pin_memory=pinned)


@dataclass
class Stream:
    """Tiles of buffers, brought to the device one ahead of the tile that is being merged.

    Two sets of staging tiles; on a GPU the copies run on a stream of their own.
    """

    device: torch.device
    _stages: dict[Any, list[Tensor]] = field(default_factory=dict, repr=False)

    def tiles(self, rows: slice, buffers: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
        """(rows, one tile per buffer) that cover `rows`; a tile is valid until the next one is asked for."""
        height = max(1, TILE // buffers[0].shape[1])
        starts = range(rows.start, rows.stop, height)
        parts = [slice(s, min(s + height, rows.stop)) for s in starts]
        stages = [self._stage(slot, buffers, height) for slot in (0, 1)]
        if self.device.type != "cuda":
            for number, part in enumerate(parts):
                yield part, self._fetch(part, buffers, stages[number % 2])
            return
        copying: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        here = torch.cuda.current_stream(self.device)
        event: Any = torch.cuda.Event  # torch has no types for it
        ready = [event(), event()]
        free = [event(), event()]
        for each in free:
            each.record(here)
        fetched: list[list[Tensor]] = [[], []]

        def fetch(number: int) -> None:
            slot = number % 2
            with torch.cuda.stream(copying):
                copying.wait_event(free[slot])
                fetched[slot] = self._fetch(parts[number], buffers, stages[slot])
                ready[slot].record(copying)

        fetch(0)
        for number, part in enumerate(parts):
            if number + 1 < len(parts):
                fetch(number + 1)
            here.wait_event(ready[number % 2])
            yield part, fetched[number % 2]
            free[number % 2].record(here)

    def _stage(self, slot: int, buffers: Sequence[Tensor], height: int) -> list[Tensor]:
        key = slot, height, tuple((b.dtype, b.shape[1]) for b in buffers)
        if key not in self._stages:
            self._stages[key] = [
                torch.empty(height, b.shape[1], dtype=b.dtype, device=self.device) for b in buffers
            ]
        return self._stages[key]

    def _fetch(self, part: slice, buffers: Sequence[Tensor], stage: Sequence[Tensor]) -> list[Tensor]:
        tiles = []
        for buffer, room in zip(buffers, stage, strict=True):
            if buffer.device == self.device and self.device.type != "cpu":
                tiles.append(buffer[part])
                continue
            tile = room[: part.stop - part.start]
            tile.copy_(buffer[part], non_blocking=True)
            tiles.append(tile)
        return tiles
