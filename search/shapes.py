"""Shapes of a search space: how a few genes become one value per layer.

Every shape is linear, value = matrix @ genes, so that decoding needs no clamp, and encoding is a
least-squares solve. DESIGN, "search/", "Shapes of a space".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from shoal.errors import RecipeError, nearest

Shape = Literal["uniform", "blocks", "layers", "curve"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Basis:
    """How k genes make the values of L layers.

    matrix: [L, k]. outside: [k], the value of what lies in no layer, which is the mean over the layers.
    labels: of the k genes. order: k numbers, 0 for a value itself, j for the j-th cosine of a curve.
    """

    matrix: Floats
    outside: Floats
    labels: tuple[str, ...]
    order: tuple[int, ...]


def layer_basis(shape: Shape, layers: int, *, blocks: int, coefficients: int) -> Basis:
    """The basis of `shape` over `layers` layers; RecipeError where the shape needs more layers."""
    if shape not in SHAPES:
        raise RecipeError(f"space.shape: unknown shape {shape!r}; {nearest(shape, SHAPES)}")
    if shape == "uniform":
        return Basis(np.ones((layers, 1)), np.ones(1), ("",), (0,))
    if layers == 0:
        raise RecipeError(f"space.shape: {shape!r} needs a model with layers, found none; use 'uniform'")
    if shape == "curve":
        return _curve(layers, coefficients)
    return _blocks(layers, layers if shape == "layers" else blocks)


def _curve(layers: int, coefficients: int) -> Basis:
    """lambda(z) = s + sum over k of c_k cos(pi k z), at the layer centres z = (l + 1/2) / L."""
    if not 1 <= coefficients <= layers:
        raise RecipeError(f"space.coefficients: expected 1 to {layers} (the layers), found {coefficients}")
    matrix = np.array(
        [[math.cos(math.pi * k * (i + 0.5) / layers) for k in range(coefficients)] for i in range(layers)]
    )
    # at the layer centres every cosine has mean zero, so s alone is the mean over the layers
    outside = np.eye(coefficients)[0]
    labels = ("s", *(f"c{k}" for k in range(1, coefficients)))
    return Basis(matrix, outside, labels, tuple(range(coefficients)))


def _blocks(layers: int, blocks: int) -> Basis:
    """Contiguous blocks of near equal size; k blocks nest in every multiple of k, and in the layers."""
    if not 1 <= blocks <= layers:
        raise RecipeError(f"space.blocks: expected 1 to {layers} (the layers), found {blocks}")
    edges = [i * layers // blocks for i in range(blocks + 1)]
    matrix = np.zeros((layers, blocks))
    labels = []
    for i, (start, stop) in enumerate(pairwise(edges)):
        matrix[start:stop, i] = 1.0
        labels.append(f"layer{start}" if stop == start + 1 else f"layers{start}-{stop - 1}")
    # the mean over layers, not over blocks: so a lift from blocks to layers is exact where sizes differ
    sizes = np.diff(edges)
    return Basis(matrix, sizes / layers, tuple(labels), (0,) * blocks)
