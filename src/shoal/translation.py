"""What a search of mergekit-evolve is as a recipe, key by key, and every change in meaning that this brings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import CheckpointError, RecipeError
from shoal.mergekit_evolve import EvolveConfig, EvolveTask, Genome
from shoal.recipe import parse_model
from shoal.types import AdapterModel, HubModel

MAX_CURVE = 16  # coefficients of a curve
NON_NEGATIVE, ANY_SIGN = [0.0, 1.5], [-0.5, 1.5]
LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "brier_score", "ter", "wer", "mse", "mae")

# names of tensors that a filter may mean: a whole tensor type of ours, a part of one, or what has no genes of its own
_WHOLE = {
    "self_attn": "attn",
    "attn": "attn",
    "attention": "attn",
    "mlp": "mlp",
    "feed_forward": "mlp",
    "ffn": "mlp",
}
_PART = (
    (re.compile(r"attn|attention|[qkvo]_proj|qkv"), "attn"),
    (re.compile(r"mlp|feed_?forward|ffn|expert|moe|(gate|up|down)_(up_)?proj|fc\d?|\bw[123]\b"), "mlp"),
)
_OUTSIDE = re.compile(r"norm|ln_|embed|wte|wpe|lm_head|head")


@dataclass(frozen=True)
class Change:
    """What one key of theirs means here, or that it is gone. section: the key of the recipe that it stands above."""

    key: str
    section: str
    text: str


@dataclass
class Translation:
    """A recipe in the making: its content in order, what changed, and how their models are written here."""

    data: dict[str, Any] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    spelled: Mapping[str, str] = field(default_factory=dict)

    def say(self, key: str, section: str, text: str) -> None:
        self.changes.append(Change(key, section, " ".join(text.split())))


def translate(
    config: EvolveConfig, path: Path, include_path: str | None, budget: int, layers: int | None
) -> Translation:
    """The recipe that searches what `config` searches. path: of its file, for errors and the name; the others: see
    `import_config`.

    Raises:
        RecipeError: it says what no recipe can say.
    """
    draft = Translation()
    draft.data["name"] = re.sub(r"[^\w.-]+", "-", path.stem).strip("-") or "imported"
    draft.spelled = _models(config.genome, draft, path)
    _merge(config.genome, draft)
    _space(config.genome, draft, path, layers)
    _tasks(config, draft, path)
    _evaluation(config, draft, include_path)
    _search(config, draft, budget)
    _tokenizer(config.genome, draft, path)
    return draft


# --- models and merge


def _models(genome: Genome, draft: Translation, path: Path) -> dict[str, str]:
    """base_model and models; returns their spelling -> ours, of every model that is named anywhere."""
    method, base, models = genome.merge_method, genome.base_model, list(genome.models)
    spelled = {text: _spelling(text) for text in [*models, *([base] if base is not None else [])]}
    if moved := [text for text, ours in spelled.items() if text != ours]:
        draft.say("genome.models", "models", f"folders here, written in full: {', '.join(moved)}")
    if method == "slerp":
        if len(models) != 2:
            raise RecipeError(
                f"{path}: genome.models: slerp of {len(models)} models picks two per block by their genes; a recipe"
                " merges two by slerp: name two models, or use merge_method: linear"
            )
        if base is not None and base not in models:
            draft.say(
                "genome.base_model",
                "base_model",
                f"{base} is dropped: slerp takes two models, and mergekit refuses a third",
            )
        draft.data["base_model"] = spelled[models[0]]
        draft.data["models"] = [spelled[models[1]]]
        draft.say(
            "genome.models",
            "base_model",
            "slerp goes from base_model (t = 0) to the other model (t = 1); there the better of two genes chose the end"
            " and a softmax of both chose t, here t itself is the gene, over the same arc",
        )
        return spelled
    if method == "linear":
        if base is not None:
            kept = (
                "it stays one of the models"
                if base in models
                else "mergekit gives it no weight and then stops"
            )
            draft.say("genome.base_model", "models", f"dropped: linear has no base ({kept})")
    else:
        draft.data["base_model"] = spelled[str(base)]
        if base in models:
            models = [text for text in models if text != base]
            draft.say(
                "genome.models",
                "models",
                f"{base} is the base, so its task vector is zero and its genes did nothing; it is only the base here",
            )
    if len(models) + ("base_model" in draft.data) < 2:
        raise RecipeError(f"{path}: genome.models: a merge needs at least two models, found 1")
    draft.data["models"] = [spelled[text] for text in models]
    return spelled


def _spelling(text: str) -> str:
    """A model as a recipe writes it: mergekit takes whatever is a folder here for one."""

    def part(one: str) -> str:
        if one.startswith("~") or not Path(one).exists():
            return one
        return str(Path(one).resolve())

    return "+".join(part(one) for one in text.split("+"))


def _merge(genome: Genome, draft: Translation) -> None:
    merge: dict[str, Any] = {"method": genome.merge_method, "dtype": "bfloat16"}
    if genome.merge_method != "slerp":
        merge["parameters"] = {"normalize": genome.normalizes}
    draft.data["merge"] = merge
    draft.say(
        "genome.merge_method",
        "merge",
        "weights are written as bfloat16 as there, but computed in float32 and rounded once",
    )
    if genome.merge_method == "dare_ties":
        draft.say(
            "genome.merge_method",
            "merge",
            "random masks are drawn once per run from a seed and nest in density; there every candidate got another draw",
        )


# --- space


def _space(genome: Genome, draft: Translation, path: Path, layers: int | None) -> None:
    blocks = _blocks(genome, draft, path, layers)
    space: dict[str, Any]
    smooth = genome.smooth and blocks != 1
    if blocks == 1:
        space = {"shape": "uniform"}
    elif smooth and genome.layer_granularity > 1:
        number = min(_number(blocks), MAX_CURVE)
        space = {"shape": "curve", "coefficients": number}
        draft.say(
            "genome.smooth",
            "space",
            f"there {blocks} values are joined by straight lines over the layers; here it is a sum of {number} cosines"
            + (f" (at most {MAX_CURVE})" if number != blocks else "")
            + ", as smooth, with the mean as its first gene",
        )
        if genome.merge_method in ("ties", "dare_ties"):
            draft.say(
                "genome.smooth", "space", "density has one value for all layers: a curve could leave [0, 1]"
            )
        if not genome.allow_negative_weights:
            draft.say(
                "genome.smooth",
                "space",
                "bounds are on the curve's genes: single layers may go below 0 (`shoal validate` prints how far)",
            )
    elif blocks is None:
        space = {"shape": "layers"}
        if smooth:
            draft.say(
                "genome.smooth", "space", "no change: with one value per layer there is nothing to join"
            )
    else:
        space = {"shape": "blocks", "blocks": blocks}
    if blocks is None or blocks > 1:
        draft.say(
            "genome.layer_granularity",
            "space",
            f"{'one block per layer' if blocks is None else f'{blocks} blocks of {genome.layer_granularity} layers'}, as there;"
            " embeddings go with the first block there and final norm and head with the last, here they take the mean"
            " over the layers",
        )
    _filters(genome, space, draft, path)
    _bounds(genome, space, draft)
    draft.data["space"] = space


def _blocks(genome: Genome, draft: Translation, path: Path, layers: int | None) -> int | None:
    """The number of blocks of layers; None: one per layer, however many there are."""
    if genome.layer_granularity < 1:
        return 1
    if genome.layer_granularity == 1:
        return None
    number = layers or _layers_of(_spelling(genome.models[0]))
    if number is None:
        raise RecipeError(
            f"{path}: genome.layer_granularity {genome.layer_granularity}: how many layers {genome.models[0]} has is not"
            " known on this machine; say it by --layers"
        )
    if number % genome.layer_granularity:
        raise RecipeError(
            f"{path}: genome.layer_granularity: {number} layers are no multiple of {genome.layer_granularity}"
        )
    return number // genome.layer_granularity


def _number(blocks: int | None) -> int:
    assert blocks is not None
    return blocks


def _layers_of(model: str) -> int | None:
    """num_hidden_layers of a model whose config.json is in a folder, a zoo or the Hub's cache."""
    ref = parse_model(model, Path())
    ref = ref.base if isinstance(ref, AdapterModel) else ref
    if isinstance(ref, HubModel):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(ref.repo, "config.json", revision=ref.revision)
        config = Path(found) if isinstance(found, str) else None
    else:
        config = Path(str(ref)) / "config.json"
    if config is None or not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"model {model}: {config} is not valid JSON: {error}") from None
    number = content.get("num_hidden_layers", content.get("n_layer"))
    return number if isinstance(number, int) else None


