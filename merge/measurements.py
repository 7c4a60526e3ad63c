"""What a method has to know of whole tensors (angles, thresholds, norms): measured once per tensor and remembered.

A search asks for the same tensors thousands of times with other weights. All measurements are exact or in a fixed
order of float64 additions, so they are the same on every device, with any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from shoal.errors import CheckpointError, RecipeError
from shoal.merge import selection, spans
from shoal.merge.chunks import Lanes, chunks
from shoal.merge.formulas import float32_sum
from shoal.merge.keeps import Keep, KeepBetween, KeepMask, KeepNone, KeepRandom, KeepTop
from shoal.merge.masks import mask_key
from shoal.merge.methods import Resolved
from shoal.merge.terms import Terms

Origin = tuple[int, str]  # model and the name of its tensor
T = TypeVar("T")
Load = Callable[[Origin], Tensor]  # the flat tensor, on whatever device measures
_ELECT = ("ties", "dare_ties", "breadcrumbs_ties", "della")
_SPANS = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")


def depends_on_tensors(method: str, parameters: Resolved) -> bool:
    """Whether the terms of a group's tensors differ from each other."""
    return (
        method in _SPANS
        or method == "sce"
        or any("density" in p and p["density"] < 1 for p in parameters.per_source)
    )


@dataclass(frozen=True)
class Tensors:
    """One output tensor's ingredients. name: the output's. base: None for methods without one."""

    name: str
    shape: tuple[int, ...]
    base: Origin | None
    sources: tuple[Origin, ...]
    seed: int
    load: Load = field(repr=False, compare=False)


