"""A mergekit YAML -> merge plans of our own, tensor by tensor; what our kernels cannot do stays a task of mergekit's.

mergekit itself reads the configuration and plans it, so gradients, filters, slices, stacked layers, aliases, optional
and tied weights mean what they mean there. Two things are deliberately ours:

- The arithmetic is float32 whatever `dtype` says (there: what mergekit computes in), and the result is rounded once, to
  `out_dtype`, else `dtype`, else what mergekit would write.
- Without a `base_model` the first model of the YAML gives configuration and tokenizer. In mergekit 0.1.5 it is
  whichever a set yields first, which differs from run to run.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.errors import CheckpointError, RecipeError, ShoalError, nearest
from shoal.merge.adapter import Adapter
from shoal.merge.checkpoint import Parent
from shoal.merge.mergekit_file import line_of
from shoal.merge.mergekit_models import (
    Loader,
    Renamed,
    local_reference,
    open_reference,
    references_in,
    with_references,
)
from shoal.merge.mergekit_plain import NEVER, NO_EFFECT, RANDOM, arithmetic_notes
from shoal.merge.methods import METHODS, Method, is_native
from shoal.merge.resident import Merger, Output
from shoal.merge.tensors import Target
from shoal.types import MergePlan, OutputGroup, Source

MAX_LAYERS = 10_000  # of the merged model
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDENS = ("arcee_fusion",)  # by a float32 mask, whatever it computes in


@dataclass(frozen=True)
class Planned:
    """A mergekit configuration, planned: our plans, mergekit's tasks for the rest, and what the model's files need.

    config: mergekit's, with local folders. donor: the model that gives configuration and tokenizer; files: config
    for mergekit's own functions that write files, with `donor` as its base and without adapters. architecture,
    out_config: mergekit's. tokenizer: what mergekit built, or None. by_mergekit: why, and how many tensors.
    """

    config: Any
    files: Any
    donor: Any
    architecture: Any
    out_config: Any
    tokenizer: Any
    merger: Merger
    plans: tuple[MergePlan, ...]
    tasks: tuple[tuple[Output, Any], ...]
    loaders: Mapping[Any, Loader] = field(repr=False)
    tokenizer_task: Any = None
    by_mergekit: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def outputs(self) -> tuple[Output, ...]:
        """The tensors in the order in which `fill` makes them."""
        ours = [o for plan in self.plans for o in self.merger.outputs(plan)]
        return (*ours, *(output for output, _ in self.tasks))

    def fill(self, into: Callable[[Output], Target], seed: int = 0) -> Iterator[Output]:
        """Write every tensor into what `into` gives; yields each when it is complete. seed: of mergekit's draws."""
        for plan in self.plans:
            yield from self.merger.fill(plan, into)
        if not self.tasks:
            return
        from mergekit.graph import Executor, TaskUniverse

        universe = TaskUniverse([task for _, task in self.tasks])
        outputs = {universe.get_handle(task): output for output, task in self.tasks}
        known = {}
        if self.tokenizer_task is not None:
            handle = universe.get_handle(self.tokenizer_task)
            known = {} if handle is None else {handle: self.tokenizer}
        with _loaders(self.loaders):
            run = Executor(list(outputs), cached_values=known)._run(quiet=True)
            for handle, value in seeded(run, seed):
                output = outputs[handle]
                if value is None or tuple(value.shape) != output.shape:
                    found = "nothing" if value is None else f"shape {tuple(value.shape)}"
                    raise CheckpointError(
                        f"tensor {output.name!r}: expected shape {output.shape} of mergekit, found {found}"
                    )
                into(output).put(0, value.reshape(-1))
                del value
                yield output


