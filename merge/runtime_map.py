"""Where the tensors of a checkpoint live in the runtime model: read from transformers' own conversion table, then checked.

transformers renames tensors at load and makes one parameter of several (the experts of a layer, say). Where a parameter
is the tensors themselves, stacked, joined or transposed, every tensor is a view of it. Places are derived, never
guessed from values: experts of an upcycled model are equal to each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from shoal.merge.checkpoint import Parent

_View = Callable[[Tensor], Tensor]
# what transformers itself passes over in old checkpoints, besides the patterns that a model class gives
_IGNORED = (r"rotary_emb\.inv_freq$", r"(?:^|\.)position_ids$")


class _NoMap(Exception):
    """Why there is no map, in words."""


@dataclass(frozen=True)
class _Made:
    """A tensor made of checkpoint tensors. parts: name -> the views, one after the other, that lead from it to them."""

    shape: tuple[int, ...]
    parts: Mapping[str, tuple[_View, ...]]


def runtime_map(model: nn.Module, base: Parent) -> tuple[dict[str, Tensor], str | None]:
    """Where each tensor of `base` lives in `model`: checkpoint name -> view, and why not where there is no map.

    A view has the tensor's shape and shares memory with a parameter or buffer; it need not be contiguous. Writing all
    of them is loading the model: they cover every parameter, no element twice. Twins of tied weights lead to the one
    shared parameter. Tensors that transformers knowingly passes over (masks in old checkpoints) lead to a tensor of
    their own that nothing reads.

    A map is believed only after a round trip: the model, as loaded, must hold the base's tensors at the mapped places.
    """
    try:
        return _checked(model, base, _derived(model, base)), None
    except _NoMap as reason:
        return {}, str(reason)
    except ImportError as error:  # another version of transformers; the table is no public interface
        return {}, f"transformers' table of conversions cannot be read ({error})"


def _derived(model: nn.Module, base: Parent) -> dict[str, tuple[str, _Made]]:
    """What transformers makes of the checkpoint: runtime name -> the first of its tensors, and all that it is made of."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    table = get_model_conversion_mapping(model)
    renamings = [t for t in table if isinstance(t, WeightRenaming)]
    converters = [t for t in table if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    held = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    collected: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(base.names, key=dot_natural_key):  # the order in which experts are stacked
        key, pattern = rename_source_key(name, renamings, converters, prefix, held)
        if key not in held and name in held:
            key, pattern = rename_source_key(name, [], [], prefix, held)
        collected.setdefault(key, {}).setdefault(pattern, []).append(name)
    found: dict[str, tuple[str, _Made]] = {}
    for key, by_source in collected.items():
        names = [name for names in by_source.values() for name in names]
        if key not in held:
            made = _Made((), {name: () for name in names})
        elif None not in by_source:
            converter = by_pattern[next(iter(by_source))]
            tensors = {p: [_Made(base.shape(n), {n: ()}) for n in ns] for p, ns in by_source.items()}
            try:
                made = _converted(converter, tensors, tuple(held[key].shape))
            except (ValueError, IndexError):  # not understood, or dimensions that the tensors do not have
                operations = ", ".join(type(o).__name__ for o in converter.operations)
                raise _NoMap(f"tensor {names[0]!r} is converted by {operations} at load") from None
        elif len(names) == 1:
            made = _Made(base.shape(names[0]), {names[0]: ()})
        else:
            raise _NoMap(f"tensors {names[0]!r} and {names[1]!r} are both {key!r} in {type(model).__name__}")
        found[key] = names[0], made
    return found


def _converted(converter: Any, tensors: dict[Any, list[_Made]], wanted: tuple[int, ...]) -> _Made:
    """The one tensor that a converter makes of those of each source pattern; ValueError where that is not understood.

    wanted: shape of the runtime parameter.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

    if type(converter) is not WeightConverter or len(converter.target_patterns) != 1:
        raise ValueError  # split over several parameters: no one view
    for operation in converter.operations:
        if type(operation) is MergeModulelist:
            tensors = {pattern: [_stacked(each, operation.dim)] for pattern, each in tensors.items()}
        elif type(operation) is Concatenate:
            parts = [t for p in converter.source_patterns for t in tensors.get(p, [])]
            tensors = {None: [_joined(parts, operation.dim)]}
        elif type(operation) is Transpose:
            ((tensor,),) = tensors.values()
            if not (getattr(operation, "check_dims", False) and tensor.shape == wanted):
                tensors = {None: [_transposed(tensor, operation.dim0, operation.dim1)]}
        else:
            raise ValueError
    ((made,),) = tensors.values()
    return made


def _stacked(tensors: Sequence[_Made], dim: int) -> _Made:
    (shape,) = {t.shape for t in tensors}
    dim %= len(shape) + 1
    parts: dict[str, tuple[_View, ...]] = {}
    for index, tensor in enumerate(tensors):
        step = methodcaller("select", dim, index)
        parts |= {name: (step, *steps) for name, steps in tensor.parts.items()}
    return _Made((*shape[:dim], len(tensors), *shape[dim:]), parts)


def _joined(tensors: Sequence[_Made], dim: int) -> _Made:
    (rank,) = {len(t.shape) for t in tensors}
    if not rank:
        raise ValueError
    dim %= rank
    ((before, after),) = {(t.shape[:dim], t.shape[dim + 1 :]) for t in tensors}
    parts: dict[str, tuple[_View, ...]] = {}
    start = 0
    for tensor in tensors:
        step = methodcaller("narrow", dim, start, tensor.shape[dim])
        parts |= {name: (step, *steps) for name, steps in tensor.parts.items()}
        start += tensor.shape[dim]
    return _Made((*before, start, *after), parts)


def _transposed(tensor: _Made, first: int, second: int) -> _Made:
    shape = list(tensor.shape)
    shape[first], shape[second] = shape[second], shape[first]
    step = methodcaller("transpose", first, second)
    return _Made(tuple(shape), {name: (step, *steps) for name, steps in tensor.parts.items()})


def _checked(model: nn.Module, base: Parent, made: Mapping[str, tuple[str, _Made]]) -> dict[str, Tensor]:
    """The views of a derived map, after the round trip."""
    where = type(model).__name__
    held = model.state_dict()  # detached, and still the parameters' own memory
    found: dict[str, Tensor] = {}
    filled: set[int] = set()
    for key, (first, tensor) in made.items():
        if key not in held:
            if not _ignored(model, key):
                raise _NoMap(f"tensor {first!r} has no parameter of its own in {where}")
            found |= {name: base.tensor(name).clone() for name in tensor.parts}
            continue
        parameter = held[key]
        if tuple(parameter.shape) != tensor.shape:
            raise _NoMap(f"tensor {first!r} has another shape in {where}")
        views = {name: _follow(parameter, steps) for name, steps in tensor.parts.items()}
        for name, view in views.items():
            expected = base.tensor(name).to(device=view.device, dtype=view.dtype)
            if tuple(view.shape) != base.shape(name):
                raise _NoMap(f"tensor {name!r} has another shape in {where}")
            if not torch.equal(view, expected):
                raise _NoMap(f"tensor {name!r} has other values in {where}")
        if not _tiles(list(views.values()), parameter):
            raise _NoMap(f"tensors like {first!r} do not fill {key!r} of {where} exactly once")
        found |= views
        filled.add(parameter.data_ptr())
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.data_ptr() not in filled:
            raise _NoMap(f"parameter {name!r} of {where} is filled by no tensor")
    return found


def _follow(tensor: Tensor, steps: Sequence[_View]) -> Tensor:
    for step in steps:
        tensor = step(tensor)
    return tensor


def _tiles(views: Sequence[Tensor], parameter: Tensor) -> bool:
    """Whether the views hold every element of the parameter exactly once; asked of their memory, not of how they came."""
    if sum(v.numel() for v in views) != parameter.numel():
        return False
    if len(views) == 1:
        return True
    if not parameter.is_contiguous():
        return False
    seen = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
    for view in views:
        offset = view.storage_offset() - parameter.storage_offset()
        seen.as_strided(view.shape, view.stride(), offset).fill_(True)
    return bool(seen.all())


def _ignored(model: nn.Module, key: str) -> bool:
    patterns = (*_IGNORED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    return any(re.search(pattern, key) for pattern in patterns)
