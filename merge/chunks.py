"""Tensors in chunks, and sums over them in a fixed order: the same bits with any number of threads, on any machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 20  # elements per block of a reduction: part of the result, never change it
LANES = 1 << 15  # partial sums of a long sum: part of the result, never change it
STEP_CPU = 1 << 17  # elements per elementwise step: the working set stays in cache; no effect on the result
STEP_GPU = 1 << 24  # there, fewer launches count for more


def chunks(length: int, size: int | None = None) -> Iterator[slice]:
    """Slices of `size` elements (default: CHUNK) that cover `length`."""
    size = size or CHUNK
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def steps(tensor: Tensor) -> Iterator[slice]:
    """Slices of a flat tensor for elementwise work on its device."""
    return chunks(tensor.numel(), STEP_CPU if tensor.device.type == "cpu" else STEP_GPU)


def tree_sum(values: Tensor) -> float:
    """Sum of one chunk (at most CHUNK elements) in float64, by halving a zero-padded power of two."""
    size = 1 << max(0, values.numel() - 1).bit_length()
    x = torch.zeros(size, dtype=torch.float64, device=values.device)
    x[: values.numel()] = values
    while size > 1:
        size //= 2
        x[:size].add_(x[size : 2 * size])
    return float(x[0])


class Lanes:
    """A long sum: element i of what is added goes to lane i mod LANES, in order; at the end the lanes are summed up."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._lanes = torch.zeros(LANES, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """Add the next elements (float64, flat); all additions but the last must be multiples of LANES long."""
        for part in chunks(values.numel(), LANES):
            self._lanes[: part.stop - part.start].add_(values[part])

    def total(self) -> float:
        return tree_sum(self._lanes)
