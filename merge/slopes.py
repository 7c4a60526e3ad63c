"""From the gradient of a loss with respect to merged weights to its derivatives with respect to merge coefficients.

For merged = constant + lambda sum_i w_i d_i, the chain rule gives dL/dw_i = lambda <dL/dmerged, d_i> and dL/dlambda =
sum_i w_i <dL/dmerged, d_i>, where d_i is the source's tensor (linear) or its delta, thinned and rescaled (task
arithmetic and its kind). Inner products are taken as gradients arrive, one runtime parameter at a time, so that no
gradient of the whole model is ever held. Rounding of the merged weights counts as no change.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.errors import CheckpointError, EvaluationError
from shoal.merge.chunks import CHUNK, STEP_GPU, chunks
from shoal.merge.keeps import keep_or_base
from shoal.merge.linearity import check_linear_plan
from shoal.merge.methods import check_plan
from shoal.merge.resident import Merger, Operands
from shoal.types import MergePlan, Slope


@dataclass
class _Part:
    """A checkpoint tensor in a runtime parameter, from its element `offset` on.

    products: float64 [sources], <gradient, d_i> so far.
    """

    operands: Operands
    offset: int
    products: Tensor


class Slopes:
    """Derivatives with respect to the weights and lambdas of `plan`, which `merger` has materialised.

    Give every gradient of a runtime parameter to `take`, as often as there are passes; they add up.

    Raises:
        RecipeError: the plan is not linear in its weights.
        CheckpointError: the runtime model has no direct map from the checkpoint.
    """

    def __init__(self, merger: Merger, plan: MergePlan) -> None:
        check_linear_plan(plan)
        if merger.model is None:
            raise CheckpointError("this Merger was made without a model; give it one from load_runtime")
        self._plan = plan
        self._device = merger.device
        parameters = sorted(merger.model.parameters(), key=Tensor.data_ptr)
        starts = [parameter.data_ptr() for parameter in parameters]
        self._parts: dict[int, list[_Part]] = {start: [] for start in starts}
        for one in merger.operands(plan):
            at = bisect_right(starts, one.target.data_ptr()) - 1
            holder = parameters[at]
            offset = (one.target.data_ptr() - starts[at]) // holder.element_size()
            if at < 0 or offset >= holder.numel():  # a buffer: nothing learns it
                continue
            sources = len(plan.groups[one.group].sources)
            products = torch.zeros(sources, dtype=torch.float64, device=self._device)
            self._parts[starts[at]].append(_Part(one, offset, products))

    def take(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add what the gradient of one runtime parameter, of the parameter's shape, says of the coefficients."""
        flat = gradient.detach().contiguous()
        for part in self._parts[parameter.data_ptr()]:
            target = part.operands.target
            own = flat.as_strided(target.shape, target.stride(), part.offset).reshape(-1)
            self._add(part, own)

    def values(self) -> tuple[Slope, ...]:
        """dL/d(weight) of every source of every group, then dL/d(lambda) where the method has one.

        Raises:
            EvaluationError: a derivative is not finite.
        """
        sums = [[0.0] * len(group.sources) for group in self._plan.groups]
        for parts in self._parts.values():
            for part in parts:
                for source, product in enumerate(part.products.tolist()):
                    sums[part.operands.group][source] += product
        found = []
        for index, (resolved, products) in enumerate(zip(check_plan(self._plan), sums, strict=True)):
            factor = float(resolved.shared.get("lambda", 1.0))
            found += [Slope(index, source, "weight", factor * value) for source, value in enumerate(products)]
            if "lambda" in resolved.shared:
                weights = [parameters["weight"] for parameters in resolved.per_source]
                total = sum(w * value for w, value in zip(weights, products, strict=True))
                found.append(Slope(index, None, "lambda", total))
        for slope in found:
            if not math.isfinite(slope.value):
                raise EvaluationError(
                    f"the derivative with respect to {slope.parameter} of group"
                    f" {self._plan.groups[slope.group].name!r} is not finite; the merge is broken"
                )
        return tuple(found)

    def _add(self, part: _Part, gradient: Tensor) -> None:
        """<gradient, d_i> of every source: float32 elements as the merge computes them, multiplied and summed in float64."""
        base, sources = part.operands.load()
        terms = part.operands.terms
        for index, source in enumerate(sources):
            keep = part.operands.keeps[index] if part.operands.keeps else None
            if keep is not None:
                keep.prepare()
            total = torch.zeros((), dtype=torch.float64, device=self._device)
            for some in chunks(source.numel(), CHUNK if self._device.type == "cpu" else STEP_GPU):
                element = source[some]
                if keep is not None:
                    assert base is not None
                    element = keep_or_base(keep, some.start, element, base[some])
                delta = element.to(device=self._device, dtype=torch.float32)
                if base is not None:
                    delta = delta - base[some].to(device=self._device, dtype=torch.float32)
                total += torch.dot(delta.double(), gradient[some].double())
            if keep is not None:
                keep.release()
            part.products[index] += (terms.scales[index] if terms.scales else 1.0) * total
