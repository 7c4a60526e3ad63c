"""The published lock: everything to rebuild a winner and to compare scores, and nothing of the machine that made it.

It holds the run's own lock without folders, the winner's merge plan, and what the run learnt: hash of the weights,
device, openings of the test items, lineage. It has a schema version of its own; docs/schemas/ has the JSON Schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from shoal.errors import PublishError
from shoal.hub.safe_yaml import read_yaml
from shoal.hub.scoring import Scoring
from shoal.lock import Lock, ModelLock, Opening, Sha256
from shoal.recipe import Strict
from shoal.types import MergePlan

FORMAT = "shoal-published-lock"
SCHEMA_VERSION = 1
SCHEMA_FILE = f"published-lock-{SCHEMA_VERSION}.schema.json"


class Device(Strict):
    """Where the run scored. kind: cpu, cuda, ...; words: as the run named it; dtype: of the scored model."""

    kind: str
    words: str
    dtype: str


class Tolerance(Strict):
    """What may differ when the scores are measured again.

    same_kind: on a device of the same kind: share of items whose correctness may flip. other_kind: on another one; an
    allowance by rule, see `shoal.hub.tolerance`, not a measurement. loglik: difference of a log-likelihood, in nats,
    that the allowance is made for.
    """

    same_kind: float = 0.0
    other_kind: float
    loglik: float


class PublishedTask(Strict):
    """Where the items of one of the run's tasks come from.

    custom: not one of lm-eval's own: its YAML is not published (it is code), so who scores again must supply it, or use
    items.parquet where that is published; the lock's content hashes tell whether the items are the same. source: of a
    custom task that anybody can build, e.g. `zoo:tiny/tasks`. dataset: lm-eval's dataset_path where it is on the Hub.
    requests: sha256 over the rendered requests of each role, by which equal prompts are known; None where not made.
    scoring: of a task whose items are in items.parquet, how responses become its metric; None for all others.
    """

    task: str
    custom: bool
    source: str | None = None
    dataset: str | None = None
    dataset_name: str | None = None
    requests: dict[Literal["search", "select", "test"], Sha256] | None = None
    scoring: Scoring | None = None


class Winner(Strict):
    """The chosen merge. plan: as MergePlan.to_json writes it; weights_sha256: of the canonical materialisation."""

    id: str
    plan: dict[str, Any]
    plan_digest: Sha256
    weights_sha256: Sha256

    def merge_plan(self) -> MergePlan:
        return MergePlan.from_json(json.dumps(self.plan))


class Ancestor(Strict):
    """A merge that this one descends from. relation: it is a parent, or the search started from it (warm start).

    reference: Hub id with commit, or a name where it has none. openings: of its test items, its own ancestors' included.
    shared: how many test items of the descendant's are test items of it, None where that is not known. unknown: it could
    not be asked for, so that openings and lineage of it are not known, nor whether it is a merge at all.
    """

    relation: Literal["parent", "warm start"]
    reference: str
    name: str
    verdict: str | None = None
    weights_sha256: Sha256 | None = None
    parents: Annotated[tuple[str, ...], Field(strict=False)] = ()
    openings: Annotated[tuple[Opening, ...], Field(strict=False)] = ()
    shared: int | None = None
    unknown: bool = False
    lineage: Annotated[tuple[Ancestor, ...], Field(strict=False)] = ()


class PublishedLock(Strict):
    """See the module. run: the run's lock; its folders are empty and `include_path` is null, see `lock_here`."""

    format: Literal["shoal-published-lock"] = "shoal-published-lock"
    schema_version: Literal[1] = 1
    name: str
    verdict: Literal["beats", "ties", "worse", "underpowered"]
    weights_published: bool
    device: Device
    tolerance: Tolerance
    winner: Winner
    openings: Annotated[tuple[Opening, ...], Field(strict=False)]
    lineage: Annotated[tuple[Ancestor, ...], Field(strict=False)] = ()
    tasks: Annotated[tuple[PublishedTask, ...], Field(strict=False)]
    run: Lock

    @model_validator(mode="after")
    def _consistent(self) -> PublishedLock:
        for model in self.run.models:
            _check_private(model)
        if self.run.include_path is not None:
            raise ValueError("a published lock has no include_path, found one")
        if self.winner.merge_plan().digest() != self.winner.plan_digest:
            raise ValueError("winner: the plan is not the one that plan_digest names")
        return self

    def to_yaml(self) -> str:
        return yaml.dump(
            self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
        )

    def lock_here(
        self, folders: Mapping[str, tuple[Path, Path | None]], include_path: Path | None = None
    ) -> Lock:
        """The run's lock on this machine. folders: per model name, its folder and its adapter's.

        Raises:
            PublishError: a model is missing.
        """
        return self.run.model_copy(
            update={
                "models": tuple(_placed(model, folders) for model in self.run.models),
                "include_path": None if include_path is None else str(include_path),
            }
        )


def _placed(model: ModelLock, folders: Mapping[str, tuple[Path, Path | None]]) -> ModelLock:
    if model.name not in folders:
        raise PublishError(f"model {model.name}: no folder for it; expected all models of the lock")
    folder, adapter = folders[model.name]
    return model.model_copy(
        update={"folder": str(folder), "adapter": None if adapter is None else str(adapter)}
    )


def _check_private(model: ModelLock) -> None:
    """Raises ValueError where a model, or a root of it, names a place on a machine."""
    if model.folder or model.adapter not in (None, ""):
        raise ValueError(f"model {model.name}: a published lock names no folders, found one")
    for ref in (part.strip().removeprefix("merge:").strip() for part in model.ref.split("+")):
        if ref.startswith(("/", "~", "\\", "file:")) or ".." in ref or re.match(r"[A-Za-z]:[\\/]", ref):
            raise ValueError(f"model {model.name}: a published lock names no local paths, found one")
    for file in model.files:
        if not re.fullmatch(r"(adapter/)?[\w.+-]+", file) or ".." in file:
            raise ValueError(f"model {model.name}: {file!r} is no name of a model's file")
    for root in () if model.merge is None else model.merge.roots:
        _check_private(root)


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line; no aliases, which readers refuse."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    flow = all(not isinstance(item, (dict, list)) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _represent_list)


def parse_published(text: str, where: str = "lock.yaml") -> PublishedLock:
    """Read a published lock from an untrusted text.

    Raises:
        PublishError: not safe YAML, another schema, local paths, or a plan that is not what its digest says.
    """
    data = read_yaml(text, where)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PublishError(f"{where}: not a published lock (expected `format: {FORMAT}`)")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise PublishError(
            f"{where}: published lock of schema {data.get('schema_version')!r}, this version of shoal reads"
            f" {SCHEMA_VERSION}; use the version of shoal that it names"
        )
    try:
        return PublishedLock.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PublishError(f"{where}: {place}: {first['msg']}") from None
    except (KeyError, TypeError, AttributeError) as error:  # a plan that is none
        raise PublishError(f"{where}: winner.plan: not a merge plan: {error!r}") from None


def load_published(path: Path) -> PublishedLock:
    """As `parse_published`, from a file.

    Raises:
        PublishError: likewise, or no such file, or not UTF-8.
    """
    try:
        return parse_published(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise PublishError(f"{path}: no such lock") from None
    except UnicodeDecodeError as error:
        raise PublishError(f"{path}: not UTF-8 text: {error}") from None


def json_schema() -> str:
    """The JSON Schema of a published lock, as docs/schemas/ holds it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **PublishedLock.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"
