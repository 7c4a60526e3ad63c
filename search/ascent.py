"""Steps along a gradient: from derivatives of an objective by a plan's coefficients to genomes that may be better.

Slopes come from one backward pass (evals/backward.py, merge/slopes.py); here they are numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from shoal.search.shapes import Floats
from shoal.search.space import Space
from shoal.types import Slope

FORWARDS = 3  # what a backward pass, with the forward pass that it needs, counts in item evaluations
STEPS = (0.025, 0.05, 0.1, 0.2, 0.4)  # tried in this order: root mean square over genes, of their ranges
MOST = 1 + FORWARDS + len(STEPS)  # item evaluations per item of a gradient start, where every step is tried


def genes_gradient(
    space: Space, slopes: Mapping[str, Sequence[Slope]], shares: Mapping[str, float]
) -> Floats:
    """The gradient [genes] of the weighted sum over tasks, natural units: the transpose of the space's decode.

    slopes: task -> derivatives with respect to the coefficients of a plan. Parameters without a slope (densities) count
    as ones that nothing depends on.
    """
    of_slot: dict[tuple[int, int | None, str], float] = {}
    for task, found in slopes.items():
        for slope in found:
            place = slope.group, slope.source, slope.parameter
            of_slot[place] = of_slot.get(place, 0.0) + shares[task] * slope.value
    values = np.array([of_slot.get((slot.group, slot.source, slot.parameter), 0.0) for slot in space.slots])
    gradient = np.zeros(space.size)
    np.add.at(gradient, space.columns, space.factors * values[:, None])
    return gradient


def stepped(space: Space, start: ArrayLike, gradient: Floats, step: float) -> Floats:
    """`start` moved along the gradient, genes measured in their ranges, by `step` (root mean square); within bounds."""
    ranges = space.high - space.low
    direction = gradient * ranges
    direction = direction / math.sqrt(float(direction @ direction)) * math.sqrt(space.size)
    moved: Floats = np.asarray(start, dtype=np.float64) + step * direction * ranges
    return np.clip(moved, space.low, space.high)
