"""One tensor of one plan: from the parents' stored tensors to merged values, chunk by chunk.

`TensorMerger` keeps what does not depend on the weights (TIES thresholds, DARE rescale factors and masks), because a
search asks for the same tensors thousands of times with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.merge import kernels
from shoal.merge.methods import Resolved

_Key = tuple[str, int, int | None, int, str, str, str]
_Keep = Callable[[slice, Tensor], Tensor]


@dataclass(frozen=True)
class TensorMerger:
    """Merges single tensors and remembers their thresholds.

    mask_bytes: how much memory DARE masks may take (1 byte per element, parent and density); beyond it they are
    drawn again for every merge, with the same result.
    """

    mask_bytes: int = 1 << 30
    # one entry per (kind of mask, seed, base, model, its tensor, output tensor, device), for the density used last
    _thresholds: dict[_Key, tuple[float, tuple[float, int]]] = field(default_factory=dict, repr=False)
    _scales: dict[_Key, tuple[float, float]] = field(default_factory=dict, repr=False)
    _cosines: dict[_Key, float] = field(default_factory=dict, repr=False)
    _masks: dict[_Key, tuple[float, Tensor]] = field(default_factory=dict, repr=False)

    def merge(
        self,
        method: str,
        name: str,
        base: Tensor | None,
        sources: Sequence[Tensor],
        origins: Sequence[tuple[int, str]],
        base_model: int | None,
        parameters: Resolved,
        out: Tensor,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the merge of flat tensors into flat `out`, rounded to `dtype` (default: out's), then to out's dtype.

        name: of the output tensor. origins, base_model: model and tensor of each source, and the base's model; they
        are the keys of what is remembered.
        """
        if not out.dtype.is_floating_point:
            out.copy_(sources[0] if base is None else base)  # counters, masks: nothing to interpolate
            return
        shared, per_source = parameters.shared, parameters.per_source
        weights = [p["weight"] for p in per_source if "weight" in p]
        sparse = (
            []
            if base is None
            else self._sparse(method, name, base, sources, origins, base_model, parameters, seed)
        )
        if method == "slerp":
            assert base is not None
            key = ("slerp", 0, base_model, *origins[0], name, str(base.device))
            if key not in self._cosines:
                self._cosines[key] = kernels.cosine(base, sources[0])
            weights = list(kernels.slerp_coefficients(self._cosines[key], float(shared["t"])))
        for part in kernels.steps(out):
            xs = [s[part].to(torch.float32) for s in sources]
            if method == "linear":
                merged = kernels.linear(xs, weights, shared)
            else:
                assert base is not None
                origin = base[part].to(torch.float32)
                if method == "slerp":
                    merged = kernels.linear([origin, *xs], weights, {"normalize": False})
                else:
                    deltas = [x - origin for x in xs]
                    for delta, (keep, scale) in zip(deltas, sparse, strict=False):
                        if keep is not None:
                            delta.mul_(keep(part, delta))
                            if scale != 1.0:
                                delta.mul_(scale)
                    elect = method in ("ties", "dare_ties")
                    kernel = kernels.elect_signs if elect else kernels.task_arithmetic
                    merged = kernel(origin, deltas, weights, shared)
            out[part] = merged if dtype is None else merged.to(dtype)

    def _sparse(
        self,
        method: str,
        name: str,
        base: Tensor,
        sources: Sequence[Tensor],
        origins: Sequence[tuple[int, str]],
        base_model: int | None,
        parameters: Resolved,
        seed: int,
    ) -> list[tuple[_Keep | None, float]]:
        """For each source: which elements of its delta are kept (None: all), and the factor after that."""
        if method not in ("ties", "dare_linear", "dare_ties"):
            return []
        result: list[tuple[_Keep | None, float]] = []
        for source, origin, values in zip(sources, origins, parameters.per_source, strict=True):
            density = values["density"]
            if density >= 1 or source.numel() == 0:
                result.append((None, 1.0))
                continue
            if density <= 0:
                result.append((lambda part, delta: torch.zeros_like(delta, dtype=torch.bool), 1.0))
                continue
            # dare_linear and dare_ties draw the same masks
            kind = "ties" if method == "ties" else "dare"
            key = (kind, seed, base_model, *origin, name, str(base.device))
            if method == "ties":
                keep = self._top(key, base, source, density)
            else:
                keep = self._random(key, source, density)
            scale = 1.0
            if parameters.shared["rescale"]:
                known, scale = self._scales.get(key, (-1.0, 1.0))
                if known != density:
                    scale = kernels.l1_ratio(_delta(source, base), keep)
                    self._scales[key] = density, scale
            result.append((keep, scale))
        return result

    def _top(self, key: _Key, base: Tensor, source: Tensor, density: float) -> _Keep:
        known, threshold = self._thresholds.get(key, (-1.0, (0.0, 0)))
        if known != density:
            threshold = kernels.top_magnitudes(_delta(source, base), density)
            self._thresholds[key] = density, threshold
        return lambda part, delta: kernels.keep_top(delta, part.start, threshold)

    def _random(self, key: _Key, source: Tensor, density: float) -> _Keep:
        _, seed, _, model, _, name, _ = key
        stream = kernels.mask_key(seed, model, name)

        def draw(part: slice) -> Tensor:
            return kernels.keep_random(stream, part.start, part.stop - part.start, density, source.device)

        known, mask = self._masks.get(key, (-1.0, None))
        if known != density or mask is None:
            self._masks.pop(key, None)
            if sum(m.numel() for _, m in self._masks.values()) + source.numel() > self.mask_bytes:
                return lambda part, delta: draw(part)
            mask = torch.empty(source.numel(), dtype=torch.bool, device=source.device)
            for part in kernels.steps(source):
                mask[part] = draw(part)
            self._masks[key] = density, mask
        whole = mask
        return lambda part, delta: whole[part]


def _delta(source: Tensor, base: Tensor) -> Tensor:
    return source.to(torch.float32) - base.to(torch.float32)