@dataclass(frozen=True)
class Measurements:
    """Gives the terms of output tensors."""

    _grams: dict[Any, np.ndarray] = field(default_factory=dict, repr=False)
    _histograms: dict[Any, selection.MagnitudeHistogram] = field(default_factory=dict, repr=False)
    # for the latest parameters only: one entry per (output, source) and per output
    _keeps: dict[Any, Keep] = field(default_factory=dict, repr=False)
    _scales: dict[Any, tuple[Any, float]] = field(default_factory=dict, repr=False)
    _sce: dict[Any, tuple[float, tuple[KeepMask | None, tuple[float, ...]]]] = field(
        default_factory=dict, repr=False
    )

    def terms(self, method: str, parameters: Resolved, tensors: Tensors) -> Terms:
        """The terms of one output tensor; RecipeError or CheckpointError where there are none."""
        if method in _SPANS:
            return self._in_span(method, parameters, tensors)
        if method == "sce":
            return self._selected(parameters, tensors)
        shared = parameters.shared
        weights = tuple(p["scale" if method == "passthrough" else "weight"] for p in parameters.per_source)
        if method in ("linear", "passthrough"):
            divisor = None
            if shared.get("normalize"):
                divisor = float32_sum(weights)
                if divisor == 0:
                    raise RecipeError(
                        f"linear: weights {list(weights)} sum to 0; set normalize: false or other weights"
                    )
            return Terms("linear", weights, divisor=None if divisor == 1 else divisor)
        factor = None if shared["lambda"] == 1 else float(shared["lambda"])
        divide = bool(shared["normalize"])
        if method in _ELECT:
            terms = Terms("elect_signs", weights, divide=divide, factor=factor)
        else:
            divisor = float32_sum(weights) if divide else 1.0
            divisor = 1.0 if abs(divisor) < 1e-8 else divisor
            terms = Terms(
                "task_arithmetic", weights, divisor=None if divisor == 1 else divisor, factor=factor
            )
        if not depends_on_tensors(method, parameters):
            return terms
        keeps = tuple(
            self._keep(method, i, values, tensors) for i, values in enumerate(parameters.per_source)
        )
        scales: tuple[float, ...] = ()
        if shared["rescale"]:
            scales = tuple(self._scale(i, keep, tensors) for i, keep in enumerate(keeps))
        return replace(terms, keeps=keeps, scales=scales if any(s != 1 for s in scales) else ())

    # --- methods whose result lies in the span of the models ---

    def _in_span(self, method: str, parameters: Resolved, tensors: Tensors) -> Terms:
        shared = parameters.shared
        weights = [p["weight"] for p in parameters.per_source if "weight" in p]
        base = tensors.base
        if method == "slerp":
            assert base is not None
            gram = self._gram(None, (base, *tensors.sources), tensors.load)
            return Terms("linear", spans.slerp(gram, float(shared["t"])), with_base=True)
        if len(tensors.sources) == 1:  # nothing to interpolate: the model itself
            return Terms("linear", (1.0,))
        gram = self._gram(base, tensors.sources, tensors.load)
        if method == "nuslerp":
            found = spans.nuslerp(gram, *weights)
        elif method == "multislerp":
            found = spans.multislerp(gram, weights, bool(shared["normalize_weights"]), float(shared["eps"]))
        elif method == "karcher":
            found = spans.karcher(gram, int(shared["max_iter"]), float(shared["tol"]))
        else:
            found = spans.model_stock(gram)
        return Terms("linear" if base is None else "task_arithmetic", found)

    def _gram(self, base: Origin | None, sources: tuple[Origin, ...], load: Load) -> np.ndarray:
        key = base, sources
        if key not in self._grams:
            tensors = [load(s) for s in sources]
            origin = None if base is None else load(base)
            self._grams[key] = _told(sources[-1], lambda: spans.gram(tensors, origin))
        return self._grams[key]

    # --- sparse deltas ---

    def _keep(self, method: str, index: int, values: Any, tensors: Tensors) -> Keep | None:
        """Which elements of the delta of source `index` stay."""
        density = values["density"]
        origin, base, seed = tensors.sources[index], tensors.base, tensors.seed
        numel = int(np.prod(tensors.shape))
        if density >= 1 or numel == 0:
            return None
        if density <= 0:
            return KeepNone()
        if method == "ties":
            key: tuple[Any, ...] = ("top", density)
        elif method in ("dare_linear", "dare_ties"):
            key = ("random", seed, density)
        elif method in ("breadcrumbs", "breadcrumbs_ties"):
            key = ("between", density, values["gamma"])
        else:
            key = ("della", seed, density, values["epsilon"])
        place = tensors.name, base, origin
        known = self._keeps.get((place, key[0]))
        if known is not None and known.key == key:
            return known
        found = self._new_keep(key, index, tensors, numel)
        self._keeps[place, key[0]] = found
        return found

    def _new_keep(self, key: tuple[Any, ...], index: int, tensors: Tensors, numel: int) -> Keep:
        origin, base, load, shape = tensors.sources[index], tensors.base, tensors.load, tensors.shape
        assert base is not None
        stream = mask_key(tensors.seed, origin[0], tensors.name)
        if key[0] == "random":
            return KeepRandom(key, stream, key[2])
        if key[0] == "della":
            return KeepMask(
                key,
                lambda: _told(
                    origin,
                    lambda: selection.della_mask(load(origin), load(base), shape, key[2], key[3], stream),
                ),
            )

        def cuts() -> Keep:
            source, root = load(origin), load(base)
            histogram = self._histogram(base, origin, source, root)
            if key[0] == "top":
                count = max(1, int(key[1] * numel))
                return KeepTop(key, histogram.cuts(source, root, [count])[0])
            return KeepBetween(key, *selection.breadcrumbs_range(histogram, source, root, key[1], key[2]))

        return _told(origin, cuts)

    def _histogram(
        self, base: Origin, origin: Origin, source: Tensor, root: Tensor
    ) -> selection.MagnitudeHistogram:
        key = base, origin
        if key not in self._histograms:
            self._histograms[key] = selection.MagnitudeHistogram.of(source, root)
        return self._histograms[key]

    def _scale(self, index: int, keep: Keep | None, tensors: Tensors) -> float:
        """||delta||_1 / ||kept part of delta||_1: the factor of mergekit's `rescale`."""
        if keep is None:
            return 1.0
        place = tensors.name, tensors.base, tensors.sources[index], keep.key[0]
        known = self._scales.get(place)
        if known is None or known[0] != keep.key:
            assert tensors.base is not None
            ratio = l1_ratio(tensors.load(tensors.sources[index]), tensors.load(tensors.base), keep)
            known = keep.key, ratio
            self._scales[place] = known
        return known[1]

    # --- SCE ---

    def _selected(self, parameters: Resolved, tensors: Tensors) -> Terms:
        topk = float(parameters.shared["select_topk"])
        place = tensors.base, tensors.sources
        known = self._sce.get(place)
        if known is None or known[0] != topk:
            mask, weights = self._sce_mask(topk, tensors)
            keep = None
            if mask is not None:
                key = ("sce", topk, tensors.sources)  # the selection is of all of them together
                keep = KeepMask(key, lambda: self._sce_mask(topk, tensors)[0], mask)
            known = topk, (keep, tuple(weights))
            self._sce[place] = known
        keep, found = known[1]
        return Terms("select_calculate_erase", found, keeps=() if keep is None else (keep,) * len(found))

    def _sce_mask(self, topk: float, tensors: Tensors) -> tuple[Tensor | None, Sequence[float]]:
        base, load = tensors.base, tensors.load
        assert base is not None
        return _told(
            tensors.sources[0],
            lambda: selection.sce([load(s) for s in tensors.sources], load(base), topk),
        )


def _told(origin: Origin, measure: Callable[[], T]) -> T:
    """What `measure` finds; its refusals say of which tensor."""
    try:
        return measure()
    except CheckpointError as error:
        raise CheckpointError(f"tensor {origin[1]!r} of model {origin[0]} {error}") from None


def l1_ratio(source: Tensor, base: Tensor, keep: Keep) -> float:
    """||delta||_1 / ||kept part of delta||_1 of flat tensors; 1 where a norm is below 1e-7, as in mergekit."""
    before, after = Lanes(source.device), Lanes(source.device)
    for part in chunks(source.numel()):
        delta = source[part].to(torch.float32) - base[part].to(torch.float32)
        size = delta.abs().to(torch.float64)
        before.add(size)
        after.add(size.mul_(keep.mask(part.start, delta)))
    norm, kept = before.total(), after.total()
    return 1.0 if norm < 1e-7 or kept < 1e-7 else norm / kept
