"""Which elements stay, chunk by chunk: by magnitude with the lowest index first among equals, or by counted draws."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK_BITS = 24
# the finaliser of SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit integers
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def keep_top(delta: Tensor, start: int, threshold: tuple[float, int]) -> Tensor:
    """Mask of a chunk that begins at element `start`, by a threshold: the magnitude, and the last index kept among its equals."""
    magnitude, last = threshold
    size = delta.abs()
    if start > last:
        return size > magnitude
    mask = size >= magnitude
    if start + size.numel() > last + 1:  # the one chunk in which the equals change sides
        tail = last + 1 - start
        mask[tail:] = size[tail:] > magnitude
    return mask


def mask_key(seed: int, parent: int, tensor: str) -> int:
    """64-bit key of a DARE mask stream, signed: independent for every seed, parent and tensor."""
    digest = hashlib.sha256(f"shoal dare 1\n{seed}\n{parent}\n{tensor}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniform_bits(key: int, start: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Counter-based uniform numbers: for elements start..start+length, 24 random bits each (int64, u = bits / 2^24).

    SplitMix64's finaliser of key + (index + 1) * golden ratio, in wrapping 64-bit integers.
    """
    x = torch.arange(start + 1, start + length + 1, dtype=torch.int64, device=device)
    x.mul_(_GOLDEN).add_(key)
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        x.bitwise_xor_(_shift_right(x, shift)).mul_(factor)
    x.bitwise_xor_(_shift_right(x, 31))
    return _shift_right(x, 64 - _MASK_BITS)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts arithmetically; the mask clears the copies of the sign
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def keep_random(
    key: int, start: int, length: int, density: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Mask that keeps where u < density, so that a smaller density keeps a subset. DARE, arXiv:2311.03099."""
    return uniform_bits(key, start, length, device) < math.ceil(density * (1 << _MASK_BITS))