def seeded(run: Iterator[Any], seed: int, one_thread: bool = False) -> Iterator[Any]:
    """Steps of `run` with a random stream of their own: what happens between the steps neither sees nor moves it."""
    state = torch.Generator().manual_seed(seed).get_state()
    while True:
        threads = torch.get_num_threads()
        outer = torch.get_rng_state()
        try:
            if one_thread:
                torch.set_num_threads(1)
            torch.set_rng_state(state)
            step = next(run, None)
            state = torch.get_rng_state()
        finally:
            torch.set_rng_state(outer)
            if one_thread:
                torch.set_num_threads(threads)
        if step is None:
            return
        yield step


class _loaders:
    """mergekit's global table of open models, with ours in it for as long as the block lasts."""

    def __init__(self, loaders: Mapping[Any, Loader]) -> None:
        self.loaders = loaders

    def __enter__(self) -> None:
        from mergekit.io.tasks import LoaderCache

        self.before = dict(LoaderCache.loaders)
        LoaderCache.loaders.update(self.loaders)

    def __exit__(self, *_: object) -> None:
        from mergekit.io.tasks import LoaderCache

        LoaderCache.loaders.clear()
        LoaderCache.loaders.update(self.before)


def plan_config(data: Mapping[str, Any], where: str, seed: int = 0) -> Planned:
    """Let mergekit plan the configuration `data`, and take over what our kernels can do.

    where: the file, for errors. seed: of random masks. CheckpointError, in one line, for everything that is wrong
    with the configuration or its models.
    """
    try:
        return _plan_config(data, where, seed)
    except ShoalError:
        raise
    except Exception as error:  # mergekit raises whatever its parts raise; to a user it is one refusal
        raise CheckpointError(f"{where}: mergekit refuses it: {line_of(error)}") from error


