"""Recipes: one YAML file describes one run that anyone can repeat.

This module checks syntax and schema only; whether models, tasks and metrics exist is checked by `shoal.preflight`.
A recipe is data: it is read by a safe loader, unknown keys are errors, and nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shoal.errors import RecipeError, nearest
from shoal.types import AdapterModel, HubModel, LocalModel, MergeModel, ModelRef, PlainModel, Role, ZooModel

MAX_RECIPE_BYTES = 1 << 20

Dtype = Literal["float32", "bfloat16", "float16"]
TrackerName = Literal["tensorboard", "trackio", "wandb"]
Positive = Annotated[int, Field(gt=0)]
Bounds = Annotated[tuple[float, float], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Strict(BaseModel):
    """Frozen, typed as written, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class MergeSpec(Strict):
    """How models are merged: mergekit's name of the method, its fixed parameters, the dtype written out."""

    method: str = "task_arithmetic"
    dtype: Dtype | None = None
    parameters: dict[str, bool | float | list[float]] = {}


Shape = Literal["uniform", "blocks", "layers", "curve"]
Types = Annotated[tuple[Literal["attn", "mlp"], ...], Field(strict=False)]
Coefficients = Annotated[int, Field(gt=0, le=16)]


class FinerSpec(Strict):
    """A finer space that a search grows into; what it does not say is as in the space before it."""

    shape: Shape | None = None
    tensor_types: Types | None = None
    blocks: Positive | None = None
    coefficients: Coefficients | None = None

    @model_validator(mode="after")
    def _says_something(self) -> FinerSpec:
        if not self.model_dump(exclude_none=True):
            raise ValueError(
                "a finer space must differ from the one before it; name its shape, or what is finer"
            )
        return self


