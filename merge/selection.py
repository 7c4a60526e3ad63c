"""Which elements of a delta are kept: exact order statistics of whole tensors, without sorting or copies.

A delta is `source.float() - base.float()`, made piece by piece in a reused buffer. Magnitudes are ordered by
the bits of their float32 values: one pass counts the upper 16 bits, a second the lower 16 bits in the bin of
the wanted rank. Counts are integers and every sum has a fixed order: no result depends on threads or device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.errors import CheckpointError, RecipeError
from shoal.merge.chunks import LANES, chunks, in_order, step, tree_sum
from shoal.merge.masks import keep_top, uniform_bits

Cut = tuple[float, int]  # magnitude, and the last index that is kept among its equals
NOTHING: Cut = (math.inf, -1)  # the cut that keeps no element
_UPPER_BINS = 1 << 15
_LOWER_BINS = 1 << 16
_INFINITE = 0x7F80  # upper bits of infinity; those of NaN are not smaller
_UNIFORM = 1 << 24  # uniform_bits are in [0, 2^24)
_EXACT_IN_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)

# a block -> (start, piece); the piece may be overwritten
_Read = Callable[[slice], Iterator[tuple[int, Tensor]]]
# lower bits that occur, rising, and how often
_LowerCounts = tuple[npt.NDArray[np.uint16], npt.NDArray[np.int32]]
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, eq=False)
class MagnitudeHistogram:
    """How many elements of a delta have which upper 16 bits: some 10 KB for any size, no tensor is held.

    bins: (m,) uint16, the upper bits that occur, falling. kept: (m,), the elements in it and all before.
    """

    bins: npt.NDArray[np.uint16] = field(repr=False)
    kept: npt.NDArray[Any] = field(repr=False)

    @staticmethod
    def of(source: Tensor, base: Tensor) -> MagnitudeHistogram:
        """Of flat tensors of any float dtypes, in one pass. CheckpointError where a delta is not finite."""
        return _histogram(_delta(source, base))

    def cuts(self, source: Tensor, base: Tensor, counts: Sequence[int]) -> list[Cut]:
        """For each count k the cut that keeps exactly the k largest |delta|, lowest index first among equals.

        One pass over the tensors that the histogram was made of, for all counts. k = 0 gives NOTHING.
        ValueError for k outside 0..n. TIES, arXiv:2306.01708, section 3, step 1.
        """
        return _cuts(_delta(source, base), self, counts)

    def find(self, count: int) -> tuple[int, int]:
        """(upper bits, rank within their bin) of the count-th largest element, both ranks from 1."""
        total = int(self.kept[-1]) if len(self.kept) else 0
        if not 0 < count <= total:
            raise ValueError(f"no {count} elements among {total}")
        at = int(np.searchsorted(self.kept, count))
        return int(self.bins[at]), count - (int(self.kept[at - 1]) if at else 0)


def breadcrumbs_range(
    histogram: MagnitudeHistogram, source: Tensor, base: Tensor, density: float, gamma: float
) -> tuple[Cut, Cut]:
    """(lower, upper) cut: kept is what `lower` keeps and `upper` does not, exactly int(density * n) elements.

    The int(gamma * n) largest are outliers, fewer where that would leave too few; the lowest index counts as
    the largest of equals. Model Breadcrumbs, arXiv:2312.06795, section 3.
    """
    numel = source.numel()
    kept = int(density * numel)
    smallest = max(0, numel - kept - int(gamma * numel))
    lower, upper = histogram.cuts(source, base, [numel - smallest, numel - smallest - kept])
    return lower, upper


# --- passes over tensors ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Values:
    """Float32 values, one per element, made when they are read: a piece per thread is in memory."""

    numel: int
    device: torch.device
    read: _Read

    def blocks(self, work: Callable[[slice], B]) -> Iterator[B]:
        """What `work` makes of each block of CHUNK elements, in order."""
        return in_order(work, list(chunks(self.numel)), self.device)

    def keys(self, block: slice) -> Iterator[tuple[int, Tensor]]:
        """(start, int32 keys) that order like the magnitudes."""
        return ((start, _keys(values)) for start, values in self.read(block))


def _pieces(block: slice, device: torch.device) -> Iterator[slice]:
    parts = chunks(block.stop - block.start, step(device))
    return (slice(block.start + part.start, block.start + part.stop) for part in parts)


def _buffers(block: slice, device: torch.device, dtypes: Iterable[torch.dtype]) -> list[Tensor]:
    """One buffer for a piece of the block for each dtype."""
    size = min(block.stop - block.start, step(device))
    return [torch.empty(size, dtype=dtype, device=device) for dtype in dtypes]


def _delta(source: Tensor, base: Tensor) -> _Values:
    device = source.device

    def read(block: slice) -> Iterator[tuple[int, Tensor]]:
        (buffer,) = _buffers(block, device, [torch.float32])
        for part in _pieces(block, device):
            yield part.start, _subtract(source[part], base[part], buffer[: part.stop - part.start])

    return _Values(source.numel(), device, read)


def _subtract(source: Tensor, base: Tensor, out: Tensor) -> Tensor:
    """source.float() - base.float() in the float32 tensor `out`."""
    if base.dtype not in _EXACT_IN_FLOAT32:
        base = base.to(torch.float32)  # torch would subtract float64 in float64
    if source.dtype == torch.float32:
        return torch.sub(source, base, out=out)
    return out.copy_(source).sub_(base)


def _keys(values: Tensor) -> Tensor:
    """int32 keys that order like the magnitudes of float32 values, in the memory of these."""
    return values.view(torch.int32).bitwise_and_(0x7FFFFFFF)


# --- order statistics by bits -------------------------------------------------------------------------------


def _histogram(values: _Values) -> MagnitudeHistogram:
    counts = np.zeros(_UPPER_BINS, dtype=np.int64)
    for found in values.blocks(lambda block: _upper_counts(values, block)):
        counts += found.cpu().numpy()
    if counts[_INFINITE:].any():
        raise CheckpointError("holds NaN or infinite values")
    bins = np.flatnonzero(counts)[::-1]
    kept = counts[bins].cumsum()
    return MagnitudeHistogram(bins.astype(np.uint16), kept.astype(_narrow(values.numel)))


def _narrow(numel: int) -> type[np.uint32 | np.int64]:
    return np.uint32 if numel < 1 << 32 else np.int64


def _upper_counts(values: _Values, block: slice) -> Tensor:
    """(2^15,) int32: the elements of a block by their upper bits."""
    counts = torch.zeros(_UPPER_BINS, dtype=torch.int32, device=values.device)
    for _, keys in values.keys(block):
        _count(counts, keys.bitwise_right_shift_(16))
    return counts


def _count(counts: Tensor, bins: Tensor) -> None:
    # as fast as bincount, which would need the counts of every piece to be added
    one = torch.ones(1, dtype=torch.int32, device=bins.device)
    counts.scatter_add_(0, bins.to(torch.int64), one.expand(bins.numel()))


def _cuts(values: _Values, histogram: MagnitudeHistogram, counts: Sequence[int]) -> list[Cut]:
    wanted = [histogram.find(count) if count else None for count in counts]
    bins = {found[0]: _Bin(found[0]) for found in wanted if found is not None}
    if bins:
        for parts in values.blocks(lambda block: _lower_counts(values, block, bins)):
            for each, part in zip(bins.values(), parts, strict=True):
                each.blocks.append(part)
    return [NOTHING if found is None else bins[found[0]].cut(values, found[1]) for found in wanted]


@dataclass
class _Bin:
    """The lower bits of the elements of one bin, block by block."""

    upper: int
    blocks: list[_LowerCounts] = field(default_factory=list)

    def cut(self, values: _Values, rank: int) -> Cut:
        """The cut that keeps the `rank` largest of this bin and all that is larger."""
        totals = np.zeros(_LOWER_BINS, dtype=np.int64)
        for lower, counts in self.blocks:
            totals[lower] += counts
        from_above = totals[::-1].cumsum()
        at = int(np.searchsorted(from_above, rank))
        rank -= int(from_above[at - 1]) if at else 0
        key = self.upper << 16 | (_LOWER_BINS - 1 - at)
        return float(np.int32(key).view(np.float32)), self._nth(values, key, rank)

    def _nth(self, values: _Values, key: int, rank: int) -> int:
        """Index of the rank-th element with this key, from 1."""
        for block, (lower, counts) in zip(chunks(values.numel), self.blocks, strict=True):
            here = int(counts[lower == key & (_LOWER_BINS - 1)].sum())
            if here >= rank:
                equals = [(keys == key).nonzero().reshape(-1) + start for start, keys in values.keys(block)]
                return int(torch.cat(equals)[rank - 1])
            rank -= here
        raise ValueError("the histogram is not of these tensors")


def _lower_counts(values: _Values, block: slice, uppers: Iterable[int]) -> list[_LowerCounts]:
    """Of one block, for each bin; some 10 KB for a block of 2^20 elements, at most 400 KB."""
    found = {u: torch.zeros(_LOWER_BINS, dtype=torch.int32, device=values.device) for u in uppers}
    for _, keys in values.keys(block):
        for upper, counts in found.items():
            inside = _lower_bits(keys, upper)
            if inside.numel():
                _count(counts, inside)
    return [_sparse(counts.cpu().numpy()) for counts in found.values()]


def _sparse(counts: npt.NDArray[np.int32]) -> _LowerCounts:
    at = np.flatnonzero(counts)
    return at.astype(np.uint16), counts[at]


def _lower_bits(keys: Tensor, upper: int) -> Tensor:
    if keys.device.type == "cpu":  # numpy is several times as fast at this
        array = keys.numpy()
        # take: a mask as index costs a misprediction per change from inside to outside
        return torch.from_numpy(array.take(np.flatnonzero(array >> 16 == upper)) & (_LOWER_BINS - 1))
    return keys[keys >> 16 == upper] & (_LOWER_BINS - 1)


# --- DELLA --------------------------------------------------------------------------------------------------


def della_mask(
    source: Tensor, base: Tensor, shape: tuple[int, ...], density: float, epsilon: float, stream: int
) -> Tensor:
    """Flat bool mask: kept with a probability that rises with the rank, from density - epsilon to + epsilon.

    source, base: flat tensors of any float dtypes. shape: theirs; ranked is within a whole vector, else along
    dimension 1, as in mergekit. Equals rank by their index, the lowest as the smallest. An element alone in
    its row is kept with probability `density`, where mergekit divides 0 by 0 and fails. The draws are those
    of DARE masks, so that a smaller density with the same epsilon keeps a subset. Whole rows at a time: in
    memory are the mask and, per thread, some 40 bytes for each of 2^15 elements, or of those of a longer row.
    DELLA, arXiv:2406.11617, section 3 (MagPrune). RecipeError where density +- epsilon is outside (0, 1);
    CheckpointError where the delta is not finite.
    """
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise RecipeError(
            f"della: density {density:g} +- epsilon {epsilon:g} must stay inside (0, 1);"
            " choose a smaller epsilon"
        )
    device = source.device
    mask = torch.empty(source.numel(), dtype=torch.bool, device=device)
    if not source.numel():
        return mask
    rows, width, depth = _rows(shape)
    bounds = _bounds(width, density, epsilon, device)

    def draw(some: slice) -> None:
        block = slice(some.start * width * depth, some.stop * width * depth)
        ranked = _by_rank(source[block].view(-1, width, depth), base[block].view(-1, width, depth), bounds)
        flat = ranked.view(-1)
        for part in _pieces(block, device):
            bits = uniform_bits(stream, part.start, part.stop - part.start, device)
            # both sides are exact: 24 bits, and a probability scaled by 2^24
            drawn = bits.to(torch.float32) < flat[part.start - block.start : part.stop - block.start]
            mask[part] = drawn

    height = max(1, step(device) // (width * depth))
    for _ in in_order(draw, list(chunks(rows, height)), device):
        pass
    return mask


def _rows(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape as (rows, width, depth), ranked along width."""
    if len(shape) < 2:
        return 1, math.prod(shape), 1
    return shape[0], shape[1], math.prod(shape[2:])