def _filters(genome: Genome, space: dict[str, Any], draft: Translation, path: Path) -> None:
    space["tensor_types"] = []
    if not genome.filters:
        return
    kinds = []
    for text in genome.filters:
        kind = _WHOLE.get(text) or next((k for pattern, k in _PART if pattern.search(text)), None)
        if _OUTSIDE.search(text) and text not in _WHOLE:
            kind = None
        elif kind is None:
            raise RecipeError(
                f"{path}: genome.filters: {text!r} fits no tensor type of a recipe (attn, mlp); remove it, or write one of"
                f" {', '.join(_WHOLE)}"
            )
        if kind is None:
            draft.say(
                "genome.filters",
                "space",
                f"{text!r} gets no genes of its own: norms, embeddings and head take the mean",
            )
        elif text not in _WHOLE:
            draft.say("genome.filters", "space", f"{text!r} is a part of {kind} and shares its genes")
        kinds.append(kind)
    wanted = [kind for kind in ("attn", "mlp") if kind in kinds]
    if not wanted:
        return
    space["tensor_types"] = ["attn", "mlp"]
    rest = [kind for kind in ("attn", "mlp") if kind not in wanted]
    left = f"what was left over ({', '.join([*rest, 'norms, embeddings, head'])}) had one more set; "
    own = f"{rest[0]} has one of its own, the others" if rest else "norms, embeddings and head"
    draft.say(
        "genome.filters",
        "space",
        f"one set of genes for attn and one for mlp; {left}here {own} take the mean of the types",
    )


