"""The commonest mergekit YAML, planned without mergekit, whose import takes longer than many a merge.

Plain is: `models` of one architecture with the same tensors, numbers as parameters, a method with kernels of our own.
Then a merge is the same formula for every stored tensor and no definition of the architecture is needed, so that
models which mergekit's own definitions refuse are merged too. Everything else returns None here and goes to
`mergekit_plan`; so do mistakes, for which mergekit's words are as good as ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.errors import CheckpointError, RecipeError
from shoal.merge.checkpoint import Parent
from shoal.merge.compatible import check_compatible
from shoal.merge.mergekit_models import fetched, open_folder
from shoal.merge.methods import METHODS, Method, check_plan, is_native
from shoal.merge.resident import Merger, Output
from shoal.merge.runtime import torch_dtype
from shoal.merge.tensors import Target
from shoal.merge.writer import MERGEKIT_CONFIG, TOKENIZER_FILES, copy_files, write_json
from shoal.types import MergePlan, OutputGroup, Source

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
# parameters that change nothing in the result: by method, and for all of them
NO_EFFECT = {"task_arithmetic": ("density", "rescale")}
NEVER = ("int8_mask",)  # how much memory mergekit's masks take
_KEYS = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "name"}
_DTYPES = {n: torch_dtype(n) for n in ("float32", "bfloat16", "float16")}
# files of a model that mergekit has rules of its own for
_OTHER_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_BUFFERS = (".inv_freq", ".masked_bias", ".position_ids")


@dataclass(frozen=True)
class Plain:
    """A plain configuration, planned. names: of the models as the YAML has them; donor: gives config and tokenizer."""

    merger: Merger
    plans: tuple[MergePlan, ...]
    method: str
    names: tuple[str, ...]
    donor: Path
    dtype: str | None  # to write into config.json
    notes: tuple[str, ...]
    by_mergekit: Mapping[str, int]

    def outputs(self) -> tuple[Output, ...]:
        """The tensors in the order in which `fill` makes them."""
        return tuple(o for plan in self.plans for o in self.merger.outputs(plan))

    def fill(self, into: Callable[[Output], Target], seed: int = 0) -> Iterator[Output]:
        """Write every tensor into what `into` gives; yields each when it is complete. seed: is in the plans."""
        for plan in self.plans:
            yield from self.merger.fill(plan, into)

    def write_files(self, folder: Path, text: str, name: str) -> list[str]:
        """Everything but the weights; nothing to add in words."""
        config = json.loads((self.donor / "config.json").read_text(encoding="utf-8"))
        if self.dtype is not None:
            config["dtype"] = self.dtype
            if "torch_dtype" in config:  # the name before transformers 5, still read by older tools
                config["torch_dtype"] = self.dtype
        write_json(folder / "config.json", config)
        copy_files(self.donor, folder, (*TOKENIZER_FILES, "generation_config.json"))
        (folder / MERGEKIT_CONFIG).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(self._card(text, name), encoding="utf-8")
        return []

    def _card(self, text: str, name: str) -> str:
        hub = [n for n in self.names if not Path(n).exists()]
        head = ["library_name: transformers", "tags:", "- mergekit", "- merge", "- shoal"]
        if hub:
            head = ["base_model:", *(f"- {n.partition('@')[0]}" for n in hub), *head]
        models = "\n".join(f"- {n}" for n in self.names)
        fence = "```"
        return (
            "---\n" + "\n".join(head) + f"\n---\n# {name}\n\nA merge by shoal, method `{self.method}`, of\n\n"
            f"{models}\n\nfrom this mergekit configuration:\n\n{fence}yaml\n{text.rstrip()}\n{fence}\n"
        )


def plan_plain(data: Mapping[str, Any], seed: int = 0) -> Plain | None:
    """The plan of the configuration `data`, or None where it is not plain. seed: of random masks."""
    chosen = METHODS.get(str(data.get("merge_method")))
    if chosen is None or not _is_plain(data, chosen):
        return None
    base_name = data.get("base_model")
    listed = [entry["model"] for entry in data["models"]]
    names = [base_name, *(n for n in listed if n != base_name)] if base_name is not None else listed
    if len(set(names)) != len(names):
        return None
    try:
        folders = [fetched(path, revision, name) for name in names for path, revision in _parts(name)]
        parents = [open_folder(folder) for folder in folders]
        check_compatible(list(zip(names, parents, strict=True)))
    except CheckpointError:
        return None
    donor = folders[0]
    if not _ordinary(parents, donor):
        return None
    base = 0 if base_name is not None else None
    parameters = {e["model"]: e.get("parameters") or {} for e in data["models"]}
    try:
        shared, own = _values(
            chosen, data.get("parameters") or {}, [parameters[n] for n in names[0 if base is None else 1 :]]
        )
        plans, notes = _plans(chosen, names, base, parents, data, shared, own, seed)
        for plan in plans:
            check_plan(plan)
    except RecipeError:
        return None
    if not all(is_native(g) for plan in plans for g in plan.groups):
        return None
    dtypes = {plan.dtype for plan in plans}
    written = data.get("out_dtype") or data.get("dtype") or (dtypes.pop() if len(dtypes) == 1 else None)
    return Plain(Merger(parents, ()), plans, chosen.name, tuple(names), donor, written, notes, {})


def _is_plain(data: Mapping[str, Any], chosen: Method) -> bool:
    entries = data.get("models")
    wants_base = {"required": True, "none": False, "optional": False}[chosen.base]
    return (
        chosen.native
        and chosen.name != "passthrough"
        and not data.keys() - _KEYS
        and isinstance(entries, list)
        and bool(entries)
        and all(isinstance(e, dict) and not e.keys() - {"model", "parameters"} for e in entries)
        and all(_parts(e.get("model")) for e in entries)
        and ((data.get("base_model") is not None) == wants_base)
        and (not wants_base or bool(_parts(data["base_model"])))
        and all(data.get(k) is None or data[k] in _DTYPES for k in ("dtype", "out_dtype"))
        and all(_numbers(p) for p in (data.get("parameters"), *(e.get("parameters") for e in entries)))
    )


def _numbers(values: Any) -> bool:
    return values is None or (
        isinstance(values, dict)
        and all(isinstance(v, bool | int | float) and math.isfinite(v) for v in values.values())
    )


def _parts(name: Any) -> list[tuple[str, str | None]]:
    """Path or Hub id, and revision; nothing for what needs mergekit's reading (adapters)."""
    if not isinstance(name, str) or not name or "+" in name or (Path(name).exists() and "@" in name):
        return []
    path, _, revision = name.partition("@")
    return [(path, revision or None)]


