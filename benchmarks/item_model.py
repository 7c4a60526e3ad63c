"""A simulated merge: items that models answer, and what any per-layer weights are truly worth; for benchmarks/search.py.

It stands in for language models where real ones cost too much to repeat hundreds of times. Directions carry over from
it, sizes need not. What it has of the real thing:

- Each task has its own best weights. They vary smoothly over depth plus a rough part, so that no curve of a few
  coefficients contains them, and differ between tasks, so that a merge is a compromise.
- Ability falls quadratically away from them, with interactions between parents (interference), an uneven importance of
  layers, and attention apart from MLPs.
- Items follow a two-parameter model (difficulty, discrimination), and every item has a direction of its own in weight
  space, so two merges of equal ability answer different items: paired differences are noisy.
- The smooth objective is correlated with being right, no more: it has item effects and directions of its own, and its
  best weights are not quite the metric's.

The exact truth is known: item difficulties and directions are Gaussian, so the expected accuracy over all items that
there could be is a normal integral.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

from shoal.search.space import Space, make_space
from shoal.types import ParameterSpec, TensorGroup

Floats = NDArray[np.float64]

LAYERS, TYPES, PARENTS, TASKS = 24, ("attn", "mlp"), 3, 2
SIZES = {"search": 300, "select": 150, "test": 300}  # items of each role, per task
MODELS = ("base", "first", "second", "third")
FEATURES = 64
OWN_DIRECTION = 0.6  # of an item, in units of the spread of difficulties
BANDS = 4  # of layers: what item directions can tell apart in depth
ROUGH = 0.15  # standard deviation, per layer, of the best weights about their smooth course
PROXY = 0.08  # the same for the objective's best weights about the metric's


def tensor_groups() -> tuple[TensorGroup, ...]:
    return tuple(
        TensorGroup(f"layers.{i}.{kind}", i, kind, (f"{i}.{kind}",))  # type: ignore[arg-type]
        for i in range(LAYERS)
        for kind in TYPES
    )


def space_of(shape: str, *, low: float = -0.2, high: float = 1.5, **options: object) -> Space:
    """A space of shoal over the simulated model: task arithmetic of three parents on a base."""
    weight = ParameterSpec("weight", "source", low, high, default=None)
    return make_space(
        shape,
        tensor_groups(),
        MODELS,
        0,
        (1, 2, 3),
        "task_arithmetic@1",
        (weight,),
        dtype="float32",
        seed=0,
        **options,
    )  # type: ignore[arg-type]


def weights_matrix(space: Space) -> Floats:
    """[P * L * 2, N]: genome -> weights [P, L, types], as `space.decode` has them."""
    dense = np.zeros((PARENTS * LAYERS * len(TYPES), space.size))
    for slot, columns, factors in zip(space.slots, space.columns, space.factors, strict=True):
        assert slot.source is not None
        row = slot.source * LAYERS * len(TYPES) + slot.group
        np.add.at(dense[row], columns, factors)
    return dense


@dataclass(frozen=True, eq=False)
class Pool:
    """Items of one task in one role: all arrays begin with the item."""

    difficulty: Floats
    discrimination: Floats
    direction: Floats
    offset: Floats
    own: Floats

    @property
    def size(self) -> int:
        return len(self.difficulty)


class Problem:
    """Parents and tasks drawn from `number`, items from `seed`. Weights are [P * L * 2], flat; base is 0, parent i is 1
    at its own.
    """

    def __init__(self, number: int, seed: int, sizes: dict[str, int]) -> None:
        rng = np.random.default_rng([7, number])
        z = (np.arange(LAYERS) + 0.5) / LAYERS
        waves = np.stack([np.cos(np.pi * k * z) for k in range(4)])
        shape = (PARENTS, LAYERS, len(TYPES))
        self.best, self.proxy, self.form, self.top, self.slope = [], [], [], [], []
        for task in range(TASKS):
            level = rng.uniform(0.0, 0.35, PARENTS)
            level[task % PARENTS] = rng.uniform(0.6, 1.0)
            level[(task + 1) % PARENTS] = rng.uniform(-0.1, 0.5)
            best = np.empty(shape)
            for parent in range(PARENTS):
                for kind in range(len(TYPES)):
                    course = rng.normal(0, [0.12, 0.2, 0.12, 0.06])
                    best[parent, :, kind] = level[parent] + course @ waves
            best += rng.normal(0, ROUGH, shape)
            importance = np.exp(0.6 * rng.normal(size=(4, len(TYPES))).T @ waves / np.sqrt(2))
            importance /= importance.sum()
            mixing = rng.normal(size=(PARENTS, PARENTS))
            interference = mixing @ mixing.T
            scale = np.sqrt(np.diag(interference))
            interference = 0.6 * np.eye(PARENTS) + 0.4 * interference / np.outer(scale, scale)
            self.best.append(best.ravel())
            self.proxy.append((best + rng.normal(0, PROXY, (PARENTS, 1, len(TYPES)))).ravel())
            self.form.append((interference, importance.T))
            self.top.append(rng.uniform(0.2, 0.9))
            self.slope.append(rng.uniform(0.9, 1.6))
        bands = np.kron(
            np.kron(np.eye(PARENTS), np.kron(np.eye(BANDS), np.ones((1, LAYERS // BANDS)))), np.eye(2)
        )
        self.reduce = bands / (LAYERS // BANDS) / np.sqrt(2 * BANDS)  # a parent has length 1
        self.waves = [
            (rng.normal(0, 1.0, (FEATURES, len(bands))), rng.uniform(0, 2 * np.pi, FEATURES))
            for _ in range(2)
        ]
        self.pools = {
            (role, task): _pool(np.random.default_rng([8, seed, task, place]), size)
            for place, (role, size) in enumerate(sorted(sizes.items()))
            for task in range(TASKS)
        }
        parents = np.repeat(np.eye(PARENTS), LAYERS * len(TYPES), axis=1)
        self.anchors = {"base": np.zeros(parents.shape[1])}
        self.anchors |= {name: row for name, row in zip(MODELS[1:], parents, strict=True)}
        self.anchors["uniform merge"] = parents.mean(axis=0)

    def ability(self, task: int, weights: Floats, *, proxy: bool = False) -> Floats:
        """[M] of M merges, weights [M, P * L * 2]: in units of the spread of item difficulties."""
        away = (weights - (self.proxy if proxy else self.best)[task]).reshape(
            -1, PARENTS, LAYERS * len(TYPES)
        )
        interference, importance = self.form[task]
        loss = ((interference @ away) * away).sum(axis=1) @ importance.ravel()
        return np.asarray(self.top[task] - self.slope[task] * loss)

    def truth(self, weights: Floats) -> float:
        """Expected accuracy of one merge over all possible items, mean over tasks, exact."""
        spread = np.sqrt(1 + OWN_DIRECTION**2)
        return float(np.mean([ndtr(self.ability(t, weights[None])[0] / spread) for t in range(TASKS)]))

    def answers(
        self, role: str, task: int, items: NDArray[np.intp], weights: Floats
    ) -> tuple[Floats, Floats]:
        """(0/1, smooth objective in [0, 1]), both [M, items]; the same weights always answer alike."""
        pool = self.pools[role, task]
        place = weights @ self.reduce.T
        directions = []
        for frequencies, phases in self.waves:
            features = np.cos(place @ frequencies.T + phases)
            directions.append(features / np.linalg.norm(features, axis=1, keepdims=True))
        known = OWN_DIRECTION * directions[0] @ pool.direction[items].T - pool.difficulty[items]
        right = self.ability(task, weights)[:, None] + known > 0
        felt = pool.discrimination[items] * (self.ability(task, weights, proxy=True)[:, None] + known)
        own = pool.offset[items] + 0.5 * directions[1] @ pool.own[items].T
        return right.astype(np.float64), expit(1.7 * felt + own)


def _pool(rng: np.random.Generator, size: int) -> Pool:
    return Pool(
        difficulty=rng.normal(size=size),
        discrimination=np.exp(rng.normal(0, 0.3, size)),
        direction=rng.normal(size=(size, FEATURES)),
        offset=rng.normal(0, 0.7, size),
        own=rng.normal(size=(size, FEATURES)),
    )
