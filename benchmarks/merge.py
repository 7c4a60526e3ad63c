"""How fast merges are: against the machine's copy bandwidth and against mergekit, in the same run.

    python benchmarks/merge.py --json FILE [--shapes 135M,1B] [--no-disk] [--device cuda]

In memory: seconds per candidate (the merge of an evolution step into a resident bfloat16 model, compiled kernels
warm) against the executor of mergekit, planned, with its tensors in memory, for the same configuration and arithmetic (float32, rounded
once), and beside it for its own bfloat16 arithmetic, which is coarser. `of_limit` is
bytes read and written per second over the bandwidth of a plain copy, the best of copies made before and after. Disk
to disk: whole processes, `shoal merge` against `mergekit-yaml`, with the peak of anonymous memory of both.
On a GPU: the 7B shape resident, 8B and 12B under a cap of 24 GiB of device memory; mergekit is not run there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import machine
from shapes import SHAPES, NoiseParent, runtime_model, tensor_shapes, write

from shoal.merge.checkpoint import Checkpoint
from shoal.merge.groups import tensor_groups
from shoal.merge.resident import Merger
from shoal.types import MergePlan, OutputGroup, Source

Row = dict[str, Any]
CAP = 24 << 30
# method -> sources, base, parameters of a source
CASES: dict[str, tuple[list[int], int | None, dict[str, float]]] = {
    "linear": ([1, 2, 3], None, {"weight": 0.4}),
    "task_arithmetic": ([1, 2, 3], 0, {"weight": 0.4}),
    "slerp": ([1], 0, {}),
    "ties": ([1, 2, 3], 0, {"weight": 0.4, "density": 0.5}),
    "dare_ties": ([1, 2, 3], 0, {"weight": 0.4, "density": 0.5}),
    "dare_linear": ([1, 2, 3], 0, {"weight": 0.4, "density": 0.5}),
    "breadcrumbs": ([1, 2, 3], 0, {"weight": 0.4, "density": 0.5, "gamma": 0.01}),
    "della": ([1, 2, 3], 0, {"weight": 0.4, "density": 0.5, "epsilon": 0.1}),
    "nuslerp": ([1, 2], None, {"weight": 0.4}),
    "model_stock": ([1, 2, 3], 0, {}),
    "sce": ([1, 2, 3], 0, {}),
    "karcher": ([1, 2, 3], None, {}),
}
SHORT = ("linear", "task_arithmetic", "slerp", "ties", "dare_ties")


def best(run: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of `times` runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def copy_bandwidth(device: str, size: int = 1 << 30, times: int = 8) -> float:
    """Bytes read and written per second by a plain copy of `size` bytes on the device."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()

    run()
    return 2 * size / best(run, times)


def plan_for(method: str, groups: Sequence[Any], step: int) -> MergePlan:
    """A candidate: every group with weights of its own, other ones at every step."""
    sources, base, parameters = CASES[method]

    def values(group: int, source: int) -> dict[str, float]:
        moved = dict(parameters)
        if "weight" in moved:
            moved["weight"] += 0.01 * ((7 * group + 3 * source + step) % 30)
        return moved

    outputs = tuple(
        OutputGroup(
            group.name,
            method,
            tuple(Source(model, group.name, values(i, j)) for j, model in enumerate(sources)),
            group.tensors,
            {"t": 0.3 + 0.01 * ((i + step) % 30)} if method == "slerp" else {},
        )
        for i, group in enumerate(groups)
    )
    return MergePlan(("base", "m1", "m2", "m3"), base, outputs, "bfloat16")


def ours(
    method: str, parents: Sequence[Any], groups: Sequence[Any], model: Any, device: str, limit: int | None
) -> tuple[float, float, str, float]:
    """Seconds per candidate, seconds of the first one (statistics, compiling), tier, share of that compiling."""
    sparse = method in ("ties", "dare_ties", "dare_linear", "breadcrumbs", "della", "sce")
    merger = Merger(parents, groups, model, device, limit=limit, sparse=sparse)
    steps = iter(range(1000))

    def run() -> None:
        merger.materialize(plans.pop())
        if device != "cpu":
            torch.cuda.synchronize()

    plans = [plan_for(method, groups, next(steps)) for _ in range(12)]
    first = best(run, 1)
    seconds = best(run, 7 if limit is None else 2)
    assert merger.memory is not None
    if merger.notes:
        print("note:", merger.notes)
    return seconds, first, merger.memory.tier, merger._kernels.seconds


def moved_bytes(method: str, numel: int) -> int:
    """Bytes of bfloat16 that the merge must read and write."""
    sources, base, _ = CASES[method]
    return 2 * numel * (len(sources) + (base is not None) + 1)


