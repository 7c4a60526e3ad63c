"""Growing a search from a coarse to a finer space, when the coarse one brings no more.

DESIGN, "search/": Shapes of a space. Decoding is linear in the genes, so where two spaces nest the lift is an affine
map, and what CMA-ES has learnt (mean and covariance) goes through it exactly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from shoal.errors import ShoalError
from shoal.search.ask_tell import Floats, default_sigma0
from shoal.search.space import Space, lift


@dataclass(frozen=True, eq=False)
class Lift:
    """x -> matrix @ x + offset, from the genes [n] of a coarser space to those [N] of a finer one."""

    matrix: Floats
    offset: Floats

    def __call__(self, genome: ArrayLike) -> Floats:
        """The genome [N] with the plan of `genome` [n]."""
        return np.asarray(self.matrix @ np.asarray(genome, dtype=np.float64) + self.offset)


@dataclass(frozen=True, eq=False)
class Grown:
    """Where a search goes on in the finer space: x0 [N] within its bounds, covariance [N, N]; natural units.

    moved: how far bounds pushed x0 from the lifted mean, in natural units, 0.0 where the lift is exact.
    """

    x0: Floats
    covariance: Floats
    moved: float


def lift_map(coarser: Space, finer: Space) -> Lift:
    """The lift as one affine map; ShoalError, with the residual, where the spaces do not nest.

    decode(finer, lift(x)) equals decode(coarser, x) to 1e-12 for every x, in the bounds or not.
    """
    zero = np.zeros(coarser.size)
    offset = lift(coarser, finer, zero)
    columns = [lift(coarser, finer, unit) - offset for unit in np.eye(coarser.size)]
    matrix = np.array(columns).T
    # entries are 0, 1, or a basis function at a layer: rounding of the solver below its own accuracy is taken off
    matrix[np.abs(matrix) < 1e-14] = 0.0
    offset[np.abs(offset) < 1e-14] = 0.0
    return Lift(matrix, offset)


def grow(
    coarser: Space,
    finer: Space,
    mean: ArrayLike,
    covariance: ArrayLike | None = None,
    *,
    sigma0: float | None = None,
) -> Grown:
    """Mean and covariance of a search of `coarser`, carried over to `finer`.

    mean: [n], covariance: [n, n], natural units (`CMAES.mean`, `CMAES.covariance`); without a covariance (random
    search, sep-CMA-ES of other genes) the old directions start afresh as well. What the coarser space can reach keeps
    the variance that was learnt; every direction that is new gets the step of a first generation, `sigma0` of its
    range (None: `default_sigma0(N)`), without correlation to the old ones: with M = lift matrix and ranges scaled to 1,
    C = M C_old M' + sigma0^2 (1 - M M^+).

    ShoalError where the spaces do not nest or shapes are wrong.
    """
    go = lift_map(coarser, finer)
    center = np.asarray(mean, dtype=np.float64)
    if center.shape != (coarser.size,) or not np.isfinite(center).all():
        raise ShoalError(
            f"grow: expected a mean of {coarser.size} finite numbers, found shape {center.shape}"
        )
    step = default_sigma0(finer.size) if sigma0 is None else float(sigma0)
    if not 0 < step <= 1:
        raise ShoalError(f"sigma0: expected a fraction of the range in (0, 1], found {step}")
    width = finer.high - finer.low
    matrix = go.matrix / width[:, None]  # into ranges scaled to 1
    if covariance is None:
        unit = step**2 * np.eye(finer.size)
    else:
        old = np.asarray(covariance, dtype=np.float64)
        if old.shape != (coarser.size, coarser.size) or not np.isfinite(old).all():
            raise ShoalError(
                f"grow: expected a covariance [{coarser.size}, {coarser.size}], found {old.shape}"
            )
        new = np.eye(finer.size) - matrix @ np.linalg.pinv(matrix)
        unit = matrix @ old @ matrix.T + step**2 * new
    lifted = go(center)
    x0 = np.minimum(np.maximum(lifted, finer.low), finer.high)
    grown = unit * np.outer(width, width)
    return Grown(x0, (grown + grown.T) / 2, float(np.abs(x0 - lifted).max()))


def level(fitness: Iterable[float | None]) -> float:
    """What a generation brought, in units of fitness: the median over its candidates that did not fail; nan without any.

    The mean itself is not scored. The best candidates' values are: but they are the best by the same noisy scores, and
    by how much they flatter falls as the steps get smaller, so that a search that converges would seem to lose. All
    candidates are chosen by nothing; of them the median, for a few broken merges must not count as a loss. It is below
    the fitness of the mean by what the steps cost, so it also rises while a search only converges: then it goes on.
    """
    known = [value for value in fitness if value is not None and math.isfinite(value)]
    return statistics.median(known) if known else math.nan


def stalled(levels: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` generations brought nothing beyond noise.

    levels: [G], see `level`; nan for a generation that says nothing, and counts as none. True where the average of the
    last `patience` levels exceeds the average of the `patience` before them by less than the standard error of that
    difference. Averages, not the best so far: among noisy values the best is a lucky one, and a search would seem to
    stall after every stroke of luck. The noise (of items drawn anew, of few candidates) is measured by the mean square
    of successive differences over these generations (von Neumann et al. 1941, Ann. Math. Stat. 12:153), which a steady
    rise hardly enters. False before 2 * patience generations.

    ShoalError for a patience below 2, which leaves nothing to measure noise by.
    """
    if patience < 2:
        raise ShoalError(f"stalled: expected patience >= 2, found {patience}")
    known = [value for value in levels if math.isfinite(value)][-2 * patience :]
    if len(known) < 2 * patience:
        return False
    gain = math.fsum(known[patience:]) / patience - math.fsum(known[:patience]) / patience
    noise = math.fsum((b - a) ** 2 for a, b in pairwise(known)) / (2 * (len(known) - 1))
    return gain <= math.sqrt(2 * noise / patience)
