"""The output layer, into memory that is kept between passes.

Logits are the largest block of a forward pass. Taken anew from the system for every pass, its pages cost a third of the
layer's time on a CPU (glibc hands no block above 32 MB out of its own heap, whatever it is told; see `heap`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Head:
    """The output layer of `model`; its own forward where it is no plain linear layer on a CPU."""

    def __init__(self, model: Any) -> None:
        self.module = model.get_output_embeddings()
        self._free: list[Tensor] = []
        self._size = 0  # the most that was needed so far
        self._taken = threading.local()

    def drop(self) -> None:
        """Give the memory back."""
        self._free.clear()
        self._size = 0

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within this block, in all threads, the layer minds `kept`. No gradients."""
        module = self.module
        if type(module) is not nn.Linear or module.weight.device.type != "cpu" or module.bias is not None:
            yield
            return
        before = module.__dict__.get("forward")
        module.forward = self._forward
        try:
            yield
        finally:
            if before is None:
                del module.forward
            else:
                module.forward = before

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within this block what the layer gives this thread is overwritten by the next that it gives."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = None
        self._taken.memory = [memory]
        try:
            yield
        finally:
            memory = self._taken.memory[0]
            del self._taken.memory
            if memory is not None:
                self._free.append(memory)

    def _forward(self, hidden: Tensor) -> Tensor:
        weight = self.module.weight
        taken = getattr(self._taken, "memory", None)
        if taken is None:
            return nn.functional.linear(hidden, weight)
        rows = hidden.reshape(-1, hidden.shape[-1])
        size = len(rows) * len(weight)
        if taken[0] is None or taken[0].numel() < size or taken[0].dtype != weight.dtype:
            self._size = max(self._size, size)
            taken[0] = None  # before the larger one is taken
            taken[0] = torch.empty(self._size, dtype=weight.dtype)
        out: Tensor = taken[0][:size].view(len(rows), len(weight))
        torch.mm(rows, weight.t(), out=out)
        return out.view(*hidden.shape[:-1], len(weight))
