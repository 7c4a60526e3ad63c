"""Tensors in chunks, and sums over them in a fixed order: the same bits with any number of threads, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

A = TypeVar("A")
B = TypeVar("B")
CHUNK = 1 << 20  # elements per block of a reduction: part of the result, never change it
LANES = 1 << 15  # partial sums of a long sum: part of the result, never change it
STEP_CPU = 1 << 18  # elements per elementwise step: cached, and worth a call; no effect on the result
STEP_GPU = 1 << 24  # there, fewer launches count for more


def chunks(length: int, size: int | None = None) -> Iterator[slice]:
    """Slices of `size` elements (default: CHUNK) that cover `length`."""
    size = size or CHUNK
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def in_order(work: Callable[[A], B], jobs: Sequence[A], device: torch.device) -> Iterator[B]:
    """The results of `work` in the order of the jobs; on a CPU, as many at once as torch has threads.

    Python threads over large jobs, in which torch has one thread: torch's own threads would wait for each other at the
    end of every operation, which on a busy machine takes many times as long as the operation.
    """
    inference = torch.is_inference_mode_enabled()

    def one(job: A) -> B:
        # both modes belong to the calling thread alone
        with torch.inference_mode(inference), torch.no_grad():
            return work(job)

    workers = min(torch.get_num_threads() if device.type == "cpu" else 1, len(jobs))
    if workers < 2:
        yield from map(one, jobs)
    else:
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield from pool.map(one, jobs)
        finally:
            torch.set_num_threads(threads)


def each(length: int, work: Callable[[slice], object], device: torch.device, size: int | None = None) -> None:
    """Elementwise work on slices of `size` elements (default: what suits the device) that cover `length`."""
    size = size or step(device)
    block = 8 * size  # what one thread takes at a time

    def run(part: slice) -> None:
        for piece in chunks(part.stop - part.start, size):
            work(slice(part.start + piece.start, part.start + piece.stop))

    for _ in in_order(run, list(chunks(length, block)), device):
        pass


def step(device: torch.device) -> int:
    """Elements per elementwise operation."""
    return STEP_CPU if device.type == "cpu" else STEP_GPU


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