def mergekit_yaml(method: str, paths: Sequence[Path], exact: bool = False) -> dict[str, Any]:
    """What a mergekit user would write; exact: with float32 arithmetic and one rounding, as ours has it."""
    sources, base, parameters = CASES[method]
    models = []
    for index in sources:
        models.append({"model": str(paths[index]), **({"parameters": parameters} if parameters else {})})
    config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if exact:
        config |= {"dtype": "float32", "out_dtype": "bfloat16"}
    if base is not None:
        config["base_model"] = str(paths[base])
    if method == "slerp":
        config["parameters"] = {"t": 0.3}
    return config


def mergekit_in_memory(method: str, paths: Sequence[Path], times: int, exact: bool) -> float:
    """Seconds of mergekit's executor for all tensors, planned, with the parents' tensors in memory."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    class Held:
        def __init__(self, checkpoint: Checkpoint) -> None:
            self.tensors = {n: checkpoint.tensor(n) for n in checkpoint.names}
            for tensor in self.tensors.values():
                tensor.sum()  # in memory from here on
            self.index = type("Index", (), {"tensor_paths": {n: n for n in self.tensors}})()

        def get_tensor(self, key: str, device: str = "cpu", aliases: object = None) -> torch.Tensor:
            return self.tensors[key]

        def flush(self) -> None:
            return None

    config = MergeConfiguration.model_validate(mergekit_yaml(method, paths, exact))
    options = MergeOptions(quiet=True)
    cache = LoaderCache()
    cache.setup(options)
    for reference in config.referenced_models():
        cache.loaders[reference] = Held(Checkpoint.open(Path(reference.model.path)))
    first = config.base_model or config.referenced_models()[0]
    planner = MergePlanner(config, get_architecture_info(config, options), options, first.config())
    planner._plan()
    tasks = [task for _, task in planner._tensors]

    def run() -> None:
        for _, tensor in Executor(tasks).run(quiet=True):
            tensor.to(torch.bfloat16)

    run_times = best(run, times)
    cache.loaders.clear()
    return run_times


def in_memory(shape: str, folder: Path, methods: Sequence[str], slow: int) -> list[Row]:
    paths = write(shape, folder, 4)
    parents = [Checkpoint.open(p) for p in paths]
    groups = tensor_groups(parents[0])
    numel = sum(torch.Size(s).numel() for s in tensor_shapes(shape).values())
    rows = []
    for method in methods:
        model = runtime_model(parents[0], shape)
        before = copy_bandwidth("cpu")
        seconds, first, tier, compiling = ours(method, parents, groups, model, "cpu", None)
        limit = max(before, copy_bandwidth("cpu"))
        del model
        quick = method in ("linear", "task_arithmetic", "slerp", "nuslerp", "model_stock")
        times = 3 if quick else slow
        theirs = mergekit_in_memory(method, paths, times, exact=True)
        theirs_coarse = mergekit_in_memory(method, paths, times, exact=False)
        rows.append(
            {
                "case": f"{shape} {method}",
                "ours_s": seconds,
                "peer": "mergekit executor, in memory, float32 arithmetic",
                "peer_s": theirs,
                "ratio": theirs / seconds,
                "peer_bfloat16_s": theirs_coarse,
                "ratio_bfloat16": theirs_coarse / seconds,
                "of_limit": moved_bytes(method, numel) / seconds / limit,
                "limit_gb_s": limit / 1e9,
                "first_s": first,
                "compile_s": compiling,
                "memory": tier,
            }
        )
        show(rows[-1])
    return rows


def process(command: Sequence[str]) -> tuple[float, int]:
    """Seconds of a whole process, and the peak of its anonymous memory in bytes (Linux)."""
    peak = 0
    start = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            try:
                text = Path(f"/proc/{running.pid}/status").read_text()
            except OSError:
                return
            for line in text.splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]) << 10)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = running.communicate()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    return seconds, peak


def disk_to_disk(shape: str, folder: Path, methods: Sequence[str], times: int) -> list[Row]:
    paths = write(shape, folder, 4)
    numel = sum(torch.Size(s).numel() for s in tensor_shapes(shape).values())
    tools = Path(sys.executable).parent
    rows = []
    for method in methods:
        config = folder / f"{method}.yml"
        config.write_text(yaml.safe_dump(mergekit_yaml(method, paths)))
        out = folder / "out"
        found: dict[str, list[tuple[float, int]]] = {"shoal": [], "mergekit": []}
        for _ in range(times):
            for name, command in (
                ("shoal", [str(tools / "shoal"), "merge", str(config), "-o", str(out), "--quiet"]),
                ("mergekit", [str(tools / "mergekit-yaml"), str(config), str(out), "--quiet"]),
            ):
                found[name].append(process(command))
                shutil.rmtree(out)
        seconds = min(s for s, _ in found["shoal"])
        theirs = min(s for s, _ in found["mergekit"])
        rows.append(
            {
                "case": f"{shape} {method}, disk to disk",
                "ours_s": seconds,
                "peer": "mergekit-yaml, whole process",
                "peer_s": theirs,
                "ratio": theirs / seconds,
                "of_limit": moved_bytes(method, numel) / seconds / copy_bandwidth("cpu"),
                "ours_peak_anonymous_gb": max(p for _, p in found["shoal"]) / 1e9,
                "peer_peak_anonymous_gb": max(p for _, p in found["mergekit"]) / 1e9,
            }
        )
        show(rows[-1])
    return rows


def on_gpu(shape: str, limit: int | None, device: str, methods: Sequence[str]) -> list[Row]:
    parents = [NoiseParent(shape, index) for index in range(4)]
    groups = tensor_groups_of_noise(parents[0])
    numel = sum(torch.Size(s).numel() for s in tensor_shapes(shape).values())
    rows = []
    for method in methods:
        if limit is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        bandwidth = copy_bandwidth(device)
        torch.cuda.empty_cache()
        model = runtime_model(parents[0], shape)
        seconds, first, tier, compiling = ours(method, parents, groups, model, device, limit)
        rows.append(
            {
                "case": f"{shape} {method}{'' if limit is None else ', 24 GiB cap'}",
                "ours_s": seconds,
                "peer": None,
                "peer_s": None,
                "ratio": None,
                "of_limit": moved_bytes(method, numel) / seconds / bandwidth,
                "limit_gb_s": bandwidth / 1e9,
                "first_s": first,
                "compile_s": compiling,
                "memory": tier,
                "peak_device_gb": torch.cuda.max_memory_allocated() / 1e9,
            }
        )
        show(rows[-1])
        del model
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return rows


def tensor_groups_of_noise(parent: NoiseParent) -> Sequence[Any]:
    """Groups by mergekit's definitions need a folder; the configuration is all that they read of it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(parent.config, default=str))
        parent.path = Path(folder)
        return tensor_groups(parent)


