"""Slots: where running sequences keep keys and values of their own tokens, and the two passes that write into them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.evals.attention import Kept, Options, Pass, attention, join, trunk_mask


class Slots:
    """Keys and values of the running sequences, per layer [slots, kv heads, room, dim]; grows with its longest."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.room = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, room: int) -> None:
        if room <= self.room:
            return
        room = max(room, self.room + 64)
        for layer, pair in self.layers.items():
            grown = []
            for old in pair:
                new = old.new_zeros(*old.shape[:2], room, old.shape[3])
                new[:, :, : self.room] = old
                grown.append(new)
            self.layers[layer] = (grown[0], grown[1])
        self.room = room

    def of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            self.layers[layer] = (
                key.new_zeros(self.count, key.shape[1], self.room, key.shape[3]),
                value.new_zeros(self.count, value.shape[1], self.room, value.shape[3]),
            )
        return self.layers[layer]

    def move(self, source: int, target: int, length: int) -> None:
        for keys, values in self.layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]


@dataclass
class Filling:
    """A pass over prompts that also writes their own rows into slots. taps: (slot, start, stop) in the stream."""

    inner: Pass
    slots: Slots
    taps: Sequence[tuple[int, int, int]]
    layer: int = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        exact = (key.float(), value.float()) if key.device.type == "cpu" else (key, value)
        keys, values = self.slots.of(layer, *exact)
        for slot, low, high in self.taps:
            keys[slot, :, : high - low] = exact[0][0, :, low:high]
            values[slot, :, : high - low] = exact[1][0, :, low:high]
        return self.inner.attend(layer, query, key, value, options)


@dataclass
class Step:
    """One token for each of the first `count` slots."""

    slots: Slots
    kept: Kept
    lengths: Tensor  # [count], the new token included
    longest: int
    positions: Tensor  # [count]
    trunks: Sequence[tuple[int, int, Tensor | None]]  # row, first position, slots below it (None: all)
    layer: int = 0
    _masks: dict[Any, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        dtype = query.dtype
        if query.device.type == "cpu":
            query, key, value = query.float(), key.float(), value.float()
        count, heads = query.shape[2], query.shape[1]
        keys, values = self.slots.of(layer, key, value)
        slot = torch.arange(count, device=query.device)
        keys[slot, :, self.lengths - 1] = key[0].transpose(0, 1)
        values[slot, :, self.lengths - 1] = value[0].transpose(0, 1)
        own = query[0].transpose(0, 1).unsqueeze(2)  # [count, heads, 1, dim]
        mask = self._own_mask(options.window, query.dtype)
        out, lse = attention(
            own, keys[:count, :, : self.longest], values[:count, :, : self.longest], mask, False, options
        )
        whole, weight = out[:, :, 0].contiguous(), lse[:, :, 0].contiguous()  # [count, heads, dim]
        for row, begin, below in self.trunks:
            trunk_keys, trunk_values = self.kept[layer, row]
            asked = (query if below is None else query.index_select(2, below)).to(trunk_keys.dtype)
            seen = self._trunk_mask(row, begin, below, trunk_keys.shape[2], options.window, asked.dtype)
            out, lse = attention(asked, trunk_keys, trunk_values, seen, False, options)
            other, other_lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
            if below is None:
                join(whole, weight, other, other_lse)
            else:
                part, part_lse = whole[below], weight[below]
                join(part, part_lse, other, other_lse)
                whole[below], weight[below] = part, part_lse
        return whole.view(1, count, heads, -1).to(dtype)

    def _own_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        found = self._masks.get(window)
        if found is None:
            column = torch.arange(self.longest, device=self.lengths.device)[None, :]
            shut = column >= self.lengths[:, None]
            if window is not None:
                shut = shut | (self.lengths[:, None] - 1 - column >= window)
            found = torch.zeros(shut.shape, dtype=dtype, device=shut.device)
            found = self._masks[window] = found.masked_fill_(shut, -math.inf)[:, None, None, :]
        return found

    def _trunk_mask(
        self, row: int, begin: int, below: Tensor | None, length: int, window: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        if window is None:
            return None
        if (row, window) not in self._masks:
            at = self.positions if below is None else self.positions[below]
            self._masks[row, window] = trunk_mask(at, begin, length, window, dtype)
        return self._masks[row, window]
