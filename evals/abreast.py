"""Forward passes abreast on a CPU, each by a share of the threads.

Threads that share an operation wait for each other after each one, some 500 times per pass; threads with passes of their
own do not. Passes begin in their order. Keys and values of a trunk that a pass beside computes are waited for, layer by
layer, so that nothing is computed twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
P = TypeVar("P")

PASS = 2048  # tokens of a pass beside others: large enough that its own overheads are small
MOST = 8  # passes at once
# of a layer in one pass, FLOP: below, Python's own work is the larger part, and that goes one by one
LEAST_FLOP = 3e9


def useful(model: Any) -> int:
    """How many passes of `model` are better computed at once."""
    if next(model.parameters()).device.type != "cpu":
        return 1
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # such rotations change the module's state by the positions of a pass
    if any(kind in str(rope) for kind in ("dynamic", "longrope")):
        return 1
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    inner = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    layers = getattr(config, "num_hidden_layers", None) or 1
    return min(MOST, torch.get_num_threads()) if 2 * PASS * inner / layers >= LEAST_FLOP else 1


class Abandoned(RuntimeError):
    """What this pass waits for will not be computed."""


class Trunks(dict[tuple[int, int], tuple[Tensor, Tensor]]):
    """(layer, row) -> keys and values of a trunk [1, kv heads, length, dim]; what is missing is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._left = 0
        self._most = 1
        self._waiting = 0
        self._broken = False

    def begin(self, passes: int, abreast: int) -> None:
        """`passes` are to come, `abreast` of them at once."""
        with self._changed:
            self._left, self._most, self._waiting, self._broken = passes, abreast, 0, False

    def ended(self, broken: bool) -> None:
        """A pass has ended."""
        with self._changed:
            self._left -= 1
            self._broken = self._broken or broken
            self._changed.notify_all()

    def forget(self, row: int) -> None:
        """Drop trunk `row` of all layers."""
        with self._changed:
            for key in [key for key in self if key[1] == row]:
                del self[key]

    def __setitem__(self, key: tuple[int, int], value: tuple[Tensor, Tensor]) -> None:
        with self._changed:
            super().__setitem__(key, value)
            self._changed.notify_all()

    def __missing__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        def vain() -> bool:
            return self._broken or self._waiting >= min(self._most, self._left)

        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: key in self or vain())
            finally:
                self._waiting -= 1
            if key not in self:
                raise Abandoned(f"no pass computes trunk {key[1]} of layer {key[0]}")
            return self.get(key)  # type: ignore[return-value]


def run(compute: Callable[[P], T], passes: Sequence[P], trunks: Trunks, abreast: int) -> Generator[T]:
    """`compute` of every pass, in order; `abreast` of them at once, which share this thread's torch threads.

    Where one fails, its error is raised, and none is running any more.
    """
    abreast = min(abreast, len(passes))
    trunks.begin(len(passes), abreast)
    if abreast <= 1:
        yield from map(compute, passes)
        return
    threads = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(max(1, threads // abreast))

    @torch.inference_mode()
    def one(item: P) -> T:
        done = False
        try:
            result = compute(item)
            done = True
            return result
        finally:
            trunks.ended(broken=not done)

    pool = ThreadPoolExecutor(abreast, "shoal-pass", initializer=begin)
    try:
        for future in [pool.submit(one, item) for item in passes]:
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # of threads that are still to come
