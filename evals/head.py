"""The output layer, into memory that is kept between passes.

Logits are the largest block of a forward pass. Taken anew from the system for every pass, its pages cost a third of the
layer's time on a CPU (glibc hands no block above 32 MB out of its own heap, whatever it is told; see `heap`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Head:
    """The output layer of `model`; its own forward where it is no plain linear layer on a CPU."""

    def __init__(self, model: Any) -> None:
        self.module = model.get_output_embeddings()
        self._memory: Tensor | None = None

    def drop(self) -> None:
        """Give the memory back."""
        self._memory = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within this block the layer's output [..., vocabulary] is overwritten by its next call. No gradients."""
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

    def _forward(self, hidden: Tensor) -> Tensor:
        weight = self.module.weight
        rows = hidden.reshape(-1, hidden.shape[-1])
        size = len(rows) * len(weight)
        memory = self._memory
        if memory is None or memory.numel() < size or memory.dtype != weight.dtype:
            self._memory = None  # before the larger one is taken
            memory = self._memory = torch.empty(size, dtype=weight.dtype)
        out = memory[:size].view(len(rows), len(weight))
        torch.mm(rows, weight.t(), out=out)
        return out.view(*hidden.shape[:-1], len(weight))
