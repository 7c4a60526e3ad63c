"""Which elements of a delta stay: rules that answer chunk by chunk, the same on every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.merge.masks import keep_random, keep_top


class Keep(Protocol):
    """Which elements of a delta stay. key: equal keys keep the same elements of the same delta."""

    @property
    def key(self) -> tuple[Any, ...]: ...

    def mask(self, start: int, delta: Tensor) -> Tensor:
        """Bool mask of a flat chunk of the delta that begins at element `start`."""
        ...

    def prepare(self) -> None:
        """Make what takes memory of the tensor's size, before several threads ask for masks."""
        ...

    def release(self) -> None:
        """Give that memory back; `prepare` makes it again."""
        ...


class _Small:
    def prepare(self) -> None:
        return None

    def release(self) -> None:
        return None


@dataclass(frozen=True)
class KeepNone(_Small):
    key: tuple[Any, ...] = ("nothing",)

    def mask(self, start: int, delta: Tensor) -> Tensor:
        return torch.zeros_like(delta, dtype=torch.bool)


@dataclass(frozen=True)
class KeepTop(_Small):
    key: tuple[Any, ...]
    cut: tuple[float, int]

    def mask(self, start: int, delta: Tensor) -> Tensor:
        return keep_top(delta, start, self.cut)


@dataclass(frozen=True)
class KeepBetween(_Small):
    key: tuple[Any, ...]
    lower: tuple[float, int]
    upper: tuple[float, int]

    def mask(self, start: int, delta: Tensor) -> Tensor:
        outliers = keep_top(delta, start, self.upper)
        return keep_top(delta, start, self.lower) & ~outliers


@dataclass(frozen=True)
class KeepRandom(_Small):
    key: tuple[Any, ...]
    stream: int
    density: float

    def mask(self, start: int, delta: Tensor) -> Tensor:
        return keep_random(self.stream, start, delta.numel(), self.density, delta.device)


@dataclass
class KeepMask:
    """A mask that cannot be had chunk by chunk: one byte per element, made when it is needed, dropped by `release`."""

    key: tuple[Any, ...]
    make: Callable[[], Tensor | None] = field(repr=False)
    whole: Tensor | None = field(default=None, repr=False)

    def mask(self, start: int, delta: Tensor) -> Tensor:
        self.prepare()
        assert self.whole is not None
        return self.whole[start : start + delta.numel()].to(delta.device)

    def prepare(self) -> None:
        if self.whole is None:
            self.whole = self.make()

    def release(self) -> None:
        self.whole = None


def keep_or_base(keep: Keep, start: int, source: Tensor, base: Tensor) -> Tensor:
    """A chunk of the source in which dropped elements are the base's: their delta is exactly 0.

    The result has a dtype that holds both exactly.
    """
    mask = keep.mask(start, source.to(torch.float32) - base.to(torch.float32))
    dtype = torch.promote_types(source.dtype, base.dtype)
    return torch.where(mask, source.to(dtype), base.to(dtype))
