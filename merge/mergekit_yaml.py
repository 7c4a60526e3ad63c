"""MergePlan -> a mergekit configuration: as YAML for its users, as a mapping for our own bridge. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from shoal.errors import RecipeError
from shoal.merge.methods import Method, check_plan, method, resolved
from shoal.types import MergePlan, OutputGroup

if TYPE_CHECKING:
    from shoal.merge.checkpoint import Parent

_ELEMENTWISE = ("linear", "task_arithmetic", "passthrough", "nearswap", "ram")
_RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def to_mergekit(
    plan: MergePlan,
    model_refs: Sequence[str],
    tokenizer_source: str = "base",
    chat_template: str | None = None,
    parent: Parent | None = None,
) -> str:
    """The plan as a YAML that plain mergekit (`mergekit-yaml FILE OUT`) understands.

    model_refs: what mergekit shall load for each of plan.models: a repository, `repository@revision`, a folder, or
    `model+adapter`. tokenizer_source: `base` copies the base's tokenizer (what mergekit does when the YAML names no
    source; its own `base` cuts padded embeddings to the vocabulary); `union` or a model are passed on.
    parent: any parent of the plan; needed for architectures whose experts transformers fuses at load (Mixtral,
    Qwen3-MoE, ...), because mergekit filters by the fused names.
    RecipeError for plans that mergekit has no words for (several methods, layers from elsewhere).
    """
    names: Mapping[str, Sequence[str]] = {}
    if parent is not None:
        from shoal.merge.groups import mergekit_names

        names = mergekit_names(parent)
    config = config_of(plan, model_refs, names)
    if tokenizer_source != "base":
        config["tokenizer_source"] = tokenizer_source
    if chat_template:
        config["chat_template"] = chat_template
    head = "".join(f"# {line}\n" for line in _head(plan, model_refs, names))
    return head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)


def _head(plan: MergePlan, model_refs: Sequence[str], names: Mapping[str, Sequence[str]]) -> list[str]:
    name = method(plan.groups[0].operator).name
    lines = ["Written by shoal for plain mergekit (0.1.5)."]
    if name in _RANDOM and method(name).native:
        lines.append(
            "mergekit draws other random masks than shoal: it makes another draw of the same method,"
        )
        lines.append("not the weights that were scored. Rebuild those with shoal, from the lock.")
    elif name in _RANDOM:
        lines.append(
            f"The method draws random masks: use --random-seed; other seeds give another draw ({plan.seed})."
        )
    elif not method(name).native:
        lines.append(
            "shoal merged these weights with mergekit itself; on the same machine the result is the same."
        )
    elif plan.dtype == "float32":
        lines.append("Gives the weights that shoal made, within 1e-6 of each tensor's largest value.")
    else:
        lines.append(f"Gives the weights that shoal made, within 1 ulp of {plan.dtype}.")
    known = {name for g in plan.groups for name in g.tensors}
    if name not in _ELEMENTWISE and any(
        "expert" in n and n not in known for ns in names.values() for n in ns
    ):
        lines.append(
            "But mergekit fuses the experts of a layer into one tensor first, shoal merges each by itself:"
        )
        lines.append("their weights differ.")
    if any("+" in ref for ref in model_refs):
        lines.append(
            "LoRA parents: merge with `--lora-merge-dtype float32 --lora-merge-cache DIR`, as shoal does."
        )
    return lines


def config_of(
    plan: MergePlan, model_refs: Sequence[Any], names: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """mergekit's configuration as a mapping; `model_refs` may be anything that mergekit takes as a model.

    names: by group, what mergekit calls its tensors, where that is not what the checkpoint calls them.
    """
    check_plan(plan)
    if len(model_refs) != len(plan.models):
        raise RecipeError(
            f"the plan has {len(plan.models)} models, found {len(model_refs)} references to them"
        )
    chosen, models = _uniform(plan)
    parameters = [resolved(g) for g in plan.groups]
    filters = _filters(plan.groups, names or {})
    entries: list[dict[str, Any]] = []
    for position, model in enumerate(models):
        entry: dict[str, Any] = {"model": model_refs[model]}
        own = [p.name for p in chosen.parameters if p.scope == "source"]
        if own:
            entry["parameters"] = {
                n: _setting(plan.groups, filters, [p.per_source[position][n] for p in parameters])
                for n in own
            }
        entries.append(entry)
    base = _base(plan, chosen, models)
    if chosen.name == "linear" and base is not None and base not in models:
        # mergekit's linear counts a base as one of the models; with weight 0 it only gives config and tokenizer
        entries.append({"model": model_refs[base], "parameters": {"weight": 0.0}})
    config: dict[str, Any] = {"merge_method": chosen.name, "models": entries}
    if base is not None:
        config["base_model"] = model_refs[base]
    if shared := list(parameters[0].shared):
        config["parameters"] = {
            n: _setting(plan.groups, filters, [p.shared[n] for p in parameters]) for n in shared
        }
    return {**config, "dtype": "float32", "out_dtype": plan.dtype}


def _uniform(plan: MergePlan) -> tuple[Method, tuple[int, ...]]:
    operators = sorted({method(g.operator).name for g in plan.groups})
    models = {tuple(s.model for s in g.sources) for g in plan.groups}
    moved = next((g.name for g in plan.groups for s in g.sources if s.group != g.name), None)
    if len(operators) != 1 or len(models) != 1 or moved is not None:
        what = f"methods {operators}" if len(operators) != 1 else "other sources in some groups"
        raise RecipeError(
            f"a mergekit YAML has one method and the same sources for all tensors; this plan has "
            f"{what if moved is None else f'group {moved!r} from another group'}; rebuild it with shoal instead"
        )
    return method(operators[0]), models.pop()


def _base(plan: MergePlan, chosen: Method, models: tuple[int, ...]) -> int | None:
    """mergekit takes config and tokenizer from the base; without one, from whichever model a set yields first."""
    if chosen.base != "none":
        return plan.base
    if chosen.name == "linear" and plan.base is not None:
        return plan.base
    return plan.base if plan.base in models else models[0]


Filters = Mapping[str, tuple[str, ...]]


def _setting(groups: Sequence[OutputGroup], filters: Filters, values: Sequence[float | bool]) -> Any:
    if all(v == values[0] for v in values):
        return values[0]
    pairs = [(f, v) for g, v in zip(groups, values, strict=True) for f in filters[g.name]]
    # mergekit takes the first filter that is a substring of the name: longer ones first, so none is shadowed
    pairs.sort(key=lambda pair: -len(pair[0]))
    # what the plan does not know (a stored copy of a tied head) is merged like the embedding
    rest = next((v for g, v in zip(groups, values, strict=True) if g.name == "embed"), values[0])
    return [*({"filter": f, "value": v} for f, v in pairs), {"value": rest}]


def _filters(groups: Sequence[OutputGroup], names: Mapping[str, Sequence[str]]) -> Filters:
    """For each group, substrings that are found in its tensors' names and in no other tensor's."""
    stored = {g.name: list(g.tensors) for g in groups}
    known = {n for tensors in stored.values() for n in tensors}
    fused = {g.name: [n for n in names.get(g.name, ()) if n not in known] for g in groups}
    everything = [n for by_group in (stored, fused) for tensors in by_group.values() for n in tensors]
    filters: dict[str, tuple[str, ...]] = {}
    for group, plain in stored.items():
        own = {*plain, *fused[group]}
        others = [n for n in everything if n not in own]
        # the two kinds of names share no prefix: a filter for each
        filters[group] = (*_shortest(plain, others), *_shortest(fused[group], others))
    ordered = sorted(
        ((f, group) for group, fs in filters.items() for f in fs), key=lambda pair: -len(pair[0])
    )
    for group, plain in stored.items():
        for tensor in (*plain, *fused[group]):
            if next(g for f, g in ordered if f in tensor) != group:
                # full names, longest first, cannot shadow each other
                return {g: (*stored[g], *fused[g]) for g in stored}
    return filters


def _shortest(own: list[str], others: list[str]) -> tuple[str, ...]:
    """The shortest common prefix, cut at a dot, that is in no other name; the full names where there is none."""
    shared = [
        parts[0] for parts in zip(*(n.split(".")[:-1] for n in own), strict=False) if len(set(parts)) == 1
    ]
    steps = (".".join(shared[: i + 1]) + "." for i in range(len(shared)))
    # a part that is shared after one that is not is no prefix
    shortest = next(
        (s for s in steps if all(n.startswith(s) for n in own) and not any(s in n for n in others)), None
    )
    return tuple(own) if shortest is None else (shortest,)
