"""How exact merges are: ours and mergekit's own bfloat16 arithmetic against mergekit in float64.

    python benchmarks/exactness.py --json docs/benchmarks/exactness.json

For each method: root mean square error over all tensors of the 135M shape, relative to the root mean square of the
merge's step from the base. All results are written as bfloat16, whose rounding alone is the `rounding` column. Elements
whose delta equals a threshold in some parent are left out: bfloat16 deltas are full of equals, and which of them is kept
is an accident of a sort in mergekit.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from shapes import write
from torch import Tensor

from shoal.merge.checkpoint import Checkpoint
from shoal.merge.groups import tensor_groups
from shoal.merge.mergekit_bridge import merge_mergekit_config
from shoal.merge.mergekit_yaml import config_of
from shoal.merge.resident import Merger
from shoal.merge.selection import MagnitudeHistogram, breadcrumbs_range
from shoal.types import MergePlan, OutputGroup, Source

METHODS: dict[str, tuple[list[int], int | None, dict[str, float]]] = {
    "linear": ([1, 2, 3], None, {"weight": 0.37}),
    "task_arithmetic": ([1, 2, 3], 0, {"weight": 0.37}),
    "slerp": ([1], 0, {}),
    "nuslerp": ([1, 2], None, {"weight": 0.37}),
    "multislerp": ([1, 2, 3], None, {"weight": 0.37}),
    "model_stock": ([1, 2, 3], 0, {}),
    "karcher": ([1, 2, 3], None, {}),
    "ties": ([1, 2, 3], 0, {"weight": 0.37, "density": 0.5}),
    "breadcrumbs": ([1, 2, 3], 0, {"weight": 0.37, "density": 0.5, "gamma": 0.01}),
    "sce": ([1, 2, 3], 0, {}),
}


def by_mergekit(config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(config))
    out = folder / "out"
    merge_mergekit_config(file, out)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(out.glob("*.safetensors")):
        tensors.update({n: t.clone() for n, t in load_file(shard).items()})
    shutil.rmtree(out)
    return tensors


def level(plan: MergePlan, parents: list[Checkpoint], name: str) -> Tensor:
    """Bool mask of the elements whose delta is as large as a threshold of ties or breadcrumbs."""
    group = next(g for g in plan.groups if name in g.tensors)
    mask = torch.zeros(parents[0].shape(name), dtype=torch.bool)
    if group.operator not in ("ties", "breadcrumbs") or plan.base is None:
        return mask
    base = parents[plan.base].tensor(name).reshape(-1)
    for source in group.sources:
        other = parents[source.model].tensor(name).reshape(-1)
        histogram = MagnitudeHistogram.of(other, base)
        density = source.parameters["density"]
        if group.operator == "ties":
            cuts = histogram.cuts(other, base, [max(1, int(density * base.numel()))])
        else:
            cuts = list(breadcrumbs_range(histogram, other, base, density, source.parameters["gamma"]))
        size = (other.float() - base.float()).abs()
        for magnitude, _ in cuts:
            mask |= (size == magnitude).view(mask.shape)
    return mask


def rms(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    total = sum(float((a[n].double() - b[n].double()).square().sum()) for n in b)
    return math.sqrt(total / sum(t.numel() for t in b.values()))


def measure(method: str, paths: list[Path], folder: Path) -> dict[str, Any]:
    sources, base, parameters = METHODS[method]
    parents = [Checkpoint.open(p) for p in paths]
    groups = tensor_groups(parents[0])
    outputs = tuple(
        OutputGroup(g.name, method, tuple(Source(i, g.name, parameters) for i in sources), g.tensors)
        for g in groups
    )
    plan = MergePlan(("base", "m1", "m2", "m3"), base, outputs, "bfloat16")
    ours = dict(Merger(parents, groups).tensors(plan))
    config = config_of(plan, [str(p) for p in paths])
    coarse = by_mergekit({**config, "dtype": "bfloat16"}, folder)
    truth = by_mergekit({**config, "dtype": "float64", "out_dtype": "float64"}, folder)
    origin = {n: parents[0].tensor(n) for n in truth}
    for name, tensor in truth.items():
        mask = level(plan, parents, name)
        for other in (ours, coarse):
            other[name] = torch.where(mask, tensor, other[name].double())
    step = rms(origin, truth)
    return {
        "method": method,
        "ours": rms(ours, truth) / step,
        "mergekit_bfloat16": rms(coarse, truth) / step,
        "rounding": rms({n: t.to(torch.bfloat16) for n, t in truth.items()}, truth) / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=None, help="keep the checkpoints here")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="shoal-bench-"))
    rows = []
    try:
        paths = write("135M", folder, 4)
        for method in METHODS:
            rows.append(measure(method, paths, folder))
            row = rows[-1]
            print(
                f"{method:16} ours {row['ours']:.2e}  mergekit in bfloat16 {row['mergekit_bfloat16']:.2e}"
                f"  rounding alone {row['rounding']:.2e}",
                flush=True,
            )
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