def _ordinary(parents: Sequence[Parent], donor: Path) -> bool:
    """Whether every stored tensor is a weight of the model, and the files beside them are the common ones."""
    first = parents[0]
    tokenizer = (donor / "tokenizer_config.json").is_file() and any(
        (donor / n).is_file() for n in ("tokenizer.json", "tokenizer.model")
    )
    return (
        tokenizer
        and not any((donor / n).is_file() for n in _OTHER_FILES)
        # mergekit leaves buffers out, and writes experts as transformers fuses them
        and not any(n.endswith(_BUFFERS) or ".experts." in n for n in first.names)
        and all(p.dtype(n) in _DTYPES.values() for p in parents for n in p.names)
    )


def _values(
    chosen: Method, common: Mapping[str, Any], own: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Parameters of the group and of each source, mergekit's defaults filled in; RecipeError where one is missing."""
    ignored = (*NEVER, *NO_EFFECT.get(chosen.name, ()))
    by_source = [p.name for p in chosen.parameters if p.scope == "source"]
    by_group = [p.name for p in chosen.parameters if p.scope == "group"]
    defaults = {p.name: p.default for p in chosen.parameters} | {"density": 1.0}
    known = {*by_source, *by_group, *chosen.options, *ignored}
    if any(set(v) - known for v in (common, *own)) or any(set(v) - {*by_source, *ignored} for v in own):
        raise RecipeError("a parameter that mergekit must judge")
    sources = []
    for values in own:
        found = {n: values.get(n, common.get(n, defaults[n])) for n in by_source}
        if any(v is None for v in found.values()):
            raise RecipeError("a required parameter is missing")
        sources.append({n: float(v) for n, v in found.items()})
    if "t" in by_group and "t" not in common:
        raise RecipeError("a required parameter is missing")
    shared = {n: common[n] for n in (*by_group, *chosen.options) if n in common}
    return shared, sources


def _plans(
    chosen: Method,
    names: Sequence[str],
    base: int | None,
    parents: Sequence[Parent],
    data: Mapping[str, Any],
    shared: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
    seed: int,
) -> tuple[tuple[MergePlan, ...], tuple[str, ...]]:
    merged = [m for m in range(len(parents)) if m != base]
    groups: dict[str, list[OutputGroup]] = {}
    rounded = False
    for name in sorted(parents[0].names):
        promoted = parents[0].dtype(name)
        for parent in parents[1:]:
            promoted = torch.promote_types(promoted, parent.dtype(name))
        computed = _DTYPES[data["dtype"]] if data.get("dtype") else promoted
        final = _DTYPES[data["out_dtype"]] if data.get("out_dtype") else computed
        rounded |= computed != torch.float32
        sources = tuple(Source(m, name, values) for m, values in zip(merged, own, strict=True))
        groups.setdefault(str(final).removeprefix("torch."), []).append(
            OutputGroup(name, chosen.name, sources, (name,), shared)
        )
    drawn = chosen.name in RANDOM and any(0 < p.get("density", 1.0) < 1 for p in own)
    plans = tuple(MergePlan(tuple(names), base, tuple(g), d, seed) for d, g in groups.items())
    return plans, tuple(arithmetic_notes(chosen.name, drawn, rounded, seed))


def arithmetic_notes(method: str, drawn: bool, rounded: bool, seed: int) -> list[str]:
    """What differs from mergekit's bits, in words."""
    notes = []
    if drawn:
        notes.append(f"{method} draws masks of its own (seed {seed}): another draw than mergekit's")
    if rounded:
        notes.append("computed in float32 and rounded once, where mergekit rounds every step")
    return notes
