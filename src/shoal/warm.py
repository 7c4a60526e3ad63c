"""Where a search may start: the genome nearest to an existing merge, from a finished run or a mergekit YAML.

The merge is read as plans, its models are found among those of the new run, and the space projects it by least squares.
A start is a start: whatever is lost on the way is said in a note, only another method or other models are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import RunError, ShoalError
from shoal.folder import RunFolder
from shoal.lock import ModelLock
from shoal.mergekit_evolve import reference_text
from shoal.search.plans import parameter
from shoal.search.space import EXACT, Space
from shoal.types import MergePlan, OutputGroup, Source, TensorGroup

Floats = NDArray[np.float64]
BASELINE = "linear"  # parents and the uniform merge are plans of it, whatever the run's own method
# keys of a mergekit YAML that say nothing about the weights
_NOT_WEIGHTS = ("tokenizer_source", "tokenizer", "chat_template", "dtype", "out_dtype", "name")


@dataclass(frozen=True)
class _Merged:
    """How one tensor was merged, models by their index in the new run's lock."""

    base: int | None
    group: OutputGroup


def warm_genome(source: Path, space: Space, models: Sequence[ModelLock]) -> tuple[Floats, str]:
    """The genome of `space` that is nearest to the merge of `source`, within bounds; and a note for the user.

    source: the folder of a finished run (its winner), or a mergekit YAML, e.g. RUN/best/mergekit_config.yml or
    mergekit-evolve's best_config.yaml; parameters may be uniform, per slice, by filter or gradients. models: of the
    run, in the order of the space's plan. Returns float64 [genes], natural units.

    Raises:
        ShoalError: in one line: nothing to read, another merge method, other models, a switch that differs.
    """
    merged = _of_run(source, models) if source.is_dir() else _of_yaml(source, models)
    plan, spread, notes = _in_space(merged, space, str(source))
    genome, inside, outside = _nearest(space, plan, spread)
    clipped: Floats = np.clip(genome, space.low, space.high)
    moved = int((np.abs(clipped - genome) > EXACT).sum())
    exact = EXACT * max(1.0, float(np.abs(genome).max()))
    words = [f"warm start from {source}"]
    if inside > exact:
        words.append(
            f"not in the {space.shape} space, projected: some parameter of a layer is off by {inside:.3g}"
        )
    if outside > exact:
        words.append(
            f"{'' if inside > exact else 'layers exact, '}what follows from them (embeddings, norms, head) off by up to"
            f" {outside:.3g}"
        )
    if max(inside, outside) <= exact:
        words.append("exact")
    if moved:
        most = float(np.abs(clipped - genome).max())
        words.append(f"{moved} of {space.size} genes moved to their bounds, by up to {most:.3g}")
    return clipped, "; ".join([*words, *notes])


def _nearest(space: Space, plan: MergePlan, spread: Mapping[int, float]) -> tuple[Floats, float, float]:
    """The least-squares genome of the layers alone, and what is left: in the layers, and in what follows from them.

    Embeddings, final norm and head, and what is of no tensor type, have no genes of their own (`make_space`): they must
    not pull the layers from their values. Where the layers do not determine the genome, everything counts.
    """
    wanted = np.array([parameter(plan, slot) for slot in space.slots], dtype=np.float64)
    dense = np.zeros((len(space.slots), space.size))
    np.add.at(dense, (np.arange(len(space.slots))[:, None], space.columns), space.factors)
    own = np.array([_has_genes(space.groups[slot.group], space.tensor_types) for slot in space.slots])
    if not own.any() or np.linalg.matrix_rank(dense[own]) < space.size:
        own[:] = True
    genome: Floats = np.linalg.lstsq(dense[own], wanted[own], rcond=None)[0].astype(np.float64)
    left = np.abs(dense @ genome - wanted)
    left = np.maximum(left, [spread.get(slot.group, 0.0) for slot in space.slots])
    return genome, float(left[own].max()), float(left[~own].max(initial=0.0))


def _has_genes(group: TensorGroup, types: Sequence[str]) -> bool:
    return group.layer is not None and (not types or group.kind in types)