class SpaceSpec(Strict):
    """Which merges the search can reach: see docs/design.md, "Shapes of a space".

    tensor_types: kinds of layer parts with genes of their own; None: attn and mlp for a curve, else one set for all.
    coefficients: of a curve; None: 4, or the number of layers where that is less.
    grow: finer spaces, in each of which the search goes on once the one before brought nothing beyond noise for
    `patience` generations, from the merge and with the covariance that it had reached. Bounds hold in all of them.
    """

    shape: Shape = "curve"
    tensor_types: Types | None = None
    blocks: Positive = 4
    coefficients: Coefficients | None = None
    bounds: dict[str, Bounds] = {}
    grow: Annotated[tuple[FinerSpec, ...], Field(strict=False)] = ()
    patience: Annotated[int, Field(ge=2)] = 20

    @field_validator("bounds")
    @classmethod
    def _ordered(cls, bounds: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for name, (low, high) in bounds.items():
            if not low < high:
                raise ValueError(
                    f"bounds of {name!r} must be [low, high] with low < high, found [{low}, {high}]"
                )
        return bounds

    def stages(self) -> tuple[SpaceSpec, ...]:
        """This space and the finer ones, in order, each written out."""
        found = [self.model_copy(update={"grow": ()})]
        for finer in self.grow:
            found.append(found[-1].model_copy(update=finer.model_dump(exclude_none=True)))
        return tuple(found)


class RoleSource(Strict):
    """Where the items of one role come from: an lm-eval task (default: the task itself), its split, how many."""

    task: str | None = None
    split: str | None = None
    size: Positive | None = None


class TaskSpec(Strict):
    """One task of the objective; what is not set here is as lm-eval's own task says.

    max_drop: a guard: how much of this task's score, in its own units (0.02 are 2 points of accuracy), a merge may lose
    against the best parent on it; None: as much as the other tasks outweigh.
    """

    task: str
    metric: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    max_drop: Annotated[float, Field(gt=0)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    cluster: str | None = None
    search: RoleSource = RoleSource()
    select: RoleSource = RoleSource()
    test: RoleSource = RoleSource()
    search_on_eval_split: bool = False

    def source(self, role: Role) -> RoleSource:
        return {"search": self.search, "select": self.select, "test": self.test}[role]


class EvaluationSpec(Strict):
    """How lm-eval scores: its own words for model arguments, generation arguments and prompts."""

    include_path: str | None = None
    model_args: dict[str, Any] = {}
    gen_kwargs: dict[str, Any] = {}
    batch_size: Positive = 64
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    fewshot_seed: Annotated[int, Field(ge=0)] = 1234


class SearchSpec(Strict):
    """How long and how to search.

    budget: candidates, anchors not counted. max_seconds: of merging and scoring, for the whole search;
    max_candidate_seconds: for one candidate on its search items, above which it counts as failed (found out after it
    was scored: nothing is cut short in one process).
    items: of each task that a generation meets; None: 16, of a single task 32. Few items and many generations find more
    than the reverse, docs/search.md. anchor_items: of each task that every parent and the uniform merge are
    scored on before the search (on all, where item_choice is by their disagreement). item_choice: `disagreement` draws items where parents and the uniform
    merge score differently, uniform_share of the draws excepted, and weights them so that estimates stay unbiased.
    grow_items: more items once two halves of a generation's items rank its candidates differently; costs more than
    `validate` says. racing: clear losers of a generation are not scored to the end.
    objective: what is maximised. smooth: probability of the right answer; metric: the claimed metric itself; margin:
    log odds of the right answer (an ablation). scale: the unit in which a task's gain counts: `unit` as in the claim,
    `anchors` relative to the spread of parents and uniform merge on it.
    optimizer: see docs/design.md, "Optimizers" (older recipes say `algorithm`). warm_start: folder of a finished run or
    a mergekit YAML whose merge the search starts from.
    start: `gradient` first moves the start (`warm_start` or not) along the gradient of the smooth objective on start_items
    of each task, for merges that are linear in their weights; costs up to nine candidates on these items.
    """

    budget: Positive = 200
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    max_candidate_seconds: Annotated[float, Field(gt=0)] | None = None
    popsize: Annotated[int, Field(ge=4)] | None = None
    sigma0: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    items: Positive | None = None
    anchor_items: Positive = 128
    item_choice: Literal["uniform", "disagreement"] = "uniform"
    uniform_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    grow_items: bool = False
    racing: Literal["on", "off", "auto"] = "off"
    objective: Literal["smooth", "metric", "margin"] = "smooth"
    scale: Literal["unit", "anchors"] = "unit"
    optimizer: str = "cma-es"
    warm_start: str | None = None
    start: Literal["default", "gradient"] = "default"
    start_items: Positive = 32

    @model_validator(mode="before")
    @classmethod
    def _older_words(cls, data: Any) -> Any:
        """`algorithm` is what `optimizer` was called before; and YAML reads a bare on or off as true or false."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if "algorithm" in data:
            if "optimizer" in data:
                raise ValueError("optimizer and algorithm are one key under two names; write optimizer alone")
            data["optimizer"] = data.pop("algorithm")
        if isinstance(data.get("racing"), bool):
            data["racing"] = "on" if data["racing"] else "off"
        return data


class ClaimSpec(Strict):
    """How the winner is compared on the test items: margin in score units, resamples of the bootstrap."""

    margin: Annotated[float, Field(ge=0)] = 0.01
    resamples: Annotated[int, Field(ge=1000)] = 10_000


class OutputSpec(Strict):
    """What is written out, in mergekit's words."""

    tokenizer_source: str = "base"
    chat_template: str | None = None
    save_weights: bool = False


class Recipe(Strict):
    """One run: models, merge method, search space, tasks, search and output.

    base_model, models: a Hub id (`org/name`, `org/name@revision`), a folder (`./name`), `zoo:tiny/base`, `merge:org/name`
    for a merge that shoal published and now rebuilds from its roots in float32, or `base+adapter`.
    track: where the course of the run is sent as well, one name or a list; no part of what the run is, so it may change
    whenever the run goes on.
    """

    name: str
    base_model: str | None = None
    models: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    merge: MergeSpec = MergeSpec()
    space: SpaceSpec = SpaceSpec()
    tasks: Annotated[tuple[TaskSpec, ...], Field(strict=False, min_length=1)]
    evaluation: EvaluationSpec = EvaluationSpec()
    search: SearchSpec = SearchSpec()
    claim: ClaimSpec = ClaimSpec()
    output: OutputSpec = OutputSpec()
    track: Annotated[tuple[TrackerName, ...], Field(strict=False)] = ()

    @field_validator("track", mode="before")
    @classmethod
    def _listed(cls, track: Any) -> Any:
        return [track] if isinstance(track, str) else track

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        every = ([self.base_model] if self.base_model else []) + list(self.models)
        for text in every:
            if every.count(text) > 1:
                raise ValueError(f"model {text!r} is named {every.count(text)} times; name each model once")
        keys = [task.task for task in self.tasks]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"task {key!r} is named {keys.count(key)} times; name each task once")
        guarded = [task.task for task in self.tasks if task.max_drop is not None]
        if guarded and self.search.objective == "margin":
            raise ValueError(
                f"max_drop of task {guarded[0]!r} is in units of its score, which search.objective: margin is not;"
                " use smooth or metric"
            )
        return self

    def digest(self) -> str:
        """sha256 of the recipe's content without budget and trackers: what may not change while a run goes on."""
        content = self.model_dump(mode="json", exclude={"track"})
        for key in ("budget", "max_seconds"):
            content["search"].pop(key)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_model(text: str, folder: Path) -> ModelRef:
    """A model as written in a recipe: Hub id (`org/name`, `org/name@revision`), local folder (`./x`, `../x`, `/x`,
    `~/x`, relative to `folder`), `zoo:tiny/base`, `merge:` before a Hub id or a folder for a merge of shoal's that is
    rebuilt from its roots, or `model+adapter` for a LoRA adapter on its base.

    Raises:
        RecipeError: the text is none of these.
    """
    base, plus, adapter = text.partition("+")
    if not plus:
        return _parse_plain(text, folder)
    if not base.strip() or not adapter.strip():
        raise RecipeError(
            f"model {text!r}: an adapter is written 'base+adapter', found no {'base' if not base.strip() else 'adapter'}"
        )
    base_ref, adapter_ref = _parse_plain(base, folder), _parse_plain(adapter, folder)
    if isinstance(adapter_ref, ZooModel | MergeModel):
        raise RecipeError(f"model {text!r}: the adapter must be a folder or a Hub id")
    return AdapterModel(base_ref, adapter_ref)


def _parse_merge(text: str, folder: Path) -> MergeModel:
    """`merge:org/name[@revision]`, or `merge:` before a folder or the lock.yaml in it."""
    rest = text.removeprefix("merge:").strip()
    try:
        source = _parse_plain(rest, folder)
    except RecipeError:
        source = None
    if isinstance(source, LocalModel):
        return MergeModel(LocalModel(source.path.parent) if source.path.name == "lock.yaml" else source)
    if not isinstance(source, HubModel) or "/" not in source.repo:
        raise RecipeError(
            f"model {text!r}: expected 'merge:org/name' or 'merge:org/name@revision' for a merge that was published, or"
            " 'merge:./folder' for a publication or a finished run here"
        )
    return MergeModel(source)


def _parse_plain(text: str, folder: Path) -> PlainModel:
    text = text.strip()
    if text.startswith("merge:"):
        return _parse_merge(text, folder)
    if text.startswith("zoo:"):
        zoo, slash, member = text.removeprefix("zoo:").partition("/")
        if not slash or not member:
            raise RecipeError(
                f"model {text!r}: a zoo model is written 'zoo:ZOO/MEMBER', e.g. 'zoo:tiny/base'"
            )
        return ZooModel(zoo, member)
    if text.startswith((".", "/", "~")):
        return LocalModel((folder / Path(text).expanduser()).resolve())
    repo, at, revision = text.partition("@")
    parts = repo.split("/")
    if len(parts) > 2 or not all(parts) or any(c.isspace() for c in repo) or (at and not revision):
        raise RecipeError(
            f"model {text!r}: expected a Hub id 'org/name' or 'org/name@revision', or a folder that starts with"
            " './', '../', '/' or '~/'"
        )
    return HubModel(repo, revision or None)


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        RecipeError: with the file, the place in it, what was expected and what was found.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: {path.stat().st_size} bytes, a recipe has at most {MAX_RECIPE_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    return parse_recipe(text, where=str(path))


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """As `load_recipe`, from text; `where` names the source in errors."""
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}{place}: not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected a mapping of recipe keys, found {type(data).__name__}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key written twice (plain YAML silently keeps the last one) and aliases."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed in a recipe", mark)
        return super().compose_node(parent, index)


def _explain(error: ValidationError) -> str:
    """The first problem in one line: where, what was expected, what was found; and how many more there are."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "recipe"
    kind, found = first["type"], first["input"]
    if kind == "extra_forbidden":
        message = f"unknown key {first['loc'][-1]!r} at {where!r}; {nearest(str(first['loc'][-1]), _valid_keys(first['loc']))}"
    elif kind == "missing":
        message = f"key {where!r} is missing"
    elif kind == "value_error":
        message = str(first["ctx"]["error"]) if where == "recipe" else f"{where}: {first['ctx']['error']}"
    else:
        message = (
            f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, found {found!r} ({type(found).__name__})"
        )
    more = error.error_count() - 1
    return message + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _valid_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that are valid where an unknown one was found: walk the schema along the location."""
    model: type[BaseModel] = Recipe
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        if part in ("tasks", "grow"):
            model = TaskSpec if part == "tasks" else FinerSpec
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)
