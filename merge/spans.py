"""Methods whose result lies in the span of the models: what they do to whole tensors, they do to a few inner products.

The angles and norms that slerp and its kin work with are functions of the Gram matrix of the tensors. So it is computed once per
tensor, the method runs in float64 on coefficients, and a merge is one weighted sum, however many iterations it takes.
Semantics (thresholds, fallbacks) are those of mergekit 0.1.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.errors import RecipeError
from shoal.merge.chunks import LANES, Lanes, chunks

Gram = npt.NDArray[np.float64]
Coefficients = tuple[float, ...]


def gram(tensors: Sequence[Tensor], base: Tensor | None = None) -> Gram:
    """(n, n) inner products of n flat tensors of any dtype, or of their differences to `base`.

    Products and sums are float64 in a fixed order: the same bits with any number of threads. Reads in chunks.
    """
    count = len(tensors)
    pairs = {(i, j): Lanes(tensors[0].device) for i in range(count) for j in range(i, count)}
    for part in chunks(tensors[0].numel(), LANES):  # small enough to stay in cache
        xs = [t[part].to(torch.float64) for t in tensors]
        if base is not None:
            origin = base[part].to(torch.float64)
            xs = [x.sub_(origin) for x in xs]
        for (i, j), lanes in pairs.items():
            lanes.add(xs[i] * xs[j])
    found = np.zeros((count, count))
    for (i, j), lanes in pairs.items():
        found[i, j] = found[j, i] = lanes.total()
    return found


def slerp(inner: Gram, t: float) -> Coefficients:
    """Coefficients of base and source on the great circle; a straight line where they are nearly parallel (0.9995)."""
    length = [x if x > 1e-8 else 1.0 for x in np.sqrt(np.diag(inner))]
    cosine = max(-1.0, min(1.0, float(inner[0, 1]) / length[0] / length[1]))
    if abs(cosine) > 0.9995:
        return 1.0 - t, t
    return _arc(math.acos(cosine), t)


def nuslerp(inner: Gram, weight0: float, weight1: float) -> Coefficients:
    """Coefficients of two tensors (or deltas) for `nuslerp_flatten: true`; t is weight1's share, 0.5 where the sum is 0."""
    total = weight0 + weight1
    t = 0.5 if abs(total) < 1e-6 else weight1 / total
    length = [max(float(x), 1e-7) for x in np.sqrt(np.diag(inner))]
    cosine = max(-1.0, min(1.0, float(inner[0, 1]) / length[0] / length[1]))
    if 1.0 - cosine * cosine <= 1e-16:
        return 1.0 - t, t
    return _arc(math.acos(cosine), t)


def multislerp(inner: Gram, weights: Sequence[float], normalize_weights: bool, eps: float) -> Coefficients:
    """Coefficients of two or more tensors (or deltas): from the tangent space at their weighted mean back to the sphere.

    RecipeError where more than two tensors cancel each other.
    """
    w = np.array(weights, dtype=np.float64)
    if normalize_weights:
        if w.sum() == 0:
            raise RecipeError(f"multislerp: weights {list(weights)} sum to 0; set normalize_weights: false")
        w = w / w.sum()
    norms = np.sqrt(np.diag(inner))
    unit = 1.0 / (norms + eps)
    cosines = inner * unit[:, None] * unit[None, :]
    mean_norm = _norm(w, cosines)
    if mean_norm < eps:
        if len(w) == 2:
            return tuple(w)
        raise RecipeError(f"multislerp: with weights {list(weights)} the models cancel; choose other weights")
    mean = w / mean_norm
    dots = cosines @ mean
    # sum w_i (u_i - dot_i mean)
    tangent = w - float(w @ dots) * mean
    length = _norm(tangent, cosines) + eps
    result = mean * math.cos(length) + tangent * (math.sin(length) / length)
    return tuple(result * float(norms @ w) * unit)


def karcher(inner: Gram, max_iter: int, tol: float) -> Coefficients:
    """Coefficients of the Riemannian (Karcher) mean of the directions, with the mean of the norms. arXiv:2603.04972."""
    count = len(inner)
    norms = np.sqrt(np.diag(inner))
    valid = norms > tol
    if not valid.any():
        return (0.0,) * count
    unit = np.where(valid, 1.0 / np.where(valid, norms, 1.0), 0.0)
    cosines = inner * unit[:, None] * unit[None, :]
    alphas = valid / valid.sum()
    first = np.eye(count)[int(np.argmax(valid))]
    size = _norm(alphas, cosines)
    mean = first if size < tol else alphas / size
    for _ in range(max_iter):
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(dots)
        pulls = np.where(
            valid & (angles >= tol), alphas * angles / np.sin(np.where(angles >= tol, angles, 1.0)), 0.0
        )
        tangent = pulls - float(pulls @ dots) * mean
        length = _norm(tangent, cosines)
        if length < tol:
            break
        mean = math.cos(length) * mean + (math.sin(length) / length) * tangent
        size = _norm(mean, cosines)
        mean = mean / size if size > tol else mean
    return tuple(mean * unit * float(norms.mean()))


def model_stock(inner: Gram) -> Coefficients:
    """Coefficients of the deltas for `filter_wise: false`: all t / n, t from the mean angle. arXiv:2403.19522, eq. 5."""
    count = len(inner)
    norms = np.sqrt(np.diag(inner))
    cosines = [
        max(-1.0, min(1.0, float(inner[i, j]) / max(float(norms[i] * norms[j]), 1e-6)))
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = sum(cosines) / len(cosines)
    denominator = 1.0 + (count - 1) * cosine
    t = 0.0 if abs(denominator) < 1e-6 else count * cosine / denominator
    return (t / count,) * count


def _arc(angle: float, t: float) -> Coefficients:
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _norm(coefficients: npt.NDArray[np.float64], inner: Gram) -> float:
    return math.sqrt(max(0.0, float(coefficients @ inner @ coefficients)))