def find_model(reference: str, spellings: Sequence[Sequence[str]], where: str) -> int:
    """Index of the model that `reference` means. spellings: per model, the ways in which it may be written.

    Compared are the texts, folders by where they lead, Hub ids without a revision where one side has none, and the
    names of the copies that mergekit-evolve makes of its input models (`input_models/NAME_CRC`).

    Raises:
        ShoalError: none of them, or several.
    """
    tests: tuple[Callable[[str], bool], ...] = (
        lambda text: text == reference,
        lambda text: _place(text) == _place(reference),
        lambda text: (
            _without_revision(text) == _without_revision(reference)
            and ("@" not in text or "@" not in reference)
        ),
        lambda text: _is_copy(reference, text),
    )
    for same in tests:
        found = [i for i, texts in enumerate(spellings) if any(same(text) for text in texts)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    names = ", ".join(texts[0] for texts in spellings)
    problem = "may be any of several of" if found else "is none of"
    raise ShoalError(f"{where}: model {reference!r} {problem} this run's models: {names}")


def rewritten(data: Any, model: Callable[[str], str]) -> Any:
    """A copy of a mergekit configuration with its model references replaced; tokenizers are left as they are."""
    if isinstance(data, list):
        return [rewritten(entry, model) for entry in data]
    if not isinstance(data, dict):
        return data
    return {
        key: model(reference_text(value))
        if key in ("model", "base_model") and value is not None
        else rewritten(value, model)
        for key, value in data.items()
    }


def _place(text: str) -> tuple[str, ...]:
    parts = [Path(part).expanduser() for part in text.split("+")]
    return tuple(str(part.resolve() if part.exists() else part) for part in parts)


def _without_revision(text: str) -> tuple[str, ...]:
    return tuple(part.partition("@")[0] for part in text.split("+"))


def _is_copy(reference: str, text: str) -> bool:
    """Whether `reference` is mergekit-evolve's copy of the model `text`, an adapter merged into it or not."""
    path = Path(reference)
    if path.parent.name != "input_models":
        return False
    names = [re.escape(Path(part).name) + r"_\d+" for part in _without_revision(text)]
    return re.fullmatch("_".join(names) + (r"_\d+" if len(names) > 1 else ""), path.name) is not None


def _spellings(model: ModelLock) -> tuple[str, ...]:
    base, _, adapter = model.ref.partition("+")
    folder = model.folder if model.adapter is None else f"{model.folder}+{model.adapter}"
    pinned = f"{base.partition('@')[0]}@{model.commit}" if model.commit else model.folder
    if adapter:
        adapter = (
            f"{adapter.partition('@')[0]}@{model.adapter_commit}"
            if model.adapter_commit
            else str(model.adapter)
        )
        pinned += f"+{adapter}"
    return (model.ref, folder, pinned)


# --- reading


def _of_run(folder: Path, models: Sequence[ModelLock]) -> dict[str, _Merged]:
    """The winner of a finished run, by tensor; its models are found by the hashes of their weights."""
    run = RunFolder(folder)
    plan_path = run.best / "plan.json"
    if not run.done.is_file() or not plan_path.is_file():
        raise RunError(
            f"warm start from {folder}: no finished run there (expected {run.done.name} and best/plan.json)"
        )
    _, lock = run.open()
    try:
        plan = MergePlan.from_json(plan_path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{plan_path}: not a plan that can be read: {error}") from None
    spellings = [_spellings(model) for model in models]
    places: dict[int, int] = {}
    used = {s.model for g in plan.groups for s in g.sources}
    for index in sorted(used if plan.base is None else used | {plan.base}):
        theirs = lock.models[index]
        same = [i for i, ours in enumerate(models) if _weights(ours) and _weights(ours) == _weights(theirs)]
        places[index] = same[0] if same else find_model(theirs.ref, spellings, f"warm start from {folder}")
        ours = models[places[index]]
        if not same and _weights(ours) and _weights(theirs):
            raise ShoalError(
                f"warm start from {folder}: its model {theirs.ref} has other weights than {ours.ref} of this run"
            )
    return dict(_by_tensor([plan], lambda index: places[index]))


def _weights(model: ModelLock) -> dict[str, str]:
    return {name: digest for name, digest in model.files.items() if name.endswith(".safetensors")}


def _of_yaml(path: Path, models: Sequence[ModelLock]) -> dict[str, _Merged]:
    """A mergekit YAML, by tensor: planned by mergekit (or as it would), so that its settings mean what they mean there."""
    from shoal.merge.mergekit_file import read_config
    from shoal.merge.mergekit_plain import plan_plain
    from shoal.merge.mergekit_plan import Planned, plan_config

    if not path.exists():
        raise ShoalError(f"warm start from {path}: no such run folder or mergekit YAML")
    _, data = read_config(path)
    spellings = [_spellings(model) for model in models]
    folders = [texts[1] for texts in spellings]

    def located(reference: str) -> str:
        beside = "+".join(
            str(path.parent / part) if part.startswith(".") else part for part in reference.split("+")
        )
        try:
            return folders[find_model(reference, spellings, str(path))]
        except ShoalError:
            if beside == reference:
                raise
        return folders[find_model(beside, spellings, str(path))]

    kept = {key: value for key, value in data.items() if key not in _NOT_WEIGHTS}
    try:
        kept = rewritten(kept, located) | {"dtype": "float32"}
    except ValueError as error:
        raise ShoalError(f"{path}: {error}") from None
    planned = plan_plain(kept) or plan_config(kept, str(path))
    by_tensor: dict[str, _Merged] = {}
    for plan in planned.plans:
        # the planner may write one folder in another way
        order = [find_model(name, [(folder,) for folder in folders], str(path)) for name in plan.models]
        by_tensor |= dict(_by_tensor([plan], order.__getitem__))
    if not by_tensor:
        reasons = ", ".join(planned.by_mergekit) if isinstance(planned, Planned) else "nothing is merged"
        raise ShoalError(f"warm start from {path}: its parameters cannot be read back ({reasons})")
    return by_tensor


def _by_tensor(plans: Sequence[MergePlan], place: Callable[[int], int]) -> Iterator[tuple[str, _Merged]]:
    for plan in plans:
        base = None if plan.base is None else place(plan.base)
        for group in plan.groups:
            sources = tuple(replace(source, model=place(source.model)) for source in group.sources)
            for tensor in group.tensors:
                yield tensor, _Merged(base, replace(group, sources=sources))


# --- into the space


def _in_space(
    merged: Mapping[str, _Merged], space: Space, where: str
) -> tuple[MergePlan, dict[int, float], tuple[str, ...]]:
    """A plan of the space's form with the parameters of `merged`; by how much tensors of each group differ; notes.

    A group whose tensors say nothing (mergekit names them otherwise) takes the mean over the other groups.
    """
    template = space.decode(space.x0)
    searched = {(slot.group, slot.source, slot.parameter) for slot in space.slots}
    values: dict[tuple[int, int | None, str], list[float]] = {place: [] for place in searched}
    fixed: dict[str, float] = {}
    for index, group in enumerate(template.groups):
        for tensor in group.tensors:
            if tensor not in merged or _is_copied(merged[tensor].group, group):
                continue
            found = _like(merged[tensor], template, group, where)
            ours, theirs = _everything(group), _everything(found)
            for (position, name), value in theirs.items():
                place = (index, position, name)
                if place in values:
                    values[place].append(float(value))
                elif isinstance(value, bool) or isinstance(ours[position, name], bool):
                    if value != ours[position, name]:
                        raise ShoalError(
                            f"warm start from {where}: merged with {name}: {str(value).lower()}, this run has"
                            f" {name}: {str(ours[position, name]).lower()}"
                        )
                else:
                    off = abs(float(value) - float(ours[position, name]))
                    fixed[name] = max(fixed.get(name, 0.0), off)
    known = {place: found for place, found in values.items() if found}
    if not known:
        raise ShoalError(f"warm start from {where}: none of its tensors is one of this run's")
    spread: dict[int, float] = {}
    for (index, _, _), found_values in known.items():
        spread[index] = max(spread.get(index, 0.0), max(found_values) - min(found_values))
    notes = tuple(
        f"{name}, which this run does not search, differs by {off:.3g}"
        for name, off in sorted(fixed.items())
        if off > EXACT
    )
    return _filled(template, values), spread, notes


def _is_copied(found: OutputGroup, group: OutputGroup) -> bool:
    """Whether a tensor that not every model has is taken from the one that has it."""
    given, wanted = (g.operator.partition("@")[0] for g in (found, group))
    return given == "passthrough" != wanted


def _like(found: _Merged, template: MergePlan, group: OutputGroup, where: str) -> OutputGroup:
    """The same merge of one tensor with the operator, base and sources of the space; ShoalError where there is none."""
    wanted, given = (g.operator.partition("@")[0] for g in (group, found.group))
    models, names = [s.model for s in group.sources], template.models
    theirs = {s.model: s.parameters for s in found.group.sources}
    if given == wanted == "slerp" and found.base in models and theirs.keys() == {template.base}:
        # the same arc from its other end
        t = 1.0 - float(_everything(found.group)[None, "t"])
        return replace(found.group, sources=group.sources, parameters={**found.group.parameters, "t": t})
    if given == BASELINE != wanted:
        return _from_linear(found, template, group, where)
    if given != wanted:
        raise ShoalError(
            f"warm start from {where}: it merges by {given}, this run searches {wanted}; start from a merge of one method"
        )
    theirs = {model: p for model, p in theirs.items() if model in models or any(p.values())}
    if template.base is not None and found.base != template.base:
        base = "none" if found.base is None else names[found.base]
        raise ShoalError(f"warm start from {where}: its base is {base}, this run's is {names[template.base]}")
    _check_sources(set(theirs), set(models), names, where)
    sources = tuple(replace(s, parameters=theirs[s.model]) for s in group.sources)
    return replace(found.group, sources=sources)


def _from_linear(found: _Merged, template: MergePlan, group: OutputGroup, where: str) -> OutputGroup:
    """A weighted sum as task vectors: sum w_i x_i = base + sum w_i (x_i - base), where the w_i of all sum to 1."""
    wanted = group.operator.partition("@")[0]
    everything = _everything(found.group)
    weights = {
        source.model: float(everything[position, "weight"])
        for position, source in enumerate(found.group.sources)
    }
    total = math.fsum(weights.values())
    normalize = bool(everything[None, "normalize"])
    models = [s.model for s in group.sources]
    if wanted != "task_arithmetic" or template.base is None or total == 0 or not (normalize or total == 1):
        raise ShoalError(
            f"warm start from {where}: it is a plain weighted sum of models, which a search by {wanted} cannot start from"
        )
    _check_sources(
        {m for m, w in weights.items() if w} - {template.base},
        set(models),
        template.models,
        where,
        all_=False,
    )
    sources = tuple(
        Source(s.model, s.group, {"weight": weights.get(s.model, 0.0) / total}) for s in group.sources
    )
    return OutputGroup(group.name, group.operator, sources, group.tensors, group.parameters)


def _check_sources(
    found: set[int], wanted: set[int], names: Sequence[str], where: str, all_: bool = True
) -> None:
    if (found == wanted) if all_ else (found <= wanted):
        return
    theirs, ours = (", ".join(names[i] for i in sorted(models)) for models in (found, wanted))
    raise ShoalError(f"warm start from {where}: it merges {theirs or 'nothing'}, this run merges {ours}")


def _everything(group: OutputGroup) -> dict[tuple[int | None, str], float | bool]:
    """Every parameter of a group, defaults filled in: (source's position, or None for the group's own; name) -> value."""
    from shoal.merge.methods import resolved

    filled = resolved(group)
    found: dict[tuple[int | None, str], float | bool] = {(None, n): v for n, v in filled.shared.items()}
    for position, parameters in enumerate(filled.per_source):
        found |= {(position, name): value for name, value in parameters.items()}
    return found


def _filled(template: MergePlan, values: Mapping[tuple[int, int | None, str], Sequence[float]]) -> MergePlan:
    """The template with the mean of each place's values; of the other groups' where it has none."""
    means = {place: math.fsum(found) / len(found) for place, found in values.items() if found}
    of_all: dict[tuple[int | None, str], list[float]] = {}
    for (_, position, name), value in means.items():
        of_all.setdefault((position, name), []).append(value)
    groups = []
    for index, group in enumerate(template.groups):

        def put(parameters: Mapping[str, Any], position: int | None, index: int = index) -> dict[str, Any]:
            return {
                name: means.get((index, position, name), math.fsum(rest) / len(rest))
                if (index, position, name) in values and (rest := of_all[position, name])
                else value
                for name, value in parameters.items()
            }

        sources = tuple(
            replace(s, parameters=put(s.parameters, position)) for position, s in enumerate(group.sources)
        )
        groups.append(replace(group, sources=sources, parameters=put(group.parameters, None)))
    return replace(template, groups=tuple(groups))
