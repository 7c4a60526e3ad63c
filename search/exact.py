"""Exact tests of paired outcomes: McNemar's, and random signs where the clusters weigh unequally."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from shoal.errors import ShoalError

Floats = NDArray[np.float64]

ENUMERATED = 12  # clusters up to which all sign patterns are visited
CHUNK = 4_000_000  # numbers in memory at once


def mcnemar_exact(b: int, c: int, mid: bool = False) -> float:
    """Two-sided p of b wins against c losses among discordant pairs (binomial, p = 1/2); 1 where b + c = 0.

    McNemar 1947, Psychometrika 12:153, with the exact binomial in place of chi-square. mid: the mid-p version,
    which counts the observed outcome half: the exact test rejects far less often than its level says, the
    mid-p test about as often (Fagerland, Lydersen & Laake 2013, BMC Med. Res. Methodol. 13:91).
    """
    if b < 0 or c < 0:
        raise ShoalError(f"mcnemar: expected counts, found {b} and {c}")
    if b == c:
        return 1.0
    from scipy.stats import binom, binomtest  # a second to import, so not with the package

    p = float(binomtest(b, b + c).pvalue)
    return p - float(binom.pmf(b, b + c, 0.5)) if mid else p


def sign_flip(
    contributions: Floats, seed: int | Sequence[int], draws: int = 10_000, mid: bool = False
) -> float:
    """Two-sided p of the sum of `contributions` under random signs (Fisher 1935, The Design of Experiments, 21).

    contributions: [C], none 0. Exact (McNemar) where all have one size, or are 12 at most; else by `draws` random
    sign patterns, the observed one counted among them. mid: as in `mcnemar_exact`.
    """
    sizes, counts = _kinds(np.abs(contributions))
    if sizes.size <= 1:
        wins = int((contributions > 0).sum())
        return mcnemar_exact(wins, contributions.size - wins, mid)
    reach = abs(float(contributions.sum()))
    slack = 1e-9 * float(sizes @ counts)
    if contributions.size <= ENUMERATED:
        signs = np.array(list(product((-1.0, 1.0), repeat=contributions.size)))
        sums = np.abs(signs @ np.abs(contributions))
        equal_share = float((np.abs(sums - reach) <= slack).mean())
        return float((sums > reach + slack).mean()) + (0.5 if mid else 1.0) * equal_share
    generator = np.random.default_rng(seed)
    above = equal = 0
    step = max(1, CHUNK // sizes.size)
    for start in range(0, draws, step):
        shape = (min(step, draws - start), sizes.size)
        if (counts == 1).all():
            packed = generator.integers(0, 256, size=(shape[0], -(-shape[1] // 8)), dtype=np.uint8)
            positive = np.unpackbits(packed, axis=1, count=shape[1]).astype(np.float64)
            sums = np.abs(2 * (positive @ sizes) - sizes.sum())
        else:
            # of equal sizes it is enough to draw how many are positive
            sums = np.abs((2 * generator.binomial(counts, 0.5, size=shape) - counts) @ sizes)
        above += int((sums > reach + slack).sum())
        equal += int((np.abs(sums - reach) <= slack).sum())
    equal += 1
    return (above + (0.5 if mid else 1.0) * equal) / (draws + 1)


def sign_flip_bound(contributions: Floats) -> float:
    """What `sign_flip` cannot exceed: twice 3.18 normal tails beyond |sum| / sqrt(sum of squares); at most 1.

    Bentkus & Dzindzalieta 2015, Bernoulli 21:1205, theorem 1.1, with c = 1 / (4 (1 - Phi(sqrt 2))).
    """
    squares = float(contributions @ contributions)
    if not squares > 0:
        return 1.0
    tail = ndtr(-abs(float(contributions.sum())) / math.sqrt(squares)) / (4 * ndtr(-math.sqrt(2)))
    return min(1.0, 2 * float(tail))


def _kinds(sizes: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Distinct sizes and how often each comes; those that differ by rounding only are one."""
    if sizes.size == 0:
        return sizes, np.zeros(0, dtype=np.int64)
    ordered = np.sort(sizes)
    new = np.concatenate([[True], np.diff(ordered) > 1e-12 * ordered[-1]])
    return ordered[new], np.diff(np.append(np.flatnonzero(new), sizes.size)).astype(np.int64)
