"""Which elements a method keeps: exact order statistics of whole tensors, without sorting and without copies of them.

Magnitudes are ordered by the bits of their float32 values. A histogram of the upper 16 bits finds the bin of the wanted
rank, a second one of the lower 16 bits the value, a last pass the index among equals. Every pass reads the tensors in
chunks; only counts are kept. Counts are integers: nothing depends on threads or chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.errors import CheckpointError, RecipeError
from shoal.merge import kernels

Cut = tuple[float, int]  # magnitude, and the last index that is kept among its equals
NOTHING: Cut = (math.inf, -1)
_BINS = 1 << 15
_INFINITE = 0x7F80  # upper bits of infinity and NaN
_Values = Callable[[slice], Tensor]  # a chunk of float32 values


@dataclass(frozen=True)
class MagnitudeHistogram:
    """How many elements of |source - base| have which upper 16 bits. counts: (2^15,) int64, on the CPU.

    Made once per tensor; from then on the cuts for any number of kept elements take two more passes at most.
    """

    counts: Tensor = field(repr=False)

    @staticmethod
    def of(source: Tensor, base: Tensor) -> MagnitudeHistogram:
        """Of flat tensors of any float dtypes. CheckpointError where a difference is no finite number."""
        return MagnitudeHistogram(_upper_counts(_delta(source, base), source))

    def cuts(self, source: Tensor, base: Tensor, counts: Sequence[int]) -> list[Cut]:
        """For each count k the cut that keeps exactly the k largest, lowest index first among equals.

        TIES, arXiv:2306.01708, section 3, step 1.
        """
        return [_cut(_delta(source, base), source, self.counts, k) for k in counts]


def breadcrumbs_range(
    histogram: MagnitudeHistogram, source: Tensor, base: Tensor, density: float, gamma: float
) -> tuple[Cut, Cut]:
    """(lower, upper) cut: kept is what `lower` keeps and `upper` does not, int(density * n) elements.

    The int(gamma * n) largest are outliers, fewer where that would leave too few. Breadcrumbs, arXiv:2312.06795,
    section 3.2.
    """
    numel = source.numel()
    kept = int(density * numel)
    smallest = max(0, numel - kept - int(gamma * numel))
    lower, upper = histogram.cuts(source, base, [numel - smallest, numel - smallest - kept])
    return lower, upper


def della_mask(
    source: Tensor, base: Tensor, shape: tuple[int, ...], density: float, epsilon: float, stream: int
) -> Tensor:
    """Flat bool mask: kept with a probability that rises with the rank in its row, from density - epsilon to + epsilon.

    A row is a vector, or what runs along dimension 1, as in mergekit; equals rank by their index; a row of one element
    has the lowest probability (mergekit's is not defined there). The draws are those of DARE masks, so masks nest in
    density. DELLA, arXiv:2406.11617, section 3.1. RecipeError where density +- epsilon leaves (0, 1).
    """
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise RecipeError(
            f"della: density {density:g} +- epsilon {epsilon:g} must stay inside (0, 1); choose a smaller epsilon"
        )
    rows, width, depth = _rows(shape)
    mask = torch.empty(source.numel(), dtype=torch.bool, device=source.device)
    height = max(1, kernels.CHUNK // (width * depth))
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        part = slice(start * width * depth, stop * width * depth)
        size = _delta(source, base)(part).abs()
        _finite(size)
        ranks = _ranks(size.view(stop - start, width, depth))
        probabilities = (density - epsilon) + ranks * 2 * epsilon
        bits = kernels.uniform_bits(stream, part.start, part.stop - part.start, source.device)
        mask[part] = bits < probabilities.reshape(-1).to(torch.float64) * (1 << 24)
    return mask


def sce(
    sources: Sequence[Tensor], base: Tensor, select_topk: float
) -> tuple[Tensor | None, tuple[float, ...]]:
    """(flat bool mask or None for all elements, weight of each source).

    Selected are the int(select_topk * v) elements with the largest variance across the deltas, v of which are not 0;
    weights are the shares of the selected deltas' mean squares, equal ones where all are below 1e-6.
    SCE, arXiv:2408.07990, section 3.2.
    """
    mask = None if select_topk >= 1 else _most_variable(sources, base, select_topk)
    squares = [0.0] * len(sources)
    for part in kernels.chunks(base.numel()):
        for i, source in enumerate(sources):
            delta = _delta(source, base)(part).to(torch.float64)
            kept = delta if mask is None else delta * mask[part]
            squares[i] += kernels.tree_sum(kept * kept)
    means = [s / max(1, base.numel()) for s in squares]
    total = sum(means)
    if not math.isfinite(total):
        raise CheckpointError("holds NaN or infinite values")
    if abs(total) < 1e-6:
        return mask, (1.0 / len(sources),) * len(sources)
    return mask, tuple(m / total for m in means)


def _most_variable(sources: Sequence[Tensor], base: Tensor, share: float) -> Tensor:
    deltas = [_delta(source, base) for source in sources]

    def variance(part: slice) -> Tensor:
        xs = [delta(part).to(torch.float64) for delta in deltas]
        mean = xs[0].clone()
        for x in xs[1:]:
            mean.add_(x)
        mean.div_(len(xs))
        total = torch.zeros_like(mean)
        for x in xs:
            total.add_((x - mean).square_())
        return total.div_(len(xs)).to(torch.float32)

    counts = _upper_counts(variance, base)
    mask = torch.zeros(base.numel(), dtype=torch.bool, device=base.device)
    nonzero = sum(int(torch.count_nonzero(variance(part))) for part in kernels.chunks(base.numel()))
    count = int(torch.tensor(nonzero) * share) if share > 0 else 0  # rounded to float32, as mergekit does
    if count == 0:
        return mask
    cut = _cut(variance, base, counts, count)
    for part in kernels.chunks(base.numel()):
        mask[part] = kernels.keep_top(variance(part), part.start, cut)
    return mask


def _rows(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape as (rows, width, depth), ranked along width."""
    if len(shape) < 2:
        return 1, math.prod(shape), 1
    return shape[0], shape[1], math.prod(shape[2:])


def _ranks(size: Tensor) -> Tensor:
    """Ranks along dimension 1 of a (rows, width, depth) tensor, from 0 to 1, in float32."""
    order = size.argsort(dim=1, stable=True)
    places = torch.arange(size.shape[1], dtype=torch.float32, device=size.device)
    ranks = torch.empty_like(size).scatter_(1, order, places.view(1, -1, 1).expand_as(size))
    return ranks.div_(max(1, size.shape[1] - 1)).clamp_(0, 1)


def _delta(source: Tensor, base: Tensor) -> _Values:
    return lambda part: source[part].to(torch.float32) - base[part].to(torch.float32)


def _finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError("holds NaN or infinite values")


def _keys(values: Tensor) -> Tensor:
    """int32 keys that order like the magnitudes of float32 values."""
    return values.view(torch.int32).bitwise_and(0x7FFFFFFF)


def _upper_counts(values: _Values, like: Tensor) -> Tensor:
    counts = torch.zeros(_BINS, dtype=torch.int64, device=like.device)
    for part in kernels.chunks(like.numel()):
        counts += torch.bincount(_keys(values(part)) >> 16, minlength=_BINS)
    if bool(counts[_INFINITE:].any()):
        raise CheckpointError("holds NaN or infinite values")
    return counts.cpu()


def _cut(values: _Values, like: Tensor, counts: Tensor, kept: int) -> Cut:
    """The cut that keeps the `kept` largest."""
    if kept <= 0:
        return NOTHING
    upper, rest = _descend(counts, min(kept, like.numel()))
    lower_counts = torch.zeros(1 << 16, dtype=torch.int64, device=like.device)
    for part in kernels.chunks(like.numel()):
        keys = _keys(values(part))
        inside = keys[(keys >> 16) == upper]
        if inside.numel():
            lower_counts += torch.bincount(inside & 0xFFFF, minlength=1 << 16)
    lower, rest = _descend(lower_counts.cpu(), rest)
    key = upper << 16 | lower
    magnitude = float(torch.tensor(key, dtype=torch.int32).view(torch.float32))
    for part in kernels.chunks(like.numel()):
        equal = _keys(values(part)) == key
        here = int(torch.count_nonzero(equal))
        if here >= rest:
            return magnitude, part.start + int(equal.nonzero()[rest - 1])
        rest -= here
    raise AssertionError("a histogram counts what is there")


def _descend(counts: Tensor, rank: int) -> tuple[int, int]:
    """Bin of the rank-th largest element (from 1), and its rank within that bin."""
    from_above = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(from_above, rank))
    found = len(counts) - 1 - at
    return found, rank - (int(from_above[at - 1]) if at else 0)
