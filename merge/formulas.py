"""The formulas of the canonical arithmetic: float32 tiles in, a float32 tile out.

Sources in plan order, separate multiplies and adds, no fused multiply-add, nothing that depends on the tile's size or
the number of threads. The same functions run eagerly (the canonical way) and compiled (`compiled.py`).
They are those of mergekit 0.1.5, which follow the papers named at each function.

Coefficients are numbers, or float32 tensors that broadcast against a tile (one per row): the bits are the same.
None stands for 1, without the operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficient = Tensor | float


def linear(
    sources: Sequence[Tensor], weights: Sequence[Coefficient], divisor: Coefficient | None = None
) -> Tensor:
    """sum w_i x_i / divisor. Model soups, arXiv:2203.05482."""
    result = _weighted_sum(sources, weights)
    return result if divisor is None else result.div_(divisor)


def task_arithmetic(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[Coefficient],
    divisor: Coefficient | None = None,
    factor: Coefficient | None = None,
) -> Tensor:
    """base + factor * (sum w_i d_i / divisor). arXiv:2212.04089, section 2."""
    mixed = _weighted_sum(deltas, weights)
    if divisor is not None:
        mixed.div_(divisor)
    return base + (mixed if factor is None else mixed.mul_(factor))


def elect_signs(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[Coefficient],
    divide: bool,
    factor: Coefficient | None = None,
) -> Tensor:
    """base + factor * the sum of the w_i d_i whose sign wins their vote (a tie goes to plus).

    TIES, arXiv:2306.01708, section 3, steps 2 and 3; with `divide` the sum is divided by the sum of the weights that
    agree, by 1 where that is 0. deltas: already sparse.
    """
    vote = torch.zeros_like(base)
    plus, minus = torch.zeros_like(base), torch.zeros_like(base)
    plus_weight, minus_weight = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(deltas, weights, strict=True):
        part = delta * weight
        vote.add_(part)
        plus.add_(part.clamp(min=0))
        minus.add_(part.clamp(max=0))
        if divide:
            sign = part.sign()  # float arithmetic is several times faster here than masks
            plus_weight.add_(sign.clamp(min=0).mul_(weight))
            minus_weight.add_(sign.clamp(max=0).neg_().mul_(weight))
    positive = vote >= 0
    mixed = torch.where(positive, plus, minus)
    if divide:
        divisor = torch.where(positive, plus_weight, minus_weight)
        divisor.add_(divisor == 0)
        mixed.div_(divisor)
    return base + (mixed if factor is None else mixed.mul_(factor))


def select_calculate_erase(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[Coefficient]) -> Tensor:
    """base + sum of the w_i d_i whose d_i has the sign of sum d_i, over the sum of those w_i (at least 1e-6).

    SCE, arXiv:2408.07990, section 3.2. deltas: already selected. weights: not negative.
    """
    vote = torch.zeros_like(base)
    for delta in deltas:
        vote.add_(delta)
    side = (vote >= 0).to(torch.float32).mul_(2).sub_(1)
    mixed, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta.sign() == side).to(torch.float32).mul_(weight)
        mixed.add_(delta * agrees)
        divisor.add_(agrees)
    return base + mixed.div_(divisor.clamp_(min=1e-6))


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Coefficient]) -> Tensor:
    result = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        result.add_(tensor * weight)
    return result


def float32_sum(weights: Sequence[float]) -> float:
    """The sum as mergekit has it: every weight and every partial sum rounded to float32."""
    total = torch.zeros((), dtype=torch.float32)
    for weight in weights:
        total = total + torch.tensor(weight, dtype=torch.float32)
    return float(total)
