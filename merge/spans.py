"""Methods whose result lies in the span of the models: functions of a few inner products.

The angles and norms that slerp and its kin work with are functions of the Gram matrix of the tensors. So it
is computed once per tensor, the method runs in float64 on coefficients, and a merge is one weighted sum,
however many iterations it takes. Semantics (thresholds, fallbacks) are those of mergekit 0.1.5, which works
on the tensors themselves, in float32; where that leaves only rounding noise, what is done instead is said at
the function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.errors import CheckpointError, RecipeError
from shoal.merge.chunks import CHUNK, LANES, chunks, in_order

Gram = npt.NDArray[np.float64]
Coefficients = tuple[float, ...]
_Vector = list[float]  # Python's floats: numpy's products and cosines differ between machines
_BLOCKS = 4  # blocks at once on a GPU
# float32's rounding of a unit vector: what is shorter has no direction in mergekit either
_NOISE = 1e-7


def gram(tensors: Sequence[Tensor], base: Tensor | None = None) -> Gram:
    """(n, n) inner products of n flat tensors of any float dtypes, or of their differences to `base`.

    Differences, products and sums are float64, none of them fused. In each block of CHUNK elements lane j
    adds the elements j, j + LANES, j + 2 LANES, ... in order; the lanes are added by halving, the blocks in
    order: the same bits with any number of threads, on any machine and device. Memory: a few MB, on a GPU
    some hundreds. CheckpointError where an element is no finite number.
    """
    count, length, device = len(tensors), tensors[0].numel(), tensors[0].device
    totals = np.zeros(count * (count + 1) // 2)
    if device.type == "cpu":
        found: Iterator[Tensor] = in_order(
            lambda block: _halved(_lane_by_lane(tensors, base, block)), list(chunks(length)), device
        )
    else:
        found = (_halved(_at_once(tensors, base, some)) for some in chunks(length, _BLOCKS * CHUNK))
    for sums in found:
        for block in sums.cpu().numpy().T:
            totals += block
    if not np.isfinite(totals).all():
        raise CheckpointError("holds NaN or infinite values")
    inner = np.zeros((count, count))
    inner[np.triu_indices(count)] = totals
    return inner + np.triu(inner, 1).T


def slerp(inner: Gram, t: float) -> Coefficients:
    """Coefficients of base and source on the great circle; a straight line where |cosine| > 0.9995.

    Shoemake 1985, section 3.3. Norms up to 1e-8 count as 1.
    """
    length = [x if x > 1e-8 else 1.0 for x in _norms(inner)]
    cosine = _clamp(float(inner[0, 1]) / length[0] / length[1])
    return (1.0 - t, t) if abs(cosine) > 0.9995 else _arc(math.acos(cosine), t)


def nuslerp(inner: Gram, weight0: float, weight1: float) -> Coefficients:
    """Coefficients of two tensors (or deltas) for `nuslerp_flatten: true`.

    t is weight1's share of the weights, 0.5 where they sum to 0. A straight line where the cosine, rounded to
    float32 as mergekit's is, leaves no angle.
    """
    total = weight0 + weight1
    t = 0.5 if abs(total) < 1e-6 else weight1 / total
    length = [max(x, 1e-7) for x in _norms(inner)]
    cosine = _clamp(float(inner[0, 1]) / length[0] / length[1])
    rounded = float(np.float32(cosine))
    return (1.0 - t, t) if 1.0 - rounded * rounded <= 1e-8**2 else _arc(math.acos(cosine), t)


def multislerp(inner: Gram, weights: Sequence[float], normalize_weights: bool, eps: float) -> Coefficients:
    """Coefficients of two or more tensors (or deltas): by the tangent space at their weighted mean.

    For one source mergekit gives the source itself, with or without a base: that is the caller's to do.
    Where the tensors cancel each other, up to float32's rounding of a unit vector, two are merged on a
    straight line, and more are a RecipeError.
    """
    share = list(weights)
    if normalize_weights:
        total = math.fsum(weights)
        if total == 0:
            raise RecipeError(
                f"multislerp: weights {share} sum to 0; set normalize_weights: false or other weights"
            )
        share = [w / total for w in weights]
    norms = _norms(inner)
    scale = [1.0 / (norm + eps) for norm in norms]
    units = _scaled(inner, scale)
    size = _length(share, units)
    if size < max(eps, _NOISE * math.fsum(map(abs, share))):
        if len(share) == 2:
            return tuple(share)
        raise RecipeError(
            f"multislerp: with weights {list(weights)} the models cancel each other; choose other weights"
        )
    mean = [w / size for w in share]
    along = math.fsum(w * dot for w, dot in zip(share, _times(units, mean), strict=True))
    tangent = [w - along * m for w, m in zip(share, mean, strict=True)]
    angle = _length(tangent, units) + eps
    radius = math.fsum(w * norm for w, norm in zip(share, norms, strict=True))
    forth, aside = radius * math.cos(angle), radius * math.sin(angle) / angle
    return tuple((forth * m + aside * d) * s for m, d, s in zip(mean, tangent, scale, strict=True))


def karcher(inner: Gram, max_iter: int, tol: float) -> Coefficients:
    """Coefficients of the Karcher mean of the directions, with the mean of the norms. arXiv:2603.04972.

    Tensors with norms up to `tol` have no direction, but count in the mean of the norms. The iteration starts
    at the mean (where that is shorter than `tol`, at the first tensor) and stops as soon as the step is
    shorter than `tol`.
    """
    norms = _norms(inner)
    valid = [norm > tol for norm in norms]
    if not any(valid):
        return (0.0,) * len(norms)
    scale = [1.0 / norm if ok else 0.0 for norm, ok in zip(norms, valid, strict=True)]
    units = _scaled(inner, scale)
    alphas = [ok / sum(valid) for ok in valid]
    size = _length(alphas, units)
    mean = [alpha / size for alpha in alphas] if size >= tol else _one(len(norms), valid.index(True))
    for _ in range(max_iter):
        dots = [_clamp(dot) for dot in _times(units, mean)]
        pulls = [alpha * _stretch(dot, tol) for alpha, dot in zip(alphas, dots, strict=True)]
        along = math.fsum(pull * dot for pull, dot in zip(pulls, dots, strict=True))
        tangent = [pull - along * m for pull, m in zip(pulls, mean, strict=True)]
        step = _length(tangent, units)
        if step < tol:
            break
        mean = [math.cos(step) * m + math.sin(step) / step * d for m, d in zip(mean, tangent, strict=True)]
        size = _length(mean, units)
        mean = [m / size for m in mean] if size > tol else mean
    radius = math.fsum(norms) / len(norms)
    return tuple(radius * m * s for m, s in zip(mean, scale, strict=True))


def model_stock(inner: Gram) -> Coefficients:
    """Coefficients of the deltas for `filter_wise: false`: all t / n. arXiv:2403.19522, eq. 5.

    t is a function of the mean cosine, 0 where its denominator is. Products of norms count as 1e-6 at least.
    """
    norms = _norms(inner)
    count = len(norms)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    cosines = [_clamp(float(inner[i, j]) / max(norms[i] * norms[j], 1e-6)) for i, j in pairs]
    cosine = math.fsum(cosines) / len(cosines)
    denominator = 1.0 + (count - 1) * cosine
    t = 0.0 if abs(denominator) < 1e-6 else count * cosine / denominator
    return (t / count,) * count


def _lane_by_lane(tensors: Sequence[Tensor], base: Tensor | None, block: slice) -> Tensor:
    """(pairs, 1, lanes) sums of one block, row by row of LANES elements.

    Such rows stay in cache, and torch works on them in the calling thread: its own threads would wait for
    each other after every row.
    """
    count, width = len(tensors), min(LANES, block.stop - block.start)
    sums = torch.zeros(count * (count + 1) // 2, 1, width, dtype=torch.float64)
    lanes = list(sums[:, 0])
    buffers = list(torch.empty(count + 2, width, dtype=torch.float64))
    for start in range(block.start, block.stop, LANES):
        part = slice(start, min(start + LANES, block.stop))
        if part.stop - start < width:
            lanes, buffers = ([x[: part.stop - start] for x in some] for some in (lanes, buffers))
        *rows, origin, product = buffers
        if base is not None:
            origin.copy_(base[part])
        for row, tensor in zip(rows, tensors, strict=True):
            row.copy_(tensor[part])
            if base is not None:
                row.sub_(origin)
        pairs = ((rows[i], rows[j]) for i in range(count) for j in range(i, count))
        for lane, (a, b) in zip(lanes, pairs, strict=True):
            lane.add_(torch.mul(a, b, out=product))
    return sums


def _at_once(tensors: Sequence[Tensor], base: Tensor | None, some: slice) -> Tensor:
    """(pairs, blocks, lanes) sums of some blocks, in a few operations: what is `_lane_by_lane` on a GPU."""
    count, length = len(tensors), some.stop - some.start
    blocks = -(-length // CHUNK)
    size = blocks * CHUNK if blocks > 1 else length  # a lone block may be short
    rows = -(-min(size, CHUNK) // LANES)
    width = min(LANES, size)
    wide = torch.zeros(count, blocks * rows * width, dtype=torch.float64, device=tensors[0].device)
    for x, tensor in zip(wide, tensors, strict=True):
        x[:length] = tensor[some]
    if base is not None:
        wide[:, :length] -= base[some].to(torch.float64)
    sums = []
    for i in range(count):
        products = (wide[i:] * wide[i]).view(count - i, blocks, rows, width)
        lanes = products[:, :, 0].clone()
        for row in range(1, rows):
            lanes.add_(products[:, :, row])
        sums.append(lanes)
    return torch.cat(sums)


def _halved(lanes: Tensor) -> Tensor:
    """(pairs, blocks, lanes) -> (pairs, blocks): their sums by halving, lanes padded to a power of two."""
    width = 1 << max(0, lanes.shape[2] - 1).bit_length()
    if width > lanes.shape[2]:
        lanes = torch.nn.functional.pad(lanes, (0, width - lanes.shape[2]))
    while width > 1:
        width //= 2
        lanes[..., :width].add_(lanes[..., width : 2 * width])
    return lanes[..., 0].clone()  # a view would keep all lanes in memory


def _arc(angle: float, t: float) -> Coefficients:
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _stretch(cosine: float, tol: float) -> float:
    """angle / sin(angle): a step towards a direction, over its projection; 0 for no step at all."""
    angle = math.acos(cosine)
    # exactly opposite directions give no direction to go, in mergekit too
    return 0.0 if angle < tol or math.sin(angle) < _NOISE else angle / math.sin(angle)


def _clamp(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))


def _norms(inner: Gram) -> _Vector:
    return [math.sqrt(x) for x in inner.diagonal().tolist()]


def _scaled(inner: Gram, scale: _Vector) -> list[_Vector]:
    """Inner products of the tensors after each is multiplied by its scale."""
    return [
        [x * a * b for x, b in zip(row, scale, strict=True)]
        for row, a in zip(inner.tolist(), scale, strict=True)
    ]


def _times(inner: list[_Vector], coefficients: _Vector) -> _Vector:
    """Inner product of each tensor with the one that has these coefficients."""
    return [math.fsum(x * c for x, c in zip(row, coefficients, strict=True)) for row in inner]


def _length(coefficients: _Vector, inner: list[_Vector]) -> float:
    """Norm of the tensor that has these coefficients."""
    dots = _times(inner, coefficients)
    return math.sqrt(max(0.0, math.fsum(c * d for c, d in zip(coefficients, dots, strict=True))))


def _one(count: int, index: int) -> _Vector:
    return [float(i == index) for i in range(count)]
