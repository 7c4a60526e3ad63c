"""Locks: a recipe with everything resolved. A run that nothing disturbed is a function of its lock alone.

A lock names the files of every model by hash, the items of every role by index and content hash, all seeds and
sizes, and the libraries. It has a schema version; a lock of another version is refused, never guessed at.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from shoal.errors import RunError
from shoal.recipe import Dtype, Recipe, Strict
from shoal.types import MergePlan
from shoal.version import __version__

SCHEMA_VERSION = 2
LIBRARIES = (
    "torch",
    "transformers",
    "safetensors",
    "mergekit",
    "lm_eval",
    "cma",
    "numpy",
    "scipy",
    "datasets",
    "peft",
)

Texts = Annotated[tuple[str, ...], Field(strict=False)]
Numbers = Annotated[tuple[int, ...], Field(strict=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ModelLock(Strict):
    """One model: its name in tables, how the recipe wrote it, the folder it was resolved to, hashes of its files.

    commit: of the Hub repository, None elsewhere. adapter: folder of the LoRA adapter, None without one.
    origin: of a zoo's model, what its manifest says: the source (hub or gguf), package or commit, hash of the weights.
    merge: of a merge of ours, how it is rebuilt; commit is then of its publication, files are of the float32 copy.
    """

    name: str
    ref: str
    folder: str
    commit: str | None = None
    adapter: str | None = None
    adapter_commit: str | None = None
    origin: dict[str, str]
    files: dict[str, str]
    merge: MergeLock | None = None


class MergeLock(Strict):
    """A merge of ours that is a parent: all that is needed to rebuild it in float32.

    name: of its run. dtype, weights_sha256: as it was written or published. plan: MergePlan.to_json of its winner.
    roots: its own models, Hub ids at their commits, hashes of their files; tokenizer: which of them gives it.
    float32_sha256: weights_sha256 of the float32 copy, None before there was one.
    """

    name: str
    dtype: Dtype
    weights_sha256: Sha256
    float32_sha256: Sha256 | None = None
    tokenizer: int
    chat_template: str | None = None
    roots: Annotated[tuple[ModelLock, ...], Field(strict=False, min_length=1)]
    plan_digest: Sha256
    plan: str

    @model_validator(mode="after")
    def _consistent(self) -> MergeLock:
        names = tuple(model.name for model in self.roots)
        try:
            plan = self.merge_plan()
            inside = all(0 <= i < len(names) for i in (self.tokenizer, plan.base or 0))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"merge {self.name}: plan: not a merge plan: {error!r}") from None
        if plan.digest() != self.plan_digest:
            raise ValueError(f"merge {self.name}: the plan is not the one that plan_digest names")
        if plan.models != names or plan.dtype != self.dtype or not inside:
            raise ValueError(f"merge {self.name}: the plan does not belong to the roots {', '.join(names)}")
        return self

    def merge_plan(self) -> MergePlan:
        return MergePlan.from_json(self.plan)

    def generations(self) -> int:
        """How many merges deep its roots go: 1 where none of them is a merge."""
        return 1 + max(root.merge.generations() if root.merge else 0 for root in self.roots)


ModelLock.model_rebuild()


class Opening(Strict):
    """One opening of the test items: of which run (by name), for which winner, after how many generations."""

    run: str
    winner: str
    generations: int


@dataclass(frozen=True)
class Inheritance:
    """What a new run takes over from those that it descends from: their openings of its test items, each once.

    unknown: models and runs that could not be asked for theirs, by reference.
    """

    openings: tuple[Opening, ...] = ()
    unknown: tuple[str, ...] = ()


class RoleLock(Strict):
    """The items of one role: lm-eval task and split, data-set indices, and lm-eval's doc_hash of each.

    clusters: one label per item; items of one cluster are resampled together.
    """

    task: str
    split: str
    items: Numbers
    hashes: Texts
    clusters: Texts


class TaskLock(Strict):
    """One task: which metric is claimed (lm-eval's `metric,filter`), in which direction, on which items.

    max_drop: what may be lost on it against the best parent, in units of the metric; None: no guard.
    """

    task: str
    metric: str
    higher_is_better: bool
    weight: float
    output_type: str
    num_fewshot: int
    version: str
    eval_split: str
    search_on_eval_split: bool
    max_drop: float | None = None
    fewshot_hashes: Texts | None = None
    roles: dict[Literal["search", "select", "test"], RoleLock]


class Seeds(Strict):
    """One seed per random stream; all are derived from the recipe's seed, none from a clock."""

    search: int
    items: int
    masks: int
    fewshot: int
    bootstrap: int


class SearchLock(Strict):
    """How the search goes on, with every `auto` resolved. x0: genome that it starts from, natural units.

    anchor_items: per task, how many search items every anchor is scored on. start: `gradient` where a gradient on
    start_items of them moves that genome first (the journal says to where).
    """

    optimizer: str
    x0: Annotated[tuple[float, ...], Field(strict=False)]
    objective: Literal["smooth", "metric", "margin"]
    scale: Literal["unit", "anchors"]
    items: int
    anchor_items: int
    item_choice: Literal["uniform", "disagreement"]
    uniform_share: float
    grow_items: bool
    racing: bool
    start: Literal["default", "gradient"] = "default"
    start_items: int = 32


class StageLock(Strict):
    """A finer space that the search may grow into. sigma0: first step in directions that are new, of the range."""

    genes: Texts
    popsize: int
    sigma0: float
    seed: int


class Lock(Strict):
    """Everything that a run depends on. stages: the finer spaces of a search that grows, in order.

    inherited: openings of its test items by runs that it descends from, before it began. unknown_ancestors: models and runs
    that could not be asked whether there are more.
    """

    schema_version: Literal[2] = 2
    shoal: str
    python: str
    libraries: dict[str, str]
    recipe_digest: str
    models: Annotated[tuple[ModelLock, ...], Field(strict=False)]
    base: int | None
    sources: Numbers
    tokenizer: int
    operator: str
    dtype: Dtype
    genes: Texts
    popsize: int
    sigma0: float
    stages: Annotated[tuple[StageLock, ...], Field(strict=False)] = ()
    search: SearchLock
    seeds: Seeds
    include_path: str | None
    tasks: Annotated[tuple[TaskLock, ...], Field(strict=False)]
    inherited: Annotated[tuple[Opening, ...], Field(strict=False)] = ()
    unknown_ancestors: Texts = ()

    def task(self, name: str) -> TaskLock:
        return next(task for task in self.tasks if task.task == name)

    def to_yaml(self) -> str:
        return yaml.dump(
            self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
        )


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, so that a thousand item ids do not take a thousand lines."""


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    flow = all(not isinstance(item, (dict, list)) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _represent_list)


def library_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def new_lock(recipe: Recipe, **resolved: Any) -> Lock:
    """A lock for this recipe on this machine; `resolved` holds the remaining fields."""
    return Lock(
        shoal=__version__,
        python=platform.python_version(),
        libraries=library_versions(),
        recipe_digest=recipe.digest(),
        **resolved,
    )


def load_lock(path: Path) -> Lock:
    """Read a lock.

    Raises:
        RunError: it is missing, is not YAML, or has another schema.
    """
    try:
        data = yaml.load(
            path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
        return Lock.model_validate(data)
    except FileNotFoundError:
        raise RunError(f"{path}: no such lock") from None
    except yaml.YAMLError as error:
        raise RunError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(
            f"{path}: not a lock of schema {SCHEMA_VERSION} (shoal {__version__}): {where}: {first['msg']}"
        ) from None


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is either absent, old or complete, never partial, and durable on return."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # noqa: PTH101
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
