"""What one output tensor is made of: the formula, its coefficients, and which elements of each delta are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.merge import formulas
from shoal.merge.keeps import Keep

Kind = Literal["linear", "task_arithmetic", "elect_signs", "select_calculate_erase"]


@dataclass(frozen=True)
class Terms:
    """How to make one output tensor.

    with_base: `linear` only, the base is the first of the operands. weights: one per operand. scales: factors of the
    deltas before their weights, empty for none. divisor, factor: of the sum; None for 1. divide: `elect_signs` only,
    by the weights that agree. keeps: one per source, None for all elements; empty for none at all.
    """

    kind: Kind
    weights: tuple[float, ...]
    with_base: bool = False
    scales: tuple[float, ...] = ()
    divisor: float | None = None
    factor: float | None = None
    divide: bool = False
    keeps: tuple[Keep | None, ...] = ()


@dataclass(frozen=True)
class Program:
    """The part of Terms that a kernel is built for; the rest are rows of its table of coefficients."""

    kind: Kind
    operands: int
    with_base: bool
    scaled: bool
    divided: bool
    factored: bool
    divide: bool

    @property
    def needs_base(self) -> bool:
        return self.kind != "linear" or self.with_base

    @property
    def columns(self) -> int:
        return self.operands * (2 if self.scaled else 1) + self.divided + self.factored


def program_of(terms: Sequence[Terms]) -> Program:
    """The one program that serves all of `terms`, which share kind and operands: what one of them lacks is a 1."""
    first = terms[0]
    return Program(
        first.kind,
        len(first.weights),
        first.with_base,
        scaled=any(t.scales for t in terms),
        divided=any(t.divisor is not None for t in terms),
        factored=any(t.factor is not None for t in terms),
        divide=first.divide,
    )


def row_of(terms: Terms, program: Program) -> list[float]:
    """Coefficients in the order of the program's columns."""
    row = list(terms.weights)
    if program.scaled:
        row += terms.scales or [1.0] * program.operands
    if program.divided:
        row.append(1.0 if terms.divisor is None else terms.divisor)
    if program.factored:
        row.append(1.0 if terms.factor is None else terms.factor)
    return row


def combine(
    program: Program,
    base: Tensor | None,
    sources: Sequence[Tensor],
    row: Sequence[formulas.Coefficient] | Tensor,
) -> Tensor:
    """One float32 tile by the program. base, sources: tiles in stored dtypes, dropped elements equal to the base's.

    row: a coefficient per column, numbers or (rows, 1) tensors.
    """
    n = program.operands
    weights = [row[i] for i in range(n)]
    at = n
    scales = [row[at + i] for i in range(n)] if program.scaled else None
    at += n if program.scaled else 0
    divisor = row[at] if program.divided else None
    factor = row[at + program.divided] if program.factored else None
    xs = [s.to(torch.float32) for s in sources]
    if program.kind == "linear":
        if program.with_base:
            assert base is not None
            xs = [base.to(torch.float32), *xs]
        return formulas.linear(xs, weights, divisor)
    assert base is not None
    origin = base.to(torch.float32)
    deltas = [x - origin for x in xs]
    if scales is not None:
        deltas = [delta * scale for delta, scale in zip(deltas, scales, strict=True)]
    if program.kind == "task_arithmetic":
        return formulas.task_arithmetic(origin, deltas, weights, divisor, factor)
    if program.kind == "elect_signs":
        return formulas.elect_signs(origin, deltas, weights, program.divide, factor)
    return formulas.select_calculate_erase(origin, deltas, weights)