def _plan_config(data: Mapping[str, Any], where: str, seed: int) -> Planned:
    from mergekit import merge_methods
    from mergekit.architecture import get_architecture_info
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.merge import _model_out_config, _update_config_vocab
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    config = MergeConfiguration.model_validate(data)
    spec = merge_methods.get(config.merge_method).spec
    _check_layers(config, where)
    wanted = list(dict.fromkeys(references_in(config)))
    local = {reference: local_reference(reference) for reference in wanted}
    config = with_references(config, lambda reference: local[reference])
    # opening reads headers only
    parents: dict[Any, Parent] = {
        ref: open_reference(ref) for ref in dict.fromkeys(config.referenced_models())
    }
    loaders = {reference: Loader.of(parent) for reference, parent in parents.items()}
    options = MergeOptions(quiet=True)

    def plain(reference: Any) -> Any:
        return ModelReference(model=reference.model, override_architecture=reference.override_architecture)

    first = next(r for r in references_in(_models_of(config)))
    donor = config.base_model or first
    files = with_references(config, plain).model_copy(update={"base_model": plain(donor)})
    architecture = get_architecture_info(with_references(config, plain), options)
    out_config = _model_out_config(files, architecture)
    tokenizer = None
    with _loaders(loaders):
        planner = MergePlanner(config.model_copy(deep=True), architecture, options, out_config)
        planner._plan()  # plan_in_memory() of 0.1.5 raises TypeError
    build = planner._tokenizer_task
    vocabulary = None
    if build is not None:
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            tokenizer = build.execute()
        pad = config.tokenizer.pad_to_multiple_of if config.tokenizer is not None else None
        _update_config_vocab(out_config, architecture, tokenizer.tokenizer, pad_to_multiple_of=pad)
        vocabulary = -(-len(tokenizer.tokenizer.get_vocab()) // (pad or 1)) * (pad or 1)
    translated = _Translation(where, config, spec, parents, vocabulary, seed)
    for weight, task in sorted(planner._tensors, key=lambda pair: _natural(pair[0].name)):
        translated.add(weight, task)
    merger, plans = translated.plans()
    return Planned(
        config=config,
        files=files,
        donor=donor,
        architecture=architecture,
        out_config=out_config,
        tokenizer=tokenizer,
        merger=merger,
        plans=plans,
        tasks=tuple(translated.tasks),
        loaders=loaders,
        tokenizer_task=build,
        by_mergekit=dict(translated.reasons),
        notes=(*_unknown(data, spec), *translated.notes()),
    )


def _models_of(config: Any) -> list[Any]:
    return [config.models, config.slices, config.modules]


def _check_layers(config: Any, where: str) -> None:
    slices = [*(config.slices or ()), *(s for m in (config.modules or {}).values() for s in m.slices or ())]
    layers = 0
    for source in (source for part in slices for source in part.sources):
        low, high = source.layer_range
        if low < 0 or high < low:
            raise CheckpointError(
                f"{where}: layer_range {[low, high]} of {source.model}: expected [first, last + 1], both from 0 on"
            )
        layers += high - low
    if layers > MAX_LAYERS:
        raise CheckpointError(f"{where}: its slices have {layers} layers, at most {MAX_LAYERS} are merged")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _unknown(data: Mapping[str, Any], spec: Any) -> list[str]:
    """Keys that mergekit passes over in silence: most are misspelt."""
    from mergekit.config import MergeConfiguration

    known = [*MergeConfiguration.model_fields, "name", "out_path"]
    notes = [
        f"{key!r} is no key of mergekit's and was ignored; {nearest(key, known)}"
        for key in data
        if key not in known
    ]
    parameters = {p.name for p in spec.parameters}
    everything = parameters | {p.name for m in METHODS.values() for p in m.parameters} | set(NEVER)
    everything |= {name for m in METHODS.values() for name in m.options}
    given = data.get("parameters")
    for key in given if isinstance(given, dict) else ():
        if key not in everything:
            notes.append(f"parameter {key!r} is unknown and was ignored; {nearest(str(key), parameters)}")
    return notes


@dataclass(frozen=True)
class _Entry:
    """One model's part in one tensor. name: as stored, None where transformers converts several into it.

    dtype: as mergekit has it before it merges, without its `dtype`.
    """

    model: Any
    name: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Translation:
    """mergekit's tasks, one by one, into groups of our plans or into the list of what mergekit does."""

    def __init__(
        self,
        where: str,
        config: Any,
        spec: Any,
        parents: Mapping[Any, Parent],
        vocabulary: int | None,
        seed: int,
    ) -> None:
        self.where, self.config, self.spec, self.parents = where, config, spec, parents
        self.vocabulary, self.seed = vocabulary, seed
        self.order = list(parents)
        self.stored: dict[Any, dict[str, str]] = {reference: {} for reference in parents}
        self.groups: dict[tuple[int | None, str], list[OutputGroup]] = {}
        self.tasks: list[tuple[Output, Any]] = []
        self.reasons: Counter[str] = Counter()
        self.skipped: list[str] = []
        self.drawn = self.rounded = False
        self._meta: dict[Any, Mapping[str, Callable[[], Tensor]]] = {}

    def add(self, weight: Any, task: Any) -> None:
        from mergekit import merge_methods
        from mergekit.common import dtype_from_name

        gather = task.gather_tensors
        permuted = not hasattr(gather, "weight_info")
        infos = (gather.gather_tensors if permuted else gather).weight_info
        entries = [e for m in task.model_order if (e := self._entry(m, infos[m])) is not None]
        method = merge_methods.get(task.method_name)
        single = False
        if weight.optional and len(entries) < len(task.model_order):
            policy = str(method.spec.optional_tensor_policy.value)
            on_base = len(entries) == 1 and entries[0].model == task.base_model
            few = policy == "base_or_skip" and len(entries) < method.spec.contract.min_inputs
            single = len(entries) == 1 and (
                policy == "passthrough_singleton"
                or (policy in ("passthrough_base_singleton", "base_or_skip") and on_base)
            )
            if few and not single:
                self.skipped.append(weight.name)
                return
        if not single:
            method.validate_inputs([e.model for e in entries], task.base_model, group_name=weight.name)
        compute = weight.force_dtype or self.config.dtype
        loaded = [dtype_from_name(compute) or e.dtype for e in entries]
        promoted = loaded[0]
        for dtype in loaded[1:]:
            promoted = torch.promote_types(promoted, dtype)
        final = dtype_from_name(weight.force_dtype or self.config.out_dtype) or promoted
        if task.method_name in _WIDENS and len(entries) > 1 and not (compute or self.config.out_dtype):
            final = torch.promote_types(final, torch.float32)
        shape = entries[0].shape
        if permuted:
            reason: str | None = "another vocabulary"
            shape = tuple(
                self.vocabulary if axis == weight.vocabulary_axis and self.vocabulary else length
                for axis, length in enumerate(shape)
            )
        else:
            self._check_shapes(weight, entries)
            reason = self._native(weight, task, entries, promoted, final, single)
        if reason is not None:
            self.reasons[reason] += 1
            self.tasks.append((Output(weight.name, shape, final), task))

    def _entry(self, model: Any, info: Any) -> _Entry | None:
        parent = self.parents[model]
        known = self._names(model)
        for name in (info.name, *(info.aliases or ()), *(info.tied_names or ())):
            if name in known:
                return _Entry(model, name, parent.shape(name), self._dtype(parent, name))
        for name in (info.name, *(info.aliases or ())):
            converted = self._converted(model, name)
            if converted is not None:
                return _Entry(model, None, tuple(converted.shape), converted.dtype)
        if info.optional:
            return None
        raise CheckpointError(
            f"{self.where}: tensor {info.name!r} is wanted from model {model}, which has no such tensor; "
            "check its layer_range and that the models have one architecture"
        )

    def _names(self, model: Any) -> Mapping[str, Callable[[], Tensor]]:
        """The model's tensors, without their values."""
        if model not in self._meta:
            parent = self.parents[model]

            def empty(name: str) -> Callable[[], Tensor]:
                return lambda: torch.empty(parent.shape(name), dtype=self._dtype(parent, name), device="meta")

            self._meta[model] = {name: empty(name) for name in parent.names}
        return self._meta[model]

    @staticmethod
    def _dtype(parent: Parent, name: str) -> torch.dtype:
        # mergekit writes a merged LoRA in its base's dtype; ours is float32 until the one rounding at the end
        return parent.base.dtype(name) if isinstance(parent, Adapter) else parent.dtype(name)

    def _converted(self, model: Any, name: str) -> Tensor | None:
        from mergekit.architecture.conversion import convert_checkpoint_tensors

        tensor: Tensor | None = convert_checkpoint_tensors(
            self.parents[model].config.get("model_type"), self._names(model), name
        )
        return tensor

    def _check_shapes(self, weight: Any, entries: Sequence[_Entry]) -> None:
        first = entries[0]
        for other in entries[1:]:
            if other.shape != first.shape:
                advice = (
                    "merge them with `tokenizer: {source: base}`, which aligns vocabularies"
                    if weight.vocabulary_axis is not None
                    else "only models of one shape can be merged"
                )
                raise CheckpointError(
                    f"{self.where}: tensor {weight.name!r}: {first.model} has shape {list(first.shape)}, "
                    f"{other.model} has {list(other.shape)}; {advice}"
                )

    def _native(
        self,
        weight: Any,
        task: Any,
        entries: Sequence[_Entry],
        computed: torch.dtype,
        final: torch.dtype,
        single: bool,
    ) -> str | None:
        """Add a group to the plan of its base and dtype; or why that cannot be done."""
        chosen = METHODS.get("passthrough" if single else task.method_name)
        if chosen is None or not chosen.native:
            return f"method {task.method_name}"
        if any(e.name is None for e in entries):
            return "tensors that transformers fuses"
        odd = next(
            (d for d in (computed, final, *(e.dtype for e in entries)) if not d.is_floating_point), None
        )
        if odd is not None or computed not in _FLOATS or final not in (*_FLOATS, torch.float64):
            return (
                f"dtype {str(odd or (computed if computed not in _FLOATS else final)).removeprefix('torch.')}"
            )
        base = None
        sources = list(entries)
        if chosen.base != "none" and task.base_model is not None:
            base = self.order.index(task.base_model)
            sources = [e for e in entries if e.model != task.base_model]
        if len(sources) < chosen.min_sources or (chosen.max_sources or len(sources)) < len(sources):
            return f"method {task.method_name} of {len(sources)} models"
        try:
            shared, own = ({}, [{} for _ in sources]) if single else self._parameters(chosen, task, sources)
        except RecipeError as error:
            return str(error)
        group = OutputGroup(
            weight.name,
            chosen.name,
            tuple(
                Source(self.order.index(e.model), weight.name, parameters)
                for e, parameters in zip(sources, own, strict=True)
            ),
            (weight.name,),
            shared,
        )
        if not is_native(group):
            # an option has a value that our kernels lack; a Merger would pass on our views, not the adapters in them
            switches = [f"{n}: {v}" for n, v in shared.items() if v != chosen.native_options.get(n, v)]
            return ", ".join(switches) or f"method {task.method_name}"
        for entry in entries:
            assert entry.name is not None
            self.stored[entry.model][weight.name] = entry.name
        self.groups.setdefault((base, str(final).removeprefix("torch.")), []).append(group)
        densities = [p.get("density", 1.0) for p in own]
        self.drawn |= chosen.name in RANDOM and any(0 < d < 1 for d in densities)
        self.rounded |= computed != torch.float32 and len(entries) > 1
        return None

    def _parameters(
        self, chosen: Method, task: Any, sources: Sequence[_Entry]
    ) -> tuple[dict[str, float | bool], list[dict[str, float]]]:
        """Parameters of the group and of each source; RecipeError with those that ours does not have."""
        specs = {p.name: p for p in chosen.parameters}
        ignored = (*NEVER, *NO_EFFECT.get(chosen.name, ()))
        shared: dict[str, float | bool] = {}
        own: list[dict[str, float]] = [{} for _ in sources]

        def take(parameter: Any, value: Any, into: dict[str, Any], known: bool) -> None:
            if parameter.name in ignored or value is None:
                return
            if not known:
                if value == parameter.default:
                    return
                raise RecipeError(f"parameter {parameter.name}")
            domain = specs[parameter.name].domain if parameter.name in specs else None
            if not math.isfinite(value):
                raise RecipeError(f"{parameter.name} that is no finite number")
            if domain and not domain[0] <= value <= domain[1]:
                raise RecipeError(f"{parameter.name} outside {list(domain)}")
            into[parameter.name] = value

        scopes = {p.name: p.scope for p in chosen.parameters}
        for parameter in self.spec.shared_parameters:
            known = scopes.get(parameter.name) == "group" or parameter.name in chosen.options
            take(parameter, task.parameters[parameter.name], shared, known)
        for parameter in self.spec.input_parameters:
            for entry, into in zip(sources, own, strict=True):
                value = task.input_parameters[entry.model][parameter.name]
                take(parameter, value, into, scopes.get(parameter.name) == "source")
        return shared, own

    def plans(self) -> tuple[Merger, tuple[MergePlan, ...]]:
        views = [Renamed(self.parents[r], self.stored[r]) for r in self.order]
        models = tuple(str(r) for r in self.order)
        plans = tuple(
            MergePlan(models, base, tuple(groups), dtype, self.seed)
            for (base, dtype), groups in self.groups.items()
        )
        return Merger(views, ()), plans

    def notes(self) -> list[str]:
        notes = arithmetic_notes(self.spec.name, self.drawn, self.rounded, self.seed)
        if self.skipped:
            notes.append(
                f"{len(self.skipped)} optional tensors are left out, as mergekit does: too few models have "
                f"{self.skipped[0]!r}"
            )
        return notes