def show(row: Row) -> None:
    peer = "" if row["ratio"] is None else f"   {row['peer']} {row['peer_s']:.3f} s, ratio {row['ratio']:.1f}"
    if "ratio_bfloat16" in row:
        peer += f" ({row['peer_bfloat16_s']:.3f} s, {row['ratio_bfloat16']:.1f} in bfloat16)"
    memory = ""
    if "ours_peak_anonymous_gb" in row:
        memory = f"   anonymous {row['ours_peak_anonymous_gb']:.2f} GB, theirs {row['peer_peak_anonymous_gb']:.2f} GB"
    print(
        f"{row['case']:32} {row['ours_s']:.4f} s, {row['of_limit']:.0%} of the copy bandwidth{peer}{memory}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", default=None, help=f"some of {','.join(SHAPES)}")
    parser.add_argument("--methods", default=None, help=f"some of {','.join(CASES)}")
    parser.add_argument("--folder", type=Path, default=None, help="keep the checkpoints here")
    parser.add_argument("--no-disk", action="store_true", help="without the disk-to-disk merges")
    parser.add_argument("--no-memory", action="store_true", help="only the disk-to-disk merges")
    arguments = parser.parse_args()
    chosen = None if arguments.methods is None else arguments.methods.split(",")
    about = machine(arguments.device)
    rows: list[Row] = []
    if arguments.device != "cpu":
        for shape in (arguments.shapes or "7B,8B,12B").split(","):
            limit = CAP if shape in ("8B", "12B") else None
            rows += on_gpu(shape, limit, arguments.device, chosen or ["linear", "task_arithmetic", "ties"])
    else:
        folder = arguments.folder or Path(tempfile.mkdtemp(prefix="shoal-bench-"))
        try:
            for shape in (arguments.shapes or "135M,1B").split(","):
                large = shape != "135M"
                methods = chosen or (list(SHORT) if large else list(CASES))
                if not arguments.no_memory:
                    rows += in_memory(shape, folder, methods, slow=1)
                if large and not arguments.no_disk:
                    rows += disk_to_disk(shape, folder, chosen or ["linear", "task_arithmetic", "slerp"], 3)
        finally:
            if arguments.folder is None:
                shutil.rmtree(folder, ignore_errors=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
