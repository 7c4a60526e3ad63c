"""Merger: the parents, kept at hand, and a resident runtime model that takes one merge after the other in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.errors import CheckpointError, RecipeError, nearest
from shoal.merge.adapter import Adapter
from shoal.merge.checkpoint import Parent
from shoal.merge.methods import check_plan, method, resolved
from shoal.merge.runtime import convert_into, runtime_map, torch_dtype
from shoal.merge.tensors import TensorMerger
from shoal.types import MergePlan, OutputGroup, TensorGroup


@dataclass(frozen=True)
class Output:
    """One tensor of a merged checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Merger:
    """Turns merge plans over fixed parents into weights: into the resident `model`, or as a stream of tensors.

    parents: in the order of MergePlan.models. groups: of the first parent (`tensor_groups`), the names that plans
    use. model: a runtime model loaded from the base, i.e. from the first parent (an adapter: from its base), or None
    when only `tensors` is needed. device: where the parents are kept and merged in the search.
    notes: what a user should know, e.g. that the model has no direct map and every merge is converted.

    Every merge starts from the parents, never from what an earlier merge left in the model.
    """

    def __init__(
        self,
        parents: Sequence[Parent],
        groups: Sequence[TensorGroup],
        model: nn.Module | None = None,
        device: str = "cpu",
    ) -> None:
        if not parents:
            raise CheckpointError("a merge needs at least one model, found none")
        self.parents = tuple(parents)
        self.groups = {g.name: g for g in groups}
        self.model = model
        self.device = torch.device(device)
        self.notes: list[str] = []
        self._merger = TensorMerger()
        self._kept: dict[tuple[int, str, str], Tensor] = {}
        self._map: dict[str, Tensor] = {}
        if model is not None:
            first = self.parents[0]
            self._map, reason = runtime_map(model, first.base if isinstance(first, Adapter) else first)
            if reason is not None:
                self.notes.append(
                    f"{reason}: every merge is converted by transformers and copied, which is slower"
                )

    def materialize(self, plan: MergePlan, canonical: bool = False) -> None:
        """Write the merge into the resident model, rounded to plan.dtype and then cast to the parameters' dtype.

        canonical: by the canonical arithmetic on the CPU, whatever the device. Without it the same formulas run on
        `device`; results differ from the canonical ones by at most 1 ulp of plan.dtype (on the CPU: not at all).
        """
        if self.model is None:
            raise CheckpointError("this Merger was made without a model; give it one from load_runtime")
        self._check(plan)
        dtype = torch_dtype(plan.dtype)
        with torch.no_grad():
            if not self._map:
                convert_into(self.model, self.tensors(plan))
                return
            for group in plan.groups:
                if not method(group.operator).native:
                    continue
                for index, name in enumerate(group.tensors):
                    target = self._map[name]
                    direct = target.is_contiguous() and not (canonical and target.device.type != "cpu")
                    device = torch.device("cpu") if canonical else self.device
                    out = target if direct else torch.empty(target.shape, dtype=target.dtype, device=device)
                    self._merge(plan, group, index, out, dtype, device)
                    if not direct:
                        target.copy_(out)
            for name, tensor in self._by_mergekit(plan, canonical):
                self._map[name].copy_(tensor)

    def tensors(self, plan: MergePlan) -> Iterator[tuple[str, Tensor]]:
        """The canonical merge: checkpoint names and tensors in plan.dtype (non-float ones as the base has them).

        Streams: the memory needed is a few tensors, unless a resident model keeps the parents in memory anyway.
        """
        self._check(plan)
        filled: dict[str, Tensor] = {}

        def fresh(output: Output) -> Tensor:
            filled[output.name] = torch.empty(output.shape, dtype=output.dtype)
            return filled[output.name]

        for output in self.fill(plan, fresh):
            yield output.name, filled.pop(output.name)

    def outputs(self, plan: MergePlan) -> tuple[Output, ...]:
        """The tensors that `plan` makes, in the order in which `fill` makes them."""
        dtype = torch_dtype(plan.dtype)
        native = [g for g in plan.groups if method(g.operator).native]
        others = [g for g in plan.groups if not method(g.operator).native]
        found = []
        for group in (*native, *sorted(others, key=lambda g: method(g.operator).name)):
            for index, name in enumerate(group.tensors):
                source = group.sources[0]
                model, tensor = source.model, self._name(source.group, group, index)
                stored = self.parents[model].dtype(tensor)
                shape = self.parents[model].shape(tensor)
                found.append(Output(name, shape, dtype if stored.is_floating_point else stored))
        return tuple(found)

    def fill(self, plan: MergePlan, into: Callable[[Output], Tensor]) -> Iterator[Output]:
        """The canonical merge, written into the CPU tensors that `into` gives (the output's shape and dtype, contiguous).

        Yields every output when it is complete, in the order of `outputs`. The plan need not make every tensor of the
        base, and may make others from its sources (layers from elsewhere).
        """
        dtype = torch_dtype(plan.dtype)
        outputs = {o.name: o for o in self.outputs(plan)}
        for group in plan.groups:
            if not method(group.operator).native:
                continue
            for index, name in enumerate(group.tensors):
                with torch.no_grad():
                    self._merge(plan, group, index, into(outputs[name]), dtype, torch.device("cpu"))
                yield outputs[name]
        for name, tensor in self._by_mergekit(plan, canonical=True):
            into(outputs[name]).copy_(tensor)
            yield outputs[name]

    def _check(self, plan: MergePlan) -> None:
        if len(plan.models) != len(self.parents):
            raise CheckpointError(
                f"the plan merges {len(plan.models)} models, but {len(self.parents)} are loaded"
            )
        check_plan(plan)
        named = [name for group in plan.groups for name in group.tensors]
        expected = self.parents[0 if plan.base is None else plan.base].names
        if len(named) != len(expected) or set(named) != set(expected):
            odd = sorted(set(named) ^ set(expected)) or sorted(n for n in set(named) if named.count(n) > 1)
            raise CheckpointError(
                f"the plan does not make every tensor exactly once: {odd[0]!r} ({len(odd)} in all); "
                "build plans from tensor_groups of the same checkpoint"
            )

    def _merge(
        self,
        plan: MergePlan,
        group: OutputGroup,
        index: int,
        out: Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        name = group.tensors[index]
        chosen = method(group.operator)
        base = None
        if chosen.base != "none" and plan.base is not None:
            base = self._tensor(plan.base, name, device).reshape(-1)
        origins = [(s.model, self._name(s.group, group, index)) for s in group.sources]
        self._merger.merge(
            chosen.name,
            name,
            base,
            [self._tensor(model, tensor, device).reshape(-1) for model, tensor in origins],
            origins,
            plan.base,
            resolved(group),
            out.view(-1),
            plan.seed,
            dtype if out.dtype.is_floating_point else None,
        )

    def _name(self, source_group: str, group: OutputGroup, index: int) -> str:
        """Tensor of the source group at the place of the output tensor; usually the very same name."""
        if source_group == group.name:
            return group.tensors[index]
        if source_group not in self.groups:
            raise RecipeError(f"unknown source group {source_group!r}; {nearest(source_group, self.groups)}")
        names = self.groups[source_group].tensors
        if len(names) != len(group.tensors):
            raise RecipeError(
                f"group {group.name!r} has {len(group.tensors)} tensors, its source {source_group!r} has {len(names)}"
            )
        return names[index]

    def _tensor(self, parent: int, name: str, device: torch.device) -> Tensor:
        """A parent's tensor on `device`; kept when it costs something to get it again and a model is resident."""
        if self.model is None:
            return self.parents[parent].tensor(name).to(device)
        key = parent, name, device.type
        if key not in self._kept:
            self._kept[key] = self.parents[parent].tensor(name).to(device)
        return self._kept[key]

    def _by_mergekit(self, plan: MergePlan, canonical: bool) -> Iterator[tuple[str, Tensor]]:
        operators = {g.operator for g in plan.groups if not method(g.operator).native}
        if not operators:
            return
        from shoal.merge.mergekit_bridge import merge_by_mergekit

        for operator in sorted(operators):
            yield from merge_by_mergekit(plan, operator, self.parents, canonical)
