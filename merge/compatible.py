"""Do these models fit together? Every answer no is one error that names model, tensor, expected and found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import CheckpointError
from shoal.merge.checkpoint import Parent

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_SPECIAL = ("bos", "eos", "pad", "unk")
_ALIGN = (
    "align the vocabularies first, with mergekit's tokenizer options (tokenizer: {source: ...}) in a YAML through "
    "`shoal merge CONFIG -o DIR`, then evolve from the result"
)


def check_compatible(parents: Sequence[tuple[str, Parent]]) -> None:
    """Same architecture, depth, tensor names and shapes as the first of `parents`, or CheckpointError."""
    (first_name, first), *others = parents
    for name, parent in others:
        pair = f"model {name!r} does not fit {first_name!r}"
        for what, key in (("architecture", _architecture), ("number of layers", _layers)):
            expected, found = key(first.config), key(parent.config)
            if expected != found:
                raise CheckpointError(
                    f"{pair}: expected {what} {expected}, found {found}; merge models of one architecture and size"
                )
        if missing := sorted(set(first.names) - set(parent.names)):
            raise CheckpointError(
                f"{pair}: expected tensor {missing[0]!r}, found none ({len(missing)} missing); "
                "take it out of the recipe, or use a model fine-tuned from the same base"
            )
        if extra := sorted(set(parent.names) - set(first.names)):
            raise CheckpointError(
                f"{pair}: it holds tensor {extra[0]!r}, which {first_name!r} lacks ({len(extra)} more); "
                "take it out of the recipe, or use a model fine-tuned from the same base"
            )
        for tensor in first.names:
            if first.shape(tensor) != parent.shape(tensor):
                advice = _ALIGN if _vocabularies_differ(first, parent, tensor) else "merge models of one size"
                raise CheckpointError(
                    f"{pair}: tensor {tensor!r}: expected shape {first.shape(tensor)}, found {parent.shape(tensor)}; "
                    f"{advice}"
                )
            if first.dtype(tensor).is_floating_point != parent.dtype(tensor).is_floating_point:
                raise CheckpointError(
                    f"{pair}: tensor {tensor!r}: expected dtype {first.dtype(tensor)}, found {parent.dtype(tensor)}; "
                    "use the unquantised model"
                )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [config.get("model_type", "unknown")]
    return str(names[0])


def _layers(config: Mapping[str, Any]) -> int | None:
    for scope in (config, config.get("text_config") or {}):
        for key in _LAYERS:
            if key in scope:
                return int(scope[key])
    return None


def _vocabularies_differ(first: Parent, other: Parent, tensor: str) -> bool:
    """Whether the tensor has another shape only because the models have other vocabularies."""
    expected, found = first.shape(tensor), other.shape(tensor)
    sizes = ((_vocabulary(first),), (_vocabulary(other),))
    return expected[1:] == found[1:] and (expected[:1], found[:1]) == sizes


def _vocabulary(parent: Parent) -> int | None:
    for scope in (parent.config, parent.config.get("text_config") or {}):
        if "vocab_size" in scope:
            return int(scope["vocab_size"])
    return None


def check_tokenizers(models: Sequence[tuple[str, Path]]) -> None:
    """Same vocabulary (token -> id) and special tokens as the first of `models`, or CheckpointError.

    Only the tokenizer is compared: generation settings and chat templates may differ.
    """
    first_name, first_path = models[0]
    first = _tokenizer(first_name, first_path)
    vocabulary: Mapping[str, int] = first.get_vocab()
    for name, path in models[1:]:
        tokenizer = _tokenizer(name, path)
        found: Mapping[str, int] = tokenizer.get_vocab()
        pair = f"model {name!r}: its tokenizer is not that of {first_name!r}"
        advice = f"merging needs one vocabulary: take it out of the recipe, or {_ALIGN}"
        for token in sorted(vocabulary.keys() | found.keys()):
            if vocabulary.get(token) != found.get(token):
                raise CheckpointError(
                    f"{pair}: token {token!r}: expected id {vocabulary.get(token, 'none')}, "
                    f"found {found.get(token, 'none')}; {advice}"
                )
        for kind in _SPECIAL:
            expected_id, found_id = getattr(first, f"{kind}_token_id"), getattr(tokenizer, f"{kind}_token_id")
            if expected_id != found_id:
                raise CheckpointError(
                    f"{pair}: {kind} token: expected id {expected_id} ({getattr(first, f'{kind}_token')!r}), "
                    f"found {found_id} ({getattr(tokenizer, f'{kind}_token')!r}); "
                    "give it the same special tokens, or take it out of the recipe"
                )


def _tokenizer(name: str, path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (
        Exception
    ) as error:  # transformers raises whatever its tokenizers raise; all of it means the same here
        raise CheckpointError(f"model {name!r}: no tokenizer can be loaded from {path}: {error}") from error