def _bounds(genome: Genome, space: dict[str, Any], draft: Translation) -> None:
    if genome.merge_method == "slerp":
        return
    negative = genome.allow_negative_weights
    low_high = ANY_SIGN if negative else NON_NEGATIVE
    space["bounds"] = {"weight": list(low_high)}
    how = "nothing bounds them" if negative else "the absolute value of an unbounded gene is taken"
    draft.say(
        "genome.allow_negative_weights",
        "space",
        f"weights stay within {low_high} by bounds on their genes; there {how}",
    )
    if genome.normalizes:
        draft.say(
            "genome.normalize",
            "space",
            "weights are divided by their sum, so only their ratios count"
            + (" and sums near 0 blow up" if negative else ""),
        )
    if genome.merge_method in ("ties", "dare_ties"):
        space["bounds"]["density"] = [0.1, 1.0]
        draft.say(
            "genome.merge_method",
            "space",
            "density is searched within [0.1, 1] and starts at 0.5; there it starts at 1, and the absolute value of its gene"
            " is cut off at 1",
        )


# --- tasks


def _tasks(config: EvolveConfig, draft: Translation, path: Path) -> None:
    tasks: list[dict[str, Any]] = []
    for task in config.tasks:
        weight = _weight(task, draft, path)
        if weight is None:
            continue
        if any(entry["task"] == task.name for entry in tasks):
            raise RecipeError(
                f"{path}: tasks: {task.name!r} is named twice; a recipe has one metric per task, keep one of them"
            )
        entry: dict[str, Any] = {"task": task.name, "metric": task.metric}
        if weight != 1.0:
            entry["weight"] = weight
        if config.num_fewshot is not None:
            entry["num_fewshot"] = config.num_fewshot
        tasks.append(entry)
    if not tasks:
        raise RecipeError(f"{path}: tasks: none has a weight, so there is nothing to search for")
    draft.data["tasks"] = tasks
    draft.say(
        "tasks",
        "tasks",
        "there the items that lm-eval scores are searched on and reported on; here search and selection take the validation"
        " or training split, and the claim is measured on the split that lm-eval scores, once",
    )


