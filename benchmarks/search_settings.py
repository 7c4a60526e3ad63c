"""The ways to search that benchmarks/search.py compares: ours, ours with each ingredient off, baselines, and mergekit-evolve's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from item_model import SIZES


@dataclass(frozen=True)
class Setting:
    """One way to search. items: per task and candidate. fresh: a new common subset each generation; else the first
    items for ever; separate: a subset of its own for each candidate. claim: anchors, select and test are scored (and
    paid for); else the best sample seen is returned with its search score. grow: the finer space that follows once
    `patience` generations bring nothing.
    """

    name: str
    shape: str = "curve"
    options: Mapping[str, Any] = field(
        default_factory=lambda: {"coefficients": 4, "tensor_types": ("attn", "mlp")}
    )
    algorithm: str = "cma-es"
    sigma0: float | None = None
    popsize: int | None = None
    objective: str = "smooth"
    items: int = 16
    anchor_items: int = 128
    fresh: bool = True
    separate: bool = False
    weighted: bool = False
    racing: bool = False
    more_items: bool = False
    grow: Mapping[str, Any] = field(default_factory=dict)
    patience: int = 20
    return_mean: bool = True
    claim: bool = True


OURS = Setting("ours")  # as a recipe has it where it says nothing
MERGEKIT = Setting(
    "mergekit-evolve's settings",
    shape="blocks",
    options={"blocks": 4, "low": 0.0, "high": 2.0},
    sigma0=(1 / 6) / 2.0,
    objective="metric",
    items=100,
    fresh=False,
    return_mean=False,
    claim=False,
)


def settings() -> list[Setting]:
    """Ours, its ablations, the baselines and mergekit-evolve's settings."""
    return [
        OURS,
        replace(OURS, name="ours, accuracy as objective", objective="metric"),
        replace(OURS, name="ours, accuracy on 100 items", objective="metric", items=100),
        replace(OURS, name="ours, 8 items", items=8),
        replace(OURS, name="ours, 32 items", items=32),
        replace(OURS, name="ours, 64 items", items=64),
        replace(OURS, name="ours, anchors on 32 items", anchor_items=32),
        replace(OURS, name="ours, anchors on 64 items", anchor_items=64),
        replace(OURS, name="ours, anchors on all search items", anchor_items=SIZES["search"]),
        replace(OURS, name="ours, first items for ever", fresh=False),
        replace(OURS, name="ours, separate items per candidate", separate=True),
        replace(OURS, name="ours, items where anchors disagree", weighted=True),
        replace(OURS, name="ours, racing", racing=True),
        replace(OURS, name="ours, growing number of items", more_items=True),
        replace(OURS, name="ours, best sample instead of mean", return_mean=False),
        replace(OURS, name="ours, sigma0 = 1/6", sigma0=1 / 6),
        replace(OURS, name="ours, separable CMA-ES", algorithm="sep-cma-es"),
        replace(
            OURS,
            name="ours, three coefficients",
            options={"coefficients": 3, "tensor_types": ("attn", "mlp")},
        ),
        replace(OURS, name="ours, one curve for all tensor types", options={"coefficients": 4}),
        replace(OURS, name="ours, blocks", shape="blocks", options={"blocks": 4}),
        replace(OURS, name="ours, uniform", shape="uniform", options={}),
        replace(OURS, name="ours, layers", shape="layers", options={"tensor_types": ("attn", "mlp")}),
        replace(
            OURS,
            name="ours, growing to layers per tensor type",
            grow={"shape": "layers", "tensor_types": ("attn", "mlp")},
        ),
        replace(OURS, name="ours, lq surrogate", algorithm="lq-cma-es"),
        replace(OURS, name="random search", algorithm="random"),
        replace(OURS, name="uniform-weight grid", algorithm="grid"),
        MERGEKIT,
    ]


def tiny_settings(few: bool) -> list[Setting]:
    """The same for five layers and two parents: mergekit-evolve's granularity of one layer is 10 genes.

    Not among them: separate items per candidate, which no recipe can say, and racing, whose ranks are not journalled.
    """
    names = {"ours", "random search", "uniform-weight grid"}
    ablations = {
        "ours, accuracy as objective",
        "ours, first items for ever",
        "ours, items where anchors disagree",
        "ours, best sample instead of mean",
        "ours, separable CMA-ES",
        "ours, layers",
    }
    wanted = names if few else names | ablations
    return [
        *(s for s in settings() if s.name in wanted),
        replace(MERGEKIT, shape="layers", options={"low": 0.0, "high": 2.0}),
    ]
