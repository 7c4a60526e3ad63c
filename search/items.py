"""Which items a role owns and which of them a generation sees: pure functions of sha256.

No random generator of a library is used, as none promises the same stream in its next version, and the role
of an item must hold for every run and every generation of descendants. DESIGN, "search/": Roles, Items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from shoal.errors import ShoalError

SALT = "shoal-roles-1"


def role_fraction(content_hash: str, salt: str = SALT) -> float:
    """A number in [0, 1) that belongs to an item's content for ever; never to a run or its seed.

    content_hash: of the item's content, or of its cluster's where the task gives clusters.
    """
    return fraction([salt, content_hash])


def assign(hashes: Sequence[str], zones: Mapping[str, tuple[float, float]]) -> dict[str, list[int]]:
    """For each zone [low, high) of the fractions, the indices into `hashes` that fall in it.

    Indices are ordered by (fraction, index), so that the first n of a zone are a pure function as well. Zones
    may leave gaps; ShoalError where two overlap or one is not within [0, 1], for an item must not have two
    roles.
    """
    ordered = sorted(zones.items(), key=lambda zone: zone[1])
    end, before = 0.0, ""
    for name, (low, high) in ordered:
        if not 0.0 <= low <= high <= 1.0:
            raise ShoalError(f"zone {name!r}: expected 0 <= low <= high <= 1, found [{low}, {high}]")
        if low < end:
            raise ShoalError(f"zones {before!r} and {name!r} overlap: items in both would have two roles")
        end, before = high, name
    drawn = sorted((role_fraction(h), i) for i, h in enumerate(hashes))
    return {name: [i for f, i in drawn if low <= f < high] for name, (low, high) in zones.items()}


def draw(pool: Sequence[int], n: int, seed: int, generation: int, task: str) -> list[int]:
    """A fresh common subset of `pool`: n items without replacement, sorted; the whole pool where n is larger.

    Every item gets a number by (seed, generation, task, item) and the n smallest are taken: the subset
    depends neither on the order of the pool nor on the process, and a larger n contains a smaller one's.
    """
    if n < 0:
        raise ShoalError(f"draw: expected n >= 0, found {n}")
    if len(set(pool)) != len(pool):
        raise ShoalError(f"draw: the pool of task {task!r} names an item twice")
    drawn = sorted((fraction([seed, generation, task, int(item)]), int(item)) for item in pool)
    return sorted(item for _, item in drawn[:n])


def fraction(key: list[str | int]) -> float:
    """A number in [0, 1) that belongs to `key`: sha256 of it as JSON, the first 53 bits, exact in float64."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
