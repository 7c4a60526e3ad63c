"""Where every tensor of a model lies in one flat buffer: rows of BLOCK elements, each tensor beginning a row.

The order is that of the runtime model's parameters. Every row belongs to one tensor, so coefficients that differ
between tensors are one number per row, and one kernel over all rows merges the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

BLOCK = 1024  # elements per row


@dataclass(frozen=True)
class Entry:
    """A checkpoint tensor in the flat buffer: `numel` elements from row `row` on (its last row may be padded)."""

    name: str
    shape: tuple[int, ...]
    row: int
    rows: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of one dtype. block: elements per row. owner: (rows,) index of the entry that each row belongs to."""

    dtype: torch.dtype
    block: int
    entries: tuple[Entry, ...]
    parameters: Mapping[str, int] = field(repr=False)  # runtime parameter -> its first row
    rows: int
    owner: np.ndarray = field(repr=False, compare=False)

    def view(self, flat: Tensor, entry: Entry) -> Tensor:
        """The entry's elements in a (rows, block) buffer, flat."""
        start = entry.row * self.block
        return flat.view(-1)[start : start + entry.numel]


def layouts(model: nn.Module, places: Mapping[str, Tensor]) -> tuple[list[Layout], list[str]]:
    """Layouts of a runtime model, one per dtype of its parameters, and the tensors that fit into none.

    places: `runtime_map`'s views. A parameter gets its own rows if the tensors in it are contiguous in it and begin at
    multiples of the block; the others (transposed, or no parameters at all) are merged apart and copied.
    """
    inside: dict[int, list[tuple[int, str]]] = {}
    parameters: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        parameters[parameter.data_ptr()] = name, parameter.data
    starts = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for _, p in parameters.values()
    )
    apart: list[str] = []
    first = np.array([s for s, _ in starts], dtype=np.int64)
    for name, view in places.items():
        at = int(np.searchsorted(first, view.data_ptr(), side="right")) - 1
        if at < 0 or view.data_ptr() >= starts[at][1] or not view.is_contiguous() or not view.numel():
            apart.append(name)
            continue
        start = starts[at][0]
        inside.setdefault(start, []).append(((view.data_ptr() - start) // view.element_size(), name))
    for start, found in list(inside.items()):
        whole = parameters[start][1]
        covered = sum(places[n].numel() for _, n in found) == whole.numel()
        if not (covered and whole.is_contiguous() and whole.dtype.is_floating_point):
            apart += [n for _, n in inside.pop(start)]
    by_dtype: dict[torch.dtype, list[int]] = {}
    for start, (_, whole) in parameters.items():  # in the model's own order
        if start in inside:
            by_dtype.setdefault(whole.dtype, []).append(start)
    made = []
    for dtype, members in by_dtype.items():
        block = BLOCK
        for start in members:
            for offset, _ in inside[start]:
                block = min(block, math.gcd(offset, block) or block)
        made.append(_layout(dtype, block, [(*parameters[s], sorted(inside[s])) for s in members], places))
    return made, sorted(apart)


def _layout(
    dtype: torch.dtype,
    block: int,
    members: Sequence[tuple[str, Tensor, list[tuple[int, str]]]],
    places: Mapping[str, Tensor],
) -> Layout:
    entries: list[Entry] = []
    first: dict[str, int] = {}
    row = 0
    for name, parameter, found in members:
        first[name] = row
        for offset, tensor in found:
            shape = tuple(places[tensor].shape)
            rows = -(-math.prod(shape) // block)
            entries.append(Entry(tensor, shape, row + offset // block, rows))
        row += -(-parameter.numel() // block)
    owner = np.repeat(np.arange(len(entries)), [e.rows for e in entries])
    return Layout(dtype, block, tuple(entries), first, row, owner)


def settle(model: nn.Module, layout: Layout, device: torch.device) -> Tensor:
    """A flat buffer on `device` whose views become the model's parameters; returns it as (rows, block).

    Values are kept. From here on, writing the buffer is loading the model.
    """
    flat = torch.zeros(layout.rows, layout.block, dtype=layout.dtype, device=device)
    for name, parameter in model.named_parameters():
        if name not in layout.parameters:
            continue
        start = layout.parameters[name] * layout.block
        home = flat.view(-1)[start : start + parameter.numel()].view(parameter.shape)
        home.copy_(parameter.data)
        parameter.data = home
    return flat
