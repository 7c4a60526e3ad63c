"""Tensor groups: which tensors of a checkpoint share their merge parameters. The one place that knows architectures.

Layers and what comes before and after them are read from mergekit's architecture definitions; inside a layer, and for
architectures that mergekit does not know, the tensors' names tell attention, MLP and norms apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from shoal.errors import CheckpointError
from shoal.merge.checkpoint import Parent
from shoal.types import GroupKind, TensorGroup

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
# checked in this order: `post_attention_layernorm` is a norm, `attn.q_norm` too; BERT's `intermediate` and the `output`
# beside its attention are the MLP
_KINDS: tuple[tuple[GroupKind, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm|(?:^|[._])ln_?\w*(?:\.|$)", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|feed_?forward|ffn|expert|moe|(?:^|\.)fc\d?\.|(?:^|\.)router\.", re.IGNORECASE)),
    ("attn", re.compile(r"attn|attention|[qkvo]_proj|query_key_value", re.IGNORECASE)),
    ("mlp", re.compile(r"^intermediate\.|^output\.dense\.|DenseReluDense|DenseGatedActDense")),
)
# what stands beside a language model in one checkpoint; its layers are not the text's
_BESIDE = re.compile(
    r"^(?:.*?\.)?(?:embed_)?(?:vision|visual|image|video|audio|speech|multi_?modal)\w*(?=\.)"
)
_TEXT_MODULES = ("default", "text_model", "text_decoder", "language_model", "text")
Places = dict[str, tuple[int | None, GroupKind]]
_ORDER: tuple[GroupKind, ...] = ("attn", "mlp", "norm", "other")


def tensor_groups(parent: Parent, notes: list[str] | None = None) -> tuple[TensorGroup, ...]:
    """The groups of a checkpoint: embed, layers.0.attn, layers.0.mlp, layers.0.norm, ..., norm, head, other.

    Every tensor of the checkpoint is in exactly one group; empty groups are left out. What a user should know about
    how they came about is appended to `notes`.
    """
    notes = [] if notes is None else notes
    names = frozenset(parent.names)
    known = _known(parent, names, notes)
    places, one_module = known if known is not None else ({}, True)
    if known is None:
        architecture = (parent.config.get("architectures") or ["unknown"])[0]
        notes.append(f"{architecture}: unknown to mergekit; tensor groups come from tensor names")
    rest = [n for n in parent.names if n not in places]
    if one_module:
        for component in sorted({c for n in rest if (c := _component(n)) is not None}):
            notes.append(_whole(component))
    found: dict[tuple[int | None, GroupKind], list[str]] = {}
    for name in (*places, *rest):
        # in a model of several components a layer's number says nothing by itself
        place = places.get(name) or (_from_name(name) if one_module else (None, "other"))
        found.setdefault(place, []).append(name)
    groups = tuple(
        TensorGroup(_label(layer, kind), layer, kind, tuple(found[layer, kind]))
        for layer, kind in _order(found)
        if (layer, kind) in found
    )
    if sum(len(g.tensors) for g in groups) != len(parent.names):
        raise CheckpointError(f"{parent.path}: internal error: groups do not cover its tensors exactly once")
    return groups


def mergekit_names(parent: Parent) -> dict[str, tuple[str, ...]]:
    """What mergekit calls the tensors of each group; differs from the checkpoint where transformers fuses experts."""
    known = _known(parent, None, [])
    found: dict[str, list[str]] = {}
    for name, (layer, kind) in (known[0] if known is not None else {}).items():
        found.setdefault(_label(layer, kind), []).append(name)
    return {group: tuple(names) for group, names in found.items()}


def _label(layer: int | None, kind: GroupKind) -> str:
    return kind if layer is None else f"layers.{layer}.{kind}"


def _order(found: Iterable[tuple[int | None, GroupKind]]) -> list[tuple[int | None, GroupKind]]:
    layers = sorted({layer for layer, _ in found if layer is not None})
    outer: list[tuple[int | None, GroupKind]] = [
        (None, "norm"),
        (None, "head"),
        (None, "attn"),
        (None, "mlp"),
    ]
    return [(None, "embed"), *((i, kind) for i in layers for kind in _ORDER), *outer, (None, "other")]


def _kind(name: str) -> GroupKind:
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def _component(name: str) -> str | None:
    """The component that is no language model (`model.visual`) in which a tensor lies."""
    layer = _LAYER.search(name)
    match = _BESIDE.search(name if layer is None else f"{name[: layer.start()]}.")
    return None if match is None else match.group()


def _whole(component: str) -> str:
    return f"component {component!r} is merged as a whole, in group 'other'"


def _from_name(name: str) -> tuple[int | None, GroupKind]:
    if _component(name) is not None:
        return None, "other"
    if match := _LAYER.search(name):
        return int(match.group(1)), _kind(name[match.end() :])
    if re.search(r"(?:^|\.)(?:lm_head|embed_out|head|score|classifier|output|cls)\.", name):
        return None, "head"
    if re.search(r"(?:^|\.)(?:\w*embed\w*|w[tp]e)\.", name):
        return None, "embed"
    return None, "norm" if _kind(name) == "norm" else "other"


def _known(parent: Parent, names: frozenset[str] | None, notes: list[str]) -> tuple[Places, bool] | None:
    """Place of each tensor that mergekit's definition names, and whether it is one component; None without one.

    names: those of the checkpoint, to which the definition's are reduced; None: the definition's own.
    """
    from mergekit.architecture import arch_info_for_config
    from mergekit.architecture.base import ConfiguredModelArchitecture
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(parent.path, local_files_only=True, trust_remote_code=False)
        info = arch_info_for_config(config) if len(config.architectures or ()) == 1 else None
    except (ValueError, KeyError, OSError):  # a model type that transformers does not know either
        return None
    if info is None:
        return None
    architecture = ConfiguredModelArchitecture(info=info, config=config)
    places: Places = {}
    for module_name in info.modules:
        module = architecture.get_module(module_name)
        if module_name not in _TEXT_MODULES:
            notes.append(_whole(module_name))
            for weight in module.all_weights():
                _place(places, weight, (None, "other"), names)
            continue
        for weight in module.pre_weights():
            _place(places, weight, (None, "embed"), names)
        for index in range(module.num_layers()):
            for weight in module.layer_weights(index):
                tail = _LAYER.split(weight.name)[-1]
                _place(places, weight, (index, _kind(tail)), names)
        for weight in module.post_weights():
            kind: GroupKind = "norm" if _kind(weight.name) == "norm" else "head"
            _place(places, weight, (None, kind), names)
    return places, len(info.modules) == 1


def _place(
    places: Places, weight: Any, place: tuple[int | None, GroupKind], names: frozenset[str] | None
) -> None:
    if names is None:
        places.setdefault(weight.name, place)
        return
    for name in (weight.name, *(weight.aliases or ())):
        if name in names:
            places.setdefault(name, place)
