"""The YAML of mergekit-evolve (mergekit 0.1.5, `mergekit.evo`): its fields, defaults and checks, as a schema of our own.

Reading it needs none of the packages that mergekit-evolve wants (ray, cma, vllm). Unlike there, unknown keys are errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shoal.errors import RecipeError, nearest

MAX_BYTES = 1 << 20
# method -> what a gene decides, per block of layers, model and filter
METHOD_GENES: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}
NEED_BASE = ("task_arithmetic", "ties", "dare_ties")


def reference_text(value: Any) -> Any:
    """mergekit's ModelReference as text, `path[@revision][+lora[@revision]]`; its mapping form is written out."""
    if not isinstance(value, Mapping):
        return value
    extra = sorted(set(value) - {"model", "lora", "override_architecture"})
    if extra or value.get("override_architecture") is not None or "model" not in value:
        found = ", ".join(map(repr, value))
        raise ValueError(f"expected a model as text or as a mapping of model and lora, found {found}")
    parts = [_path_text(value["model"])]
    if value.get("lora") is not None:
        parts.append(_path_text(value["lora"]))
    return "+".join(parts)


def _path_text(value: Any) -> str:
    revision = None
    if isinstance(value, Mapping):
        value, revision = value.get("path"), value.get("revision")
    if isinstance(value, str):
        return f"{value}@{revision}" if revision else value
    raise ValueError(f"expected the path of a model as text, found {value!r}")


Reference = Annotated[str, BeforeValidator(reference_text)]


class _Theirs(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EvolveTask(_Theirs):
    """`mergekit.evo.config.TaskConfiguration`: a task of lm-eval, also written as its name alone."""

    name: str
    weight: float = 1.0
    metric: str = "acc,none"

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Genome(_Theirs):
    """`mergekit.evo.genome.ModelGenomeDefinition`."""

    models: Annotated[tuple[Reference, ...], Field(min_length=1)]
    merge_method: str
    base_model: Reference | None = None
    tokenizer_source: Reference | None = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[str, ...] | None = None
    smooth: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Genome:
        if self.merge_method not in METHOD_GENES:
            raise ValueError(
                f"merge_method {self.merge_method!r} is none of mergekit-evolve's; {nearest(self.merge_method, METHOD_GENES)}"
            )
        if self.merge_method in NEED_BASE and self.base_model is None:
            raise ValueError(f"merge_method {self.merge_method!r} needs base_model")
        if self.merge_method == "slerp" and (self.smooth or self.filters):
            raise ValueError("mergekit-evolve has neither smooth nor filters for slerp")
        return self

    @property
    def normalizes(self) -> bool:
        """Whether weights are divided by their sum, with mergekit-evolve's own defaults."""
        if self.normalize is not None:
            return self.normalize
        return self.merge_method in ("ties", "dare_ties", "linear")


class EvolveConfig(_Theirs):
    """`mergekit.evo.config.EvolMergeConfiguration`: the whole file."""

    genome: Genome
    tasks: Annotated[tuple[EvolveTask, ...], Field(min_length=1)]
    limit: Annotated[int, Field(gt=0)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True


_SCHEMAS: Mapping[str, type[BaseModel]] = {"genome": Genome, "tasks": EvolveTask}


def load_evolve_config(path: Path) -> EvolveConfig:
    """Read and check a YAML of mergekit-evolve.

    Raises:
        RecipeError: in one line: no file, no YAML, another kind of file, an unknown key (with the nearest), or a value
            that mergekit-evolve itself would refuse.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path}: {path.stat().st_size} bytes, a configuration has at most {MAX_BYTES}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: no text in UTF-8 ({error.reason})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}{place}: not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: expected a mapping with genome and tasks, found {type(data).__name__}")
    if "genome" not in data:
        if "merge_method" in data:
            raise RecipeError(
                f"{path}: this is one merge of mergekit's, not a search; merge it with `shoal merge`, or start a search"
                " from it by --best"
            )
        if "models" in data and "tasks" in data:
            raise RecipeError(f"{path}: this is a recipe of shoal already; run it with `shoal evolve`")
    try:
        return EvolveConfig.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first problem in one line, and how many more there are."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    where = ".".join(place) or "configuration"
    kind = first["type"]
    if kind == "extra_forbidden":
        schema = _SCHEMAS.get(place[0], EvolveConfig) if len(place) > 1 else EvolveConfig
        message = f"unknown key {place[-1]!r} at {where!r}; {nearest(place[-1], schema.model_fields)}"
    elif kind == "missing":
        message = f"key {where!r} is missing"
    elif kind == "value_error":
        message = f"{where}: {first['ctx']['error']}"
    else:
        found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
        message = f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}{found}"
    more = error.error_count() - 1
    return " ".join(message.split()) + (
        f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    )
