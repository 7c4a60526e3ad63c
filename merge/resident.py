"""Merger: the parents, kept at hand, and a resident runtime model that takes one merge after the other in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from shoal.errors import CheckpointError, RecipeError, nearest
from shoal.merge.adapter import Adapter
from shoal.merge.checkpoint import Parent
from shoal.merge.compiled import Compile, Kernels, Work, eager
from shoal.merge.keeps import Keep
from shoal.merge.layout import Layout, layouts, settle
from shoal.merge.measurements import Measurements, Origin, Tensors, depends_on_tensors
from shoal.merge.memory import Memory, plan_memory
from shoal.merge.methods import Resolved, check_plan, is_native, method
from shoal.merge.runtime import convert_into, torch_dtype
from shoal.merge.runtime_map import runtime_map
from shoal.merge.stock import Stock, Stream
from shoal.merge.tensors import InMemory, Target, merge_tensor
from shoal.merge.terms import Program, Terms, program_of, row_of
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


@dataclass(frozen=True)
class _Piece:
    """One output tensor of a plan: its group, with the parameters filled in, and its place in the group."""

    group: OutputGroup
    parameters: Resolved
    index: int


@dataclass(frozen=True)
class Operands:
    """What one tensor of a merged model is made of, for those who compute something else of it than the merge.

    group: index in the plan. target: the tensor in the resident model, a view that need not be contiguous. keeps: one
    per source, empty where dropped elements are the base's already. load: the flat base (None for methods without one)
    and the flat sources in stored dtypes, wherever they are kept.
    """

    group: int
    target: Tensor
    terms: Terms
    keeps: tuple[Keep | None, ...]
    load: Callable[[], tuple[Tensor | None, list[Tensor]]]


class Merger:
    """Turns merge plans over fixed parents into weights: into the resident `model`, or as a stream of tensors.

    parents: in the order of MergePlan.models. groups: of the first parent (`tensor_groups`), the names that plans
    use. model: a runtime model loaded from the base, i.e. from the first parent (an adapter: from its base), or None
    when only `tensors` is needed; its parameters move into one flat buffer on `device`, where they are merged.
    memory: tier of the parents (`auto`, `device`, `host`, `disk`); limit: bytes of device memory to stay under.
    sparse: whether plans will drop elements of deltas, which needs more memory. compile: `auto` compiles kernels for
    large models. say: told what takes time.
    notes: what a user should know, e.g. that the model has no direct map and every merge is converted.

    Every merge starts from the parents, never from what an earlier merge left in the model.
    """

    def __init__(
        self,
        parents: Sequence[Parent],
        groups: Sequence[TensorGroup],
        model: nn.Module | None = None,
        device: str = "cpu",
        memory: str = "auto",
        limit: int | None = None,
        sparse: bool = False,
        compile: Compile = "auto",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if not parents:
            raise CheckpointError("a merge needs at least one model, found none")
        self.parents = tuple(parents)
        self.groups = {g.name: g for g in groups}
        self.model = model
        self.device = _device(device)
        self.memory: Memory | None = None
        self._held = [frozenset(p.names) for p in parents]
        self._own_notes: list[str] = []
        self._measured = Measurements()
        self._kernels = Kernels(compile, say)
        self._stream = Stream(self.device)
        self._stocks: list[tuple[Stock, Tensor]] = []
        self._map: dict[str, Tensor] = {}
        if model is not None:
            self._settle(model, memory, limit, sparse)

    @property
    def notes(self) -> list[str]:
        return [*self._own_notes, *self._kernels.notes]

    def materialize(self, plan: MergePlan, canonical: bool = False) -> None:
        """Write the merge into the resident model, rounded to plan.dtype and then cast to the parameters' dtype.

        canonical: by the canonical arithmetic on the CPU, whatever the device. Without it compiled kernels or the
        device do the same arithmetic; results differ from the canonical ones by at most 1 ulp of plan.dtype (on the
        CPU: not at all, which is checked when a kernel is built).
        """
        if self.model is None:
            raise CheckpointError("this Merger was made without a model; give it one from load_runtime")
        pieces = self._checked(plan)
        dtype = torch_dtype(plan.dtype)
        with torch.no_grad():
            if not self._map:
                convert_into(self.model, self.tensors(plan))
                return
            rest = set(pieces)
            if self._stocks and not (canonical and self.device.type != "cpu"):
                for stock, flat in self._stocks:
                    rest -= self._merge_flat(plan, pieces, stock, flat, dtype, canonical)
            for name in rest:
                if not is_native(pieces[name].group):
                    continue
                target = self._map[name]
                direct = target.is_contiguous() and target.device.type == "cpu"
                out = target if direct else torch.empty(target.shape, dtype=target.dtype)
                self._merge_one(plan, name, pieces[name], InMemory(out), dtype)
                if not direct:
                    target.copy_(out)
            for name, tensor in self._by_mergekit(plan, canonical):
                self._map[name].copy_(tensor)

    def tensors(self, plan: MergePlan) -> Iterator[tuple[str, Tensor]]:
        """The canonical merge: checkpoint names and tensors in plan.dtype (non-float ones as the base has them).

        Streams: the memory needed is a few tensors.
        """
        self._checked(plan)
        filled: dict[str, Tensor] = {}

        def fresh(output: Output) -> Target:
            filled[output.name] = torch.empty(output.shape, dtype=output.dtype)
            return InMemory(filled[output.name])

        for output in self.fill(plan, fresh):
            yield output.name, filled.pop(output.name)

    def outputs(self, plan: MergePlan) -> tuple[Output, ...]:
        """The tensors that `plan` makes, in the order in which `fill` makes them."""
        dtype = torch_dtype(plan.dtype)
        native = [g for g in plan.groups if is_native(g)]
        others = [g for g in plan.groups if not is_native(g)]
        found = []
        for group in (*native, *sorted(others, key=lambda g: method(g.operator).name)):
            for index, name in enumerate(group.tensors):
                source = group.sources[0]
                model, tensor = source.model, self._name(source.group, group, index)
                stored = self.parents[model].dtype(tensor)
                shape = self.parents[model].shape(tensor)
                found.append(Output(name, shape, dtype if stored.is_floating_point else stored))
        return tuple(found)

    def fill(self, plan: MergePlan, into: Callable[[Output], Target]) -> Iterator[Output]:
        """The canonical merge, written to the targets that `into` gives.

        Yields every output when it is complete, in the order of `outputs`. The plan need not make every tensor of the
        base, and may make others from its sources (layers from elsewhere). Works in chunks, and remembers nothing of
        a tensor's size.
        """
        dtype = torch_dtype(plan.dtype)
        outputs = {o.name: o for o in self.outputs(plan)}
        for name, piece in self._pieces(plan).items():
            if not is_native(piece.group):
                continue
            with torch.no_grad():
                self._merge_one(plan, name, piece, into(outputs[name]), dtype)
            yield outputs[name]
        for name, tensor in self._by_mergekit(plan, canonical=True):
            into(outputs[name]).put(0, tensor.reshape(-1))
            yield outputs[name]

    def operands(self, plan: MergePlan) -> Iterator[Operands]:
        """What every tensor of the resident model is made of; nothing is loaded before it is asked for.

        Raises:
            CheckpointError: the model has no direct map from the checkpoint.
        """
        if self.model is None or not self._map:
            reason = "this Merger was made without one" if self.model is None else "; ".join(self.notes)
            raise CheckpointError(f"no tensor of the merge has a place in the resident model: {reason}")
        homes = {e.name: (stock, i) for stock, _ in self._stocks for i, e in enumerate(stock.layout.entries)}
        index = {group.name: i for i, group in enumerate(plan.groups)}
        for name, piece in self._checked(plan).items():
            target = self._map[name]
            if not is_native(piece.group) or not target.dtype.is_floating_point:
                continue
            tensors = self._tensors(plan, name, piece, self.device)
            terms = self._measured.terms(method(piece.group.operator).name, piece.parameters, tensors)
            here = all(s.group == piece.group.name for s in piece.group.sources)
            stock, entry = homes.get(name, (None, 0)) if here else (None, 0)
            load = partial(_load, tensors, terms, stock, entry)
            keeps = terms.keeps if stock is None else ()
            yield Operands(index[piece.group.name], target, terms, keeps, load)

    # --- the plan ---

    def _pieces(self, plan: MergePlan) -> dict[str, _Piece]:
        if len(plan.models) != len(self.parents):
            raise CheckpointError(
                f"the plan merges {len(plan.models)} models, but {len(self.parents)} are loaded"
            )
        found: dict[str, _Piece] = {}
        for group, parameters in zip(plan.groups, check_plan(plan), strict=True):
            for index, name in enumerate(group.tensors):
                if name in found:
                    raise CheckpointError(
                        f"the plan does not make every tensor exactly once: {name!r} twice; "
                        "build plans from tensor_groups of the same checkpoint"
                    )
                found[name] = _Piece(group, parameters, index)
        return found

    def _checked(self, plan: MergePlan) -> dict[str, _Piece]:
        """The pieces of a plan that makes every tensor of its base."""
        pieces = self._pieces(plan)
        expected = self.parents[0 if plan.base is None else plan.base].names
        if len(pieces) != len(expected) or pieces.keys() != set(expected):
            odd = sorted(pieces.keys() ^ set(expected))
            raise CheckpointError(
                f"the plan does not make every tensor exactly once: {odd[0]!r} ({len(odd)} in all); "
                "build plans from tensor_groups of the same checkpoint"
            )
        return pieces

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

    def _tensors(self, plan: MergePlan, name: str, piece: _Piece, device: torch.device) -> Tensors:
        group = piece.group
        base: Origin | None = None
        if method(group.operator).base != "none" and plan.base is not None:
            base = plan.base, self._base_name(plan, group, piece.index)
        sources = tuple((s.model, self._name(s.group, group, piece.index)) for s in group.sources)

        def load(origin: Origin) -> Tensor:
            return self.parents[origin[0]].tensor(origin[1]).to(device).reshape(-1)

        model, tensor = sources[0]
        return Tensors(name, self.parents[model].shape(tensor), base, sources, plan.seed, load)

    def _base_name(self, plan: MergePlan, group: OutputGroup, index: int) -> str:
        """The base's tensor: the one at the output's place, or, where layers were moved, the one that the sources use."""
        name = group.tensors[index]
        assert plan.base is not None
        return name if name in self._held[plan.base] else self._name(group.sources[0].group, group, index)

    # --- one tensor at a time: the canonical way ---

    def _merge_one(self, plan: MergePlan, name: str, piece: _Piece, out: Target, dtype: torch.dtype) -> None:
        tensors = self._tensors(plan, name, piece, torch.device("cpu"))
        sources = [tensors.load(s) for s in tensors.sources]
        base = None if tensors.base is None else tensors.load(tensors.base)
        if not sources[0].dtype.is_floating_point:  # counters, masks: nothing to interpolate
            out.put(0, sources[0] if base is None else base)
            return
        terms = self._measured.terms(method(piece.group.operator).name, piece.parameters, tensors)
        merge_tensor(terms, base, sources, out, dtype)
        for keep in terms.keeps:
            if keep is not None:
                keep.release()

    # --- the whole model at once ---

    def _settle(self, model: nn.Module, memory: str, limit: int | None, sparse: bool) -> None:
        first = self.parents[0]
        self._map, reason = runtime_map(model, first.base if isinstance(first, Adapter) else first)
        if reason is not None:
            self._own_notes.append(
                f"{reason}: every merge is converted by transformers and copied, which is slower"
            )
            model.to(self.device)
            return
        made, apart = layouts(model, self._map)
        dtypes = [layout.dtype for layout in made] or [torch.float32]
        moves = next(model.parameters()).device != self.device
        self.memory = plan_memory(
            self.parents, str(self.device), dtypes[0], sparse, memory, limit, loaded=not moves
        )
        flats = [settle(model, layout, self.device) for layout in made]
        model.to(self.device)
        if apart and moves:
            self._map, _ = runtime_map(model, first.base if isinstance(first, Adapter) else first)
        for layout, flat in zip(made, flats, strict=True):
            self._map.update({e.name: layout.view(flat, e).view(e.shape) for e in layout.entries})
            if self.memory.tier != "disk":
                resident = self.memory.tier == "device"
                self._stocks.append((Stock(layout, self.parents, self.device, resident), flat))

    def _merge_flat(
        self,
        plan: MergePlan,
        pieces: Mapping[str, _Piece],
        stock: Stock,
        flat: Tensor,
        dtype: torch.dtype,
        canonical: bool,
    ) -> set[str]:
        """Merge what lies in the layout into its buffer; returns the names that are done."""
        done: set[str] = set()
        for run in _runs(plan, pieces, stock.layout):
            terms = self._terms(plan, pieces, stock.layout, run)
            program = program_of(terms)
            group = pieces[stock.layout.entries[run[0]].name].group
            buffers: list[Tensor] = []
            if program.needs_base:
                assert plan.base is not None
                buffers.append(stock.plain(plan.base))
            for position, source in enumerate(group.sources):
                if any(t.keeps for t in terms):
                    assert plan.base is not None
                    keeps = {
                        i: (t.keeps[position] if t.keeps else None) for i, t in zip(run, terms, strict=True)
                    }
                    buffers.append(stock.kept(source.model, plan.base, keeps))
                else:
                    buffers.append(stock.plain(source.model))
            rows = np.array([row_of(t, program) for t in terms], dtype=np.float32)
            entries = [stock.layout.entries[i] for i in run]
            start, stop = entries[0].row, entries[-1].row + entries[-1].rows
            owner = torch.from_numpy(stock.layout.owner[start:stop] - run[0])
            table = torch.from_numpy(rows.T.copy())[:, owner].unsqueeze(-1).to(self.device)
            self._execute(program, dtype, flat, buffers, slice(start, stop), table, stock, canonical)
            done.update(e.name for e in entries)
        return done

    def _terms(
        self, plan: MergePlan, pieces: Mapping[str, _Piece], layout: Layout, run: Sequence[int]
    ) -> list[Terms]:
        """Terms of a run of entries; made once per group where they are the same for all of its tensors."""
        shared: dict[str, Terms] = {}
        found = []
        for index in run:
            name = layout.entries[index].name
            piece = pieces[name]
            operator = method(piece.group.operator).name
            terms = shared.get(piece.group.name)
            if terms is None:
                tensors = self._tensors(plan, name, piece, self.device)
                terms = self._measured.terms(operator, piece.parameters, tensors)
                if not depends_on_tensors(operator, piece.parameters):
                    shared[piece.group.name] = terms
            found.append(terms)
        return found

    def _execute(
        self,
        program: Program,
        dtype: torch.dtype,
        out: Tensor,
        buffers: Sequence[Tensor],
        rows: slice,
        table: Tensor,
        stock: Stock,
        canonical: bool,
    ) -> None:
        """Rows of `out` from the same rows of `buffers` (the base first, where the program needs one)."""

        def run(part: slice, tiles: Sequence[Tensor]) -> None:
            base, sources = (tiles[0], tiles[1:]) if program.needs_base else (None, tiles)
            coefficients = table[:, part.start - rows.start : part.stop - rows.start]
            work = Work(program, dtype, out[part], base, tuple(sources), coefficients)
            if canonical:
                eager(work)
            else:
                self._kernels.run(work, out.numel())

        if stock.resident:
            run(rows, [b[rows] for b in buffers])
            return
        for part, tiles in self._stream.tiles(rows, buffers):
            run(part, tiles)

    def _by_mergekit(self, plan: MergePlan, canonical: bool) -> Iterator[tuple[str, Tensor]]:
        operators = {g.operator for g in plan.groups if not is_native(g)}
        if not operators:
            return
        from shoal.merge.mergekit_bridge import merge_by_mergekit

        for operator in sorted(operators):
            yield from merge_by_mergekit(plan, operator, self.parents, canonical)


def _load(
    tensors: Tensors, terms: Terms, stock: Stock | None, index: int
) -> tuple[Tensor | None, list[Tensor]]:
    """Flat base and sources of one tensor: from the buffers of the parents where it has a place there."""
    if stock is None:
        base = None if tensors.base is None else tensors.load(tensors.base)
        return base, [tensors.load(source) for source in tensors.sources]
    entry = stock.layout.entries[index]

    def view(flat: Tensor) -> Tensor:
        return stock.layout.view(flat, entry)

    if tensors.base is None:
        return None, [view(stock.plain(model)) for model, _ in tensors.sources]
    root = tensors.base[0]
    if not terms.keeps:
        return view(stock.plain(root)), [view(stock.plain(model)) for model, _ in tensors.sources]
    kept = zip(tensors.sources, terms.keeps, strict=True)
    return view(stock.plain(root)), [view(stock.kept(m, root, {index: keep})) for (m, _), keep in kept]


def _runs(plan: MergePlan, pieces: Mapping[str, _Piece], layout: Layout) -> Iterator[list[int]]:
    """Neighbouring entries that one kernel merges: the same method and models, every tensor from its own place."""
    run: list[int] = []
    last = None
    for index, entry in enumerate(layout.entries):
        group, shared = pieces[entry.name].group, pieces[entry.name].parameters.shared
        kind = group.operator, tuple(s.model for s in group.sources), shared.get("normalize")
        fits = is_native(group) and all(s.group == group.name for s in group.sources)
        if run and (not fits or kind != last):
            yield run
            run = []
        if fits:
            run.append(index)
            last = kind
    if run:
        yield run


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
