"""The data that flows between the rooms: frozen dataclasses without behaviour of their own, and no heavy imports.

Vocabulary as in docs/design.md. `merge` turns a MergePlan into weights, `search` turns a genome into a MergePlan,
`evals` turns weights into ItemScores; what needs two of them is done by `preflight`, `worker` and `run`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Role = Literal["search", "select", "test"]
ROLES: tuple[Role, ...] = ("search", "select", "test")


# --- models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubModel:
    """A repository of the Hugging Face Hub, at a revision (branch, tag or commit; None: its main branch)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True)
class LocalModel:
    """A folder with config.json and safetensors."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class ZooModel:
    """A model that shoal builds itself into the user's cache, e.g. `zoo:tiny/base`."""

    zoo: str
    member: str

    def __str__(self) -> str:
        return f"zoo:{self.zoo}/{self.member}"


@dataclass(frozen=True)
class MergeModel:
    """A merge of ours, `merge:org/name` or `merge:./folder`: rebuilt from its roots in float32, whatever dtype it is
    published in. source: a publication on the Hub, or the folder of a publication or of a finished run."""

    source: HubModel | LocalModel

    def __str__(self) -> str:
        return f"merge:{self.source}"


@dataclass(frozen=True)
class AdapterModel:
    """A LoRA adapter on its base model: `base+adapter`."""

    base: HubModel | LocalModel | ZooModel | MergeModel
    adapter: HubModel | LocalModel

    def __str__(self) -> str:
        return f"{self.base}+{self.adapter}"


PlainModel = HubModel | LocalModel | ZooModel | MergeModel
ModelRef = PlainModel | AdapterModel


def parts_of(ref: ModelRef) -> tuple[PlainModel, ...]:
    """A model alone, or the base and the adapter."""
    return (ref.base, ref.adapter) if isinstance(ref, AdapterModel) else (ref,)


# --- merge plans ----------------------------------------------------------------------------------------------

GroupKind = Literal["embed", "attn", "mlp", "norm", "other", "head"]


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of a checkpoint that are merged with the same parameters.

    name: `embed`, `layers.<i>.<kind>`, `norm`, `head` or `other`; layer: 0-based, None outside the layers.
    """

    name: str
    layer: int | None
    kind: GroupKind
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a merge method: its scope, the values it may take, and where a search starts.

    scope `source`: one value per source model; `group`: one value per output group (slerp's t).
    low, high: default search bounds. domain: values outside are errors (None: any finite number).
    default: the start of a search; None for `1/number of sources`. searched: a gene unless the recipe fixes it.
    """

    name: str
    scope: Literal["source", "group"]
    low: float
    high: float
    default: float | None
    domain: tuple[float, float] | None = None
    searched: bool = True


@dataclass(frozen=True)
class Source:
    """One ingredient of an output group: a model (index into MergePlan.models), its group, its parameters."""

    model: int
    group: str
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputGroup:
    """One group of the merged model: which operator makes it from which sources, with which parameters."""

    name: str
    operator: str
    sources: tuple[Source, ...]
    tensors: tuple[str, ...]
    parameters: Mapping[str, float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class MergePlan:
    """How to make one merged model; complete, serialisable, free of code.

    models: names of all models in recipe order (base first where there is one); base: index of the base or None.
    dtype: of the weights written out; the arithmetic is always float32. seed: of DARE masks.
    """

    models: tuple[str, ...]
    base: int | None
    groups: tuple[OutputGroup, ...]
    dtype: str = "float32"
    seed: int = 0

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, shortest round-trip floats; equal plans give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> MergePlan:
        data = json.loads(text)
        return MergePlan(
            models=tuple(data["models"]),
            base=data["base"],
            groups=tuple(
                OutputGroup(
                    name=g["name"],
                    operator=g["operator"],
                    sources=tuple(Source(s["model"], s["group"], s["parameters"]) for s in g["sources"]),
                    tensors=tuple(g["tensors"]),
                    parameters=g["parameters"],
                )
                for g in data["groups"]
            ),
            dtype=data["dtype"],
            seed=data["seed"],
        )

    def digest(self) -> str:
        """sha256 of the canonical JSON: the key under which scores of this merge may be re-used."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


# --- scores ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemScore:
    """What one candidate did on one item.

    task: key of the task in the recipe. item: data-set index in the role's split. metrics: lm-eval's own
    `process_results` per filter, keyed `metric,filter`; a value is a number, or a list where lm-eval aggregates
    something else than a mean. objective: the smooth objective (higher is better), None where it is not defined.
    logliks: log-likelihood of each request of the item, in nats. tokens: scored or generated.
    """

    task: str
    role: Role
    item: int
    metrics: Mapping[str, Any]
    objective: float | None = None
    logliks: tuple[float, ...] = ()
    tokens: int = 0


@dataclass(frozen=True)
class Generated:
    """One text written to a prompt, without the prompt.

    tokens: ids of what was generated, an end token not among them. ended: the model itself ended it, by an end token
    within the tokens that it was given.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool


@dataclass(frozen=True)
class Slope:
    """A derivative with respect to one number of a plan: a parameter of a group (source None) or of its source at a
    position. group: index into MergePlan.groups.
    """

    group: int
    source: int | None
    parameter: str
    value: float


# --- work -----------------------------------------------------------------------------------------------------

ItemIds = Mapping[tuple[str, Role], Sequence[int]]
ItemCounts = Mapping[tuple[str, Role], Mapping[int, float]]  # items, and what each of them counts


@dataclass(frozen=True)
class Job:
    """One piece of work for a worker: make this merge, score it on these items.

    generate: also run the generation requests (metrics of generation tasks); without it a generation task gives
    its smooth objective only. canonical: use the canonical arithmetic (see docs/design.md), as for claims.
    prompts: also write to these, greedily, at most max_tokens each, as the recipe renders prompts; only for workers
    with the capability `writes`. differentiate: also the derivatives of each task's smooth objective, summed over these
    items times what they count, with respect to the coefficients of the plan; only for workers with the capability
    `differentiates`, and for plans that are linear in their weights.
    """

    candidate: str
    plan: MergePlan
    items: ItemIds
    generate: bool = True
    canonical: bool = False
    attempt: int = 1
    prompts: tuple[str, ...] = ()
    max_tokens: int = 0
    differentiate: ItemCounts = field(default_factory=dict)


@dataclass(frozen=True)
class Completed:
    """Scores of a job, with the seconds that merging and scoring took and what disturbed it (journalled).

    texts: one per prompt of the job. slopes: task -> derivatives of its smooth objective, where the job asked for them.
    seconds_score counts both too.
    """

    candidate: str
    scores: tuple[ItemScore, ...]
    seconds_merge: float
    seconds_score: float
    events: tuple[str, ...] = ()
    texts: tuple[Generated, ...] = ()
    slopes: Mapping[str, tuple[Slope, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A job that could not be done: recorded, told as the worst of its generation; the run goes on."""

    candidate: str
    error: str
    seconds: float
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class Capabilities:
    """What a worker can do: the device it computes on, in words, and how many jobs it takes at once.

    writes: whether it takes jobs with prompts. differentiates: whether it takes jobs with `differentiate`.
    """

    device: str
    slots: int = 1
    writes: bool = False
    differentiates: bool = False


class Worker(Protocol):
    """Where jobs are done: in this process today, in others later. A worker loads models itself, from the lock."""

    def submit(self, job: Job) -> str: ...

    def poll(self) -> Completed | Failed: ...

    def cancel(self, candidate: str) -> None: ...

    def capabilities(self) -> Capabilities: ...

    def close(self) -> None: ...
