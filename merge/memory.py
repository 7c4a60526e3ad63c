"""Where the parents of a search are kept: on the device, in host memory, or on disk. Chosen by size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from shoal.errors import RecipeError, nearest
from shoal.merge.checkpoint import Parent

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk")
DEVICE_SHARE = 0.75  # of the free memory; scoring needs the rest
_WORDS = {
    "device": "parents stay on the device",
    "host": "parents stay in pinned host memory and are streamed to the device, copy and merge overlapped",
    "disk": "parents stay on disk, memory-mapped, and are read for every merge",
}


@dataclass(frozen=True)
class Memory:
    """The tier, and what each needs: bytes of the resident model, of the parents kept beside it, and free memory.

    on_device, on_host: free bytes; on a CPU they are the same memory.
    """

    tier: Tier
    device: str
    model: int
    parents: int
    on_device: int
    on_host: int

    def words(self) -> str:
        """One line for people."""
        return (
            f"{_WORDS[self.tier]} ({self.tier}): model {amount(self.model)}, parents {amount(self.parents)};"
            f" free on {self.device} {amount(self.on_device)}, on the host {amount(self.on_host)}"
        )


def plan_memory(
    parents: Sequence[Parent],
    device: str,
    runtime: torch.dtype,
    sparse: bool = False,
    wanted: str = "auto",
    limit: int | None = None,
    loaded: bool = False,
) -> Memory:
    """Choose the tier for merges of `parents` into a resident model of dtype `runtime` on `device`.

    sparse: the method keeps some elements of each delta, which takes a second copy of every source. wanted: `auto`, or
    the tier to use. limit: bytes of device memory to stay under. loaded: the model is on the device already.
    RecipeError for an unknown tier.
    """
    if wanted not in ("auto", *TIERS):
        raise RecipeError(f"memory: unknown tier {wanted!r}; {nearest(wanted, ['auto', *TIERS])}")
    model = flat_bytes(parents[0], runtime)
    kept = [flat_bytes(p) for p in parents]
    needed = sum(kept) + (sum(kept[1:]) if sparse else 0)
    on_host = free_host()
    on_device = free_device(device, on_host)
    if limit is not None:
        on_device = min(on_device, limit - (model if loaded else 0))
    room = int(on_device * DEVICE_SHARE) - (0 if loaded else model)
    tier: Tier = "disk"
    if needed <= room:
        tier = "device"
    elif torch.device(device).type != "cpu" and needed <= on_host * DEVICE_SHARE:
        tier = "host"  # on a CPU, host memory is the device's
    if wanted != "auto":
        tier = wanted  # type: ignore[assignment]
    return Memory(tier, device, model, needed, on_device, on_host)


def flat_bytes(parent: Parent, dtype: torch.dtype | None = None) -> int:
    """Bytes of the parent's float tensors as one flat buffer, in `dtype` or in the dtype that holds them all."""
    found = [(parent.shape(n), parent.dtype(n)) for n in parent.names]
    floats = [(torch.Size(shape).numel(), d) for shape, d in found if d.is_floating_point]
    size = dtype.itemsize if dtype is not None else flat_dtype([d for _, d in floats]).itemsize
    return sum(numel for numel, _ in floats) * size


def flat_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The smallest dtype that holds values of all `dtypes` exactly."""
    found = list(dict.fromkeys(dtypes)) or [torch.float32]
    if len(found) == 1 and found[0].itemsize >= 2:
        return found[0]
    return torch.float64 if torch.float64 in found else torch.float32


def free_device(device: str, on_host: int) -> int:
    where = torch.device(device)
    if where.type == "cuda":
        return int(torch.cuda.mem_get_info(where)[0])
    return on_host


def free_host() -> int:
    """Free bytes of host memory, under the container's limit where there is one."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - int(used)))


def amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"