def _weight(task: EvolveTask, draft: Translation, path: Path) -> float | None:
    """The weight of a task, direction aside; None for a task that counts nothing."""
    lower = any(name in task.metric.partition(",")[0] for name in LOWER_IS_BETTER)
    if task.weight == 0:
        draft.say("tasks.weight", "tasks", f"{task.name} has weight 0 and is left out")
        return None
    if task.weight < 0 and not lower:
        raise RecipeError(
            f"{path}: tasks: {task.name!r} has weight {task.weight:g}; a recipe's weights are positive, and lm-eval says in"
            f" which direction {task.metric!r} is better"
        )
    if task.weight < 0:
        draft.say(
            "tasks.weight",
            "tasks",
            f"{task.name}: the weight is positive, as lm-eval says that a lower {task.metric} is better",
        )
    elif lower:
        draft.say(
            "tasks.weight",
            "tasks",
            f"{task.name}: there a higher {task.metric} counted as better; here lower is, as lm-eval says",
        )
    return abs(task.weight)


# --- evaluation, search, output


def _evaluation(config: EvolveConfig, draft: Translation, include_path: str | None) -> None:
    evaluation: dict[str, Any] = {}
    if include_path is not None:
        evaluation["include_path"] = (
            include_path
            if include_path.startswith("zoo:")
            else str(Path(include_path).expanduser().resolve())
        )
    template = config.apply_chat_template
    if template and _no_template(draft.data):
        template = False
        draft.say(
            "apply_chat_template",
            "evaluation",
            "false: the tokenizer has no chat template, and mergekit-evolve would stop at the first prompt"
            + ("" if config.apply_chat_template else " (true is its default)"),
        )
    evaluation["apply_chat_template"] = template
    evaluation["fewshot_as_multiturn"] = template and config.fewshot_as_multiturn
    draft.data["evaluation"] = evaluation


def _no_template(data: Mapping[str, Any]) -> bool:
    """Whether the first model is in a folder here whose tokenizer has no chat template for sure."""
    ref = parse_model(data.get("base_model") or data["models"][0], Path())
    ref = ref.base if isinstance(ref, AdapterModel) else ref
    folder = Path(str(ref))
    config = folder / "tokenizer_config.json"
    if isinstance(ref, HubModel) or not config.is_file():
        return False
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return False
    try:
        return not json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except ValueError:
        return False


def _search(config: EvolveConfig, draft: Translation, budget: int) -> None:
    search: dict[str, Any] = {"budget": budget}
    if config.limit is not None:
        search["items"] = config.limit
        draft.say(
            "limit",
            "search",
            f"there the first {config.limit} items, the same for every candidate; here every generation gets {config.limit}"
            " fresh ones of each task, common to its candidates, and none of them is tested on",
        )
    else:
        draft.say(
            "limit",
            "search",
            "without it every candidate met all items; here each generation gets a fresh share of them (search.items)",
        )
    if config.shuffle:
        draft.say("shuffle", "search", "gone: items are drawn by a seed that is written into the lock")
    if config.random_init:
        draft.say("random_init", "search", "gone: the search starts at equal weights")
    draft.say(
        "tasks.metric",
        "search",
        "the search maximises a smooth score of the gold answers and the metrics decide at the end; `objective: metric`"
        " searches by the metrics, as there",
    )
    draft.say(
        "tasks",
        "search",
        "the result is a finalist (mean of the search, best sample, parents, uniform merge) chosen on selection items and"
        " tested on others; there it is the candidate with the best score, which is the luckiest as well",
    )
    draft.data["search"] = search


def _tokenizer(genome: Genome, draft: Translation, path: Path) -> None:
    source = genome.tokenizer_source
    if source in (None, "base"):
        return
    if source == "union":
        draft.data["output"] = {"tokenizer_source": "union"}
        draft.say(
            "genome.tokenizer_source",
            "output",
            "models with other vocabularies are refused; their union is the base's",
        )
        return
    text = str(source).removeprefix("model:")
    ours = draft.spelled.get(text, _spelling(text))
    if ours not in [draft.data.get("base_model"), *draft.data["models"]]:
        raise RecipeError(
            f"{path}: genome.tokenizer_source: {source!r} is none of the models that are merged"
        )
    draft.data["output"] = {"tokenizer_source": ours}
