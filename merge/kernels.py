"""The canonical arithmetic: float32, sources in plan order, separate multiplies and adds, one rounding at the end.

Pure functions on flat chunks. Nothing here depends on the number of threads, the step size or the machine: there is
no fused multiply-add, and every reduction is an elementwise halving tree in float64 over blocks of a fixed size.
The formulas are those of mergekit 0.1.5, which follow the papers named at each function.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shoal.errors import RecipeError

CHUNK = 1 << 20  # elements per block of a reduction: part of the result, never change it
STEP_CPU = 1 << 17  # elements per elementwise step: the working set stays in cache; no effect on the result
STEP_GPU = 1 << 24  # there, fewer launches count for more
_MASK_BITS = 24
# the finaliser of SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit integers
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)

Options = Mapping[str, float | bool]


def chunks(length: int, size: int | None = None) -> Iterator[slice]:
    """Slices of `size` elements (default: CHUNK) that cover `length`."""
    size = size or CHUNK
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def steps(tensor: Tensor) -> Iterator[slice]:
    """Slices of a flat tensor for elementwise work on its device."""
    return chunks(tensor.numel(), STEP_CPU if tensor.device.type == "cpu" else STEP_GPU)


# --- reductions ------------------------------------------------------------------------------------------------


def tree_sum(values: Tensor) -> float:
    """Sum of one chunk (at most CHUNK elements) in float64, by halving a zero-padded power of two."""
    size = 1 << max(0, values.numel() - 1).bit_length()
    x = torch.zeros(size, dtype=torch.float64, device=values.device)
    x[: values.numel()] = values
    while size > 1:
        size //= 2
        x[:size].add_(x[size : 2 * size])
    return float(x[0])


def l1_ratio(delta: Tensor, keep: Callable[[slice, Tensor], Tensor]) -> float:
    """||delta||_1 / ||kept part of delta||_1, the factor by which mergekit's `rescale` multiplies; 1 for tiny norms.

    keep(chunk, delta of the chunk) -> bool mask.
    """
    before = after = 0.0
    for part in chunks(delta.numel()):
        size = delta[part].abs()
        before += tree_sum(size)
        after += tree_sum(size * keep(part, delta[part]))
    return 1.0 if before < 1e-7 or after < 1e-7 else before / after


# --- which elements are kept -----------------------------------------------------------------------------------


def top_magnitudes(delta: Tensor, density: float) -> tuple[float, int]:
    """Threshold that keeps exactly max(1, int(density * n)) elements: (magnitude, last index kept among equals).

    TIES, Yadav et al. 2023 (arXiv:2306.01708), section 3, step 1; lowest index first among equals.
    """
    size = delta.abs()
    count = max(1, int(density * size.numel()))
    # read off the order statistic: a value of the tensor itself, whatever algorithm finds it
    threshold = size.kthvalue(size.numel() - count + 1).values
    above = int((size > threshold).sum())
    equal = (size == threshold).nonzero().reshape(-1)
    return float(threshold), int(equal[count - above - 1])


def keep_top(delta: Tensor, start: int, threshold: tuple[float, int]) -> Tensor:
    """Mask of a chunk that begins at element `start`, by the threshold of `top_magnitudes`."""
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


# --- the merges: flat float32 chunks -> flat float32 chunk ------------------------------------------------------


def linear(sources: Sequence[Tensor], weights: Sequence[float], options: Options) -> Tensor:
    """sum w_i x_i, divided by sum w_i when `normalize`. Model soups, arXiv:2203.05482."""
    result = _weighted_sum(sources, weights)
    if options["normalize"]:
        total = _float32_sum(weights)
        if total == 0:
            raise RecipeError(
                f"linear: weights {list(weights)} sum to 0; set normalize: false or other weights"
            )
        result.div_(total)
    return result


def task_arithmetic(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], options: Options
) -> Tensor:
    """base + lambda * sum w_i d_i, the sum divided by sum w_i when `normalize`. arXiv:2212.04089, section 2."""
    mixed = _weighted_sum(deltas, weights)
    if options["normalize"]:
        total = _float32_sum(weights)
        mixed.div_(1.0 if abs(total) < 1e-8 else total)
    return _add(base, mixed, options)


def elect_signs(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], options: Options) -> Tensor:
    """Like task_arithmetic, but only elements whose sign wins the weighted vote count (a tie goes to plus).

    TIES, arXiv:2306.01708, section 3, steps 2 and 3; with `normalize` the divisor is the sum of the weights that
    agree, 1 where that is 0. deltas: already sparse.
    """
    vote = torch.zeros_like(base)
    plus, minus = torch.zeros_like(base), torch.zeros_like(base)
    plus_weight, minus_weight = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(deltas, weights, strict=True):
        part = delta * weight
        vote.add_(part)
        plus.add_(part.clamp(min=0))
        minus.add_(part.clamp(max=0))
        if options["normalize"]:
            sign = part.sign()  # float arithmetic is several times faster here than masks
            plus_weight.add_(sign.clamp(min=0).mul_(weight))
            minus_weight.add_(sign.clamp_(max=0).mul_(-weight))
    positive = vote >= 0
    mixed = torch.where(positive, plus, minus)
    if options["normalize"]:
        divisor = torch.where(positive, plus_weight, minus_weight)
        divisor.add_(divisor == 0)
        mixed.div_(divisor)
    return _add(base, mixed, options)


def cosine(base: Tensor, source: Tensor) -> float:
    """Cosine of the angle between two whole tensors (any dtype, flat); norms up to 1e-8 count as 1, as in mergekit."""
    dot = norm_a = norm_b = 0.0
    for part in chunks(base.numel()):
        a, b = base[part].to(torch.float64), source[part].to(torch.float64)
        dot += tree_sum(a * b)
        norm_a += tree_sum(a * a)
        norm_b += tree_sum(b * b)
    length_a, length_b = (x if x > 1e-8 else 1.0 for x in (math.sqrt(norm_a), math.sqrt(norm_b)))
    return max(-1.0, min(1.0, dot / length_a / length_b))


def slerp_coefficients(cos: float, t: float) -> tuple[float, float]:
    """Weights of base and source on the great circle; a straight line where they are nearly parallel (0.9995)."""
    if abs(cos) > 0.9995:
        return 1.0 - t, t
    theta = math.acos(cos)
    return math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    result = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        result.add_(tensor * weight)
    return result


def _float32_sum(weights: Sequence[float]) -> float:
    """The sum as mergekit has it: every weight and every partial sum rounded to float32."""
    total = torch.zeros((), dtype=torch.float32)
    for weight in weights:
        total = total + torch.tensor(weight, dtype=torch.float32)
    return float(total)


def _add(base: Tensor, mixed: Tensor, options: Options) -> Tensor:
    if options["lambda"] != 1:
        mixed.mul_(float(options["lambda"]))
    return base + mixed