def _bounds(width: int, density: float, epsilon: float, device: torch.device) -> Tensor:
    """(width,) float32: 2^24 times the probability of each rank, by mergekit's float32 operations."""
    ranks = torch.arange(width, device=device).to(torch.float32) + 1
    place = ((ranks - ranks[0]) / (ranks[-1] - ranks[0])).clamp(0, 1) if width > 1 else ranks / 2
    return ((density - epsilon) + place * 2 * epsilon) * _UNIFORM


def _by_rank(source: Tensor, base: Tensor, bounds: Tensor) -> Tensor:
    """(rows, width, depth) float32: to each element the bound of its rank along width."""
    rows, width, depth = source.shape
    found = torch.empty(source.shape, dtype=torch.float32, device=source.device)
    for part in chunks(depth, max(1, step(source.device) // width)):
        columns = found[:, :, part]
        delta = _subtract(source[:, :, part], base[:, :, part], torch.empty_like(columns))
        order = _order(_keys(delta.transpose(1, 2).reshape(-1, width)))
        ranked = torch.empty(order.shape, dtype=torch.float32, device=source.device)
        ranked.scatter_(1, order, bounds.expand_as(order))
        columns.copy_(ranked.view(rows, -1, width).transpose(1, 2))
    return found


def _order(keys: Tensor) -> Tensor:
    """(rows, width) int64: the indices that sort each row of int32 keys, rising, stable."""
    if int(keys.max()) >> 16 >= _INFINITE:
        raise CheckpointError("holds NaN or infinite values")
    # key and index in one number: no two are equal, so any sort is stable; argsort takes far longer
    both = keys.to(torch.int64).bitwise_left_shift_(32)
    both.bitwise_or_(torch.arange(keys.shape[1], device=keys.device))
    if both.device.type == "cpu":
        both.numpy().sort(axis=1)
    else:
        both = both.sort(dim=1).values
    return both.bitwise_and_(0xFFFFFFFF)


# --- SCE ----------------------------------------------------------------------------------------------------


def sce(
    sources: Sequence[Tensor], base: Tensor, select_topk: float
) -> tuple[Tensor | None, tuple[float, ...]]:
    """(flat bool mask or None for all elements, weight of each source), of flat tensors of any float dtypes.

    Selected are the int(select_topk * v) elements with the largest variance across the deltas, v of which are
    not 0, lowest index first among equals; weights are the shares of the selected deltas' mean squares, equal
    ones where these sum to less than 1e-6. Keeps one byte per element. SCE, arXiv:2408.07990, section 3.
    CheckpointError where a delta or a variance is not finite.
    """
    cut = _variance_cut(sources, base, select_topk) if select_topk < 1 else None
    mask = None if cut is None else torch.empty(base.numel(), dtype=torch.bool, device=base.device)

    def select(block: slice) -> list[float]:
        sums = [torch.zeros(LANES, dtype=torch.float64, device=base.device) for _ in sources]
        for part, deltas in _deltas(sources, base, block):
            if mask is not None and cut is not None:
                mask[part] = keep_top(_variance(deltas), part.start, cut)
                kept = mask[part].to(torch.float64)
                for delta in deltas:
                    delta.mul_(kept)
            for lanes, delta in zip(sums, deltas, strict=True):
                _add_squares(lanes, delta)
        return [tree_sum(lanes) for lanes in sums]

    squares = [0.0] * len(sources)
    for found in in_order(select, list(chunks(base.numel())), base.device):
        squares = [a + b for a, b in zip(squares, found, strict=True)]
    return mask, _shares(squares, base.numel())


def _deltas(sources: Sequence[Tensor], base: Tensor, block: slice) -> Iterator[tuple[slice, list[Tensor]]]:
    """(part, the deltas' float32 values there as float64), piece by piece, in the same buffers."""
    rounded, *buffers = _buffers(block, base.device, [torch.float32] + [torch.float64] * len(sources))
    for part in _pieces(block, base.device):
        count = part.stop - part.start
        deltas = [
            buffer[:count].copy_(_subtract(source[part], base[part], rounded[:count]))
            for buffer, source in zip(buffers, sources, strict=True)
        ]
        yield part, deltas


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """Population variance at each element in float64, rounded to float32: torch.var sums in float64 too."""
    mean = deltas[0].clone()
    for delta in deltas[1:]:
        mean.add_(delta)
    mean.div_(len(deltas))
    total = (deltas[0] - mean).square_()
    for delta in deltas[1:]:
        total.add_((delta - mean).square_())
    return total.div_(len(deltas)).to(torch.float32)


def _variance_cut(sources: Sequence[Tensor], base: Tensor, share: float) -> Cut:
    nonzero: list[int] = []  # of each piece, in any order

    def read(block: slice) -> Iterator[tuple[int, Tensor]]:
        return ((part.start, _variance(deltas)) for part, deltas in _deltas(sources, base, block))

    def counted(block: slice) -> Iterator[tuple[int, Tensor]]:
        for start, values in read(block):
            nonzero.append(int(torch.count_nonzero(values)))
            yield start, values

    histogram = _histogram(_Values(base.numel(), base.device, counted))
    # mergekit truncates a tensor times a float, which is rounded to float32
    count = int(torch.tensor(sum(nonzero)) * share) if share > 0 else 0
    return _cuts(_Values(base.numel(), base.device, read), histogram, [min(count, base.numel())])[0]


def _add_squares(lanes: Tensor, values: Tensor) -> None:
    """Adds the squares to float64 partial sums, element i of a block to lane i mod 2^15, in order.

    The squares of float32 values are exact in float64, so a fused multiply-add gives the same bits.
    """
    for part in chunks(values.numel(), LANES):
        lanes[: part.stop - part.start].addcmul_(values[part], values[part])


def _shares(squares: Sequence[float], numel: int) -> tuple[float, ...]:
    """Weights from sums of squares over numel elements."""
    total = sum(squares)
    if not math.isfinite(total):
        raise CheckpointError("holds NaN or infinite values")
    if total < 1e-6 * numel or total == 0:
        return (1.0 / len(squares),) * len(squares)
    return tuple(s / total for s in squares)
