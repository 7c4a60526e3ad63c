"""Checkpoints in, merged weights out. Names are loaded when first used: this import costs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shoal.calling import make_callable
from shoal.merge.methods import METHODS, Method, Resolved, check_plan, method, resolved

if TYPE_CHECKING:
    from shoal.merge.adapter import Adapter, open_parent
    from shoal.merge.checkpoint import Checkpoint, Parent
    from shoal.merge.compatible import check_compatible, check_tokenizers
    from shoal.merge.groups import tensor_groups
    from shoal.merge.hashing import weights_sha256
    from shoal.merge.mergekit_bridge import merge_mergekit_config
    from shoal.merge.mergekit_yaml import to_mergekit
    from shoal.merge.resident import Merger
    from shoal.merge.runtime import load_runtime, torch_dtype
    from shoal.merge.writer import write_model

make_callable(__name__)

__all__ = [
    "METHODS",
    "Adapter",
    "Checkpoint",
    "Merger",
    "Method",
    "Parent",
    "Resolved",
    "check_compatible",
    "check_plan",
    "check_tokenizers",
    "load_runtime",
    "merge_mergekit_config",
    "method",
    "open_parent",
    "resolved",
    "tensor_groups",
    "to_mergekit",
    "torch_dtype",
    "weights_sha256",
    "write_model",
]

_HOMES = {
    "Adapter": "adapter",
    "Checkpoint": "checkpoint",
    "Merger": "resident",
    "Parent": "checkpoint",
    "check_compatible": "compatible",
    "check_tokenizers": "compatible",
    "load_runtime": "runtime",
    "merge_mergekit_config": "mergekit_bridge",
    "open_parent": "adapter",
    "tensor_groups": "groups",
    "to_mergekit": "mergekit_yaml",
    "torch_dtype": "runtime",
    "weights_sha256": "hashing",
    "write_model": "writer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shoal.merge' has no attribute {name!r}")
    return getattr(import_module(f"shoal.merge.{_HOMES[name]}"), name)
