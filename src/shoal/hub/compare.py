"""Scores that were published beside scores that were measured again, item by item."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from shoal.errors import PublishError
from shoal.hub.published import PublishedLock
from shoal.hub.tables import SCORES
from shoal.types import ROLES, ItemScore, Role

MAX_ROWS = 200_000_000
MAX_BYTES = 16 << 30  # of the columns that are read, written out
COMPARED: tuple[Role, ...] = ("select", "test")  # where a winner was scored by its metric, canonically merged
_COLUMNS = ("candidate", "role", "task", "item", "rung", "metrics", "logliks")
SAME = 1e-9  # metrics are sums of few float64


@dataclass(frozen=True)
class Published:
    """What was published of the winner on one item. logliks: of each request, in nats."""

    value: Any
    logliks: tuple[float, ...]


Rows = Mapping[tuple[str, Role], Mapping[int, Published]]


@dataclass(frozen=True)
class Compared:
    """One task in one role. flips: items whose metric is another one; differences of log-likelihoods in nats, None
    where no request has one. allowed: share of items that may flip. judged: whether correctness was compared at all."""

    task: str
    role: Role
    items: int
    flips: int
    median: float | None
    largest: float | None
    allowed: float
    judged: bool = True

    @property
    def agrees(self) -> bool:
        return self.flips <= self.allowed * self.items


def read_scores(folder: Path, lock: PublishedLock, where: str = "") -> Rows:
    """The winner's published scores on select and test items.

    Raises:
        PublishError: no such file, not parquet, other columns, too large, items that the lock does not name, or scores
            that are missing.
    """
    path, name = folder / SCORES, f"{where}: {SCORES}" if where else str(folder / SCORES)
    if path.is_symlink() or not path.is_file():
        raise PublishError(f"{name}: not there; without it there is nothing to compare scores with")
    found: dict[tuple[str, Role], dict[int, Published]] = {}
    metrics = {task.task: task.metric for task in lock.run.tasks}
    items = {(task.task, role): set(task.roles[role].items) for task in lock.run.tasks for role in ROLES}
    for row in _rows(path, name, lock.winner.id):
        task, role, item = row["task"], row["role"], row["item"]
        if role not in COMPARED:
            continue
        if item not in items.get((task, role), ()):
            raise PublishError(f"{name}: item {item!r} of {task!r} ({role}) is none of the lock's")
        found.setdefault((task, role), {})[item] = _published(row, metrics[task], name)
    missing = [task for task in metrics if items[task, "test"] - found.get((task, "test"), {}).keys()]
    if missing:
        raise PublishError(
            f"{name}: the winner's scores on test items of {missing[0]!r} are not all there; nothing to compare with"
        )
    return found


def _rows(path: Path, name: str, winner: str) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            about = file.metadata
            size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if about.num_rows > MAX_ROWS or size > MAX_BYTES:
                raise PublishError(f"{name}: {about.num_rows:,} rows, {size:,} bytes; more than any run has")
            missing = set(_COLUMNS) - set(file.schema_arrow.names)
            if missing:
                raise PublishError(
                    f"{name}: expected columns {', '.join(_COLUMNS)}; {min(missing)} is missing"
                )
            rows: list[dict[str, Any]] = []
            for batch in file.iter_batches(batch_size=1 << 16, columns=list(_COLUMNS)):
                rows += [row for row in batch.to_pylist() if row["candidate"] == winner]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise PublishError(f"{name}: not parquet that can be read: {str(error).splitlines()[0]}") from None
    return rows


def _published(row: Mapping[str, Any], metric: str, name: str) -> Published:
    try:
        logliks = tuple(float(value) for value in row["logliks"])
        return Published(json.loads(row["metrics"]).get(metric), logliks)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PublishError(
            f"{name}: item {row['item']!r} of {row['task']!r} cannot be read: {error}"
        ) from None


def compare(
    published: Rows,
    measured: Sequence[ItemScore],
    lock: PublishedLock,
    same_device: bool,
    unjudged: Collection[str] = (),
) -> list[Compared]:
    """Per task and role. same_device: of the same kind; then no item may flip, whatever the lock allows. unjudged: tasks of
    which only log-likelihoods are compared."""
    metrics = {task.task: task.metric for task in lock.run.tasks}
    found = {(s.task, s.role, s.item): s for s in measured}
    rows = []
    for (task, role), items in sorted(published.items()):
        flips, differences = 0, []
        for item, before in items.items():
            after = found[task, role, item]
            flips += task not in unjudged and not _same(before.value, after.metrics.get(metrics[task]))
            if len(before.logliks) != len(after.logliks):
                differences.append(math.inf)
            differences += [
                abs(a - b) if math.isfinite(a) else math.inf
                for a, b in zip(before.logliks, after.logliks, strict=False)
            ]
        middle, most = (median(differences), max(differences)) if differences else (None, None)
        allowed = 0.0 if same_device else lock.tolerance.other_kind
        judged = task not in unjudged
        rows.append(Compared(task, role, len(items), flips, middle, most, allowed, judged))
    return rows


def _same(before: Any, after: Any) -> bool:
    """Metrics that are the same answer; what is no number there (a log-likelihood's sum, texts) is compared elsewhere."""
    if before is None:
        return True
    if isinstance(before, list):
        return True
    if not isinstance(after, (int, float)):
        return False
    return math.isclose(float(before), float(after), rel_tol=SAME, abs_tol=SAME)
