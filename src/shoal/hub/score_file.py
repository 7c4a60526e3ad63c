"""journal/scores.parquet as it is read from the Hub: the winner's scores, of a file that nothing is believed of.

Text stays a dictionary until rows are chosen, and rows are counted before they become objects: a few bytes that are named a
million times must not become gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import PublishError
from shoal.hub.published import PublishedLock
from shoal.hub.tables import SCORES
from shoal.types import ROLES, Role

COMPARED: tuple[Role, ...] = ("select", "test")  # where a winner was scored by its metric, canonically merged
MAX_ROWS = 200_000_000
MAX_BYTES = 16 << 30  # of all columns, written out
MAX_VALUES = 1 << 27  # log-likelihoods of all candidates
MAX_CHOSEN = 1 << 22  # log-likelihoods of the winner
MAX_TEXT = 1 << 20  # bytes of the metrics of one item
MAX_TEXTS = 1 << 28  # bytes of the winner's metrics, each as often as it is named
_BATCH = 1 << 16  # rows
# name -> whether it is text
_COLUMNS: Mapping[str, bool] = {
    "candidate": True,
    "role": True,
    "task": True,
    "item": False,
    "metrics": True,
    "logliks": False,
}


@dataclass(frozen=True)
class Published:
    """What was published of the winner on one item. logliks: of each request, in nats."""

    value: Any
    logliks: tuple[float, ...]


Rows = Mapping[tuple[str, Role], Mapping[int, Published]]


def read_scores(folder: Path, lock: PublishedLock, where: str = "") -> Rows:
    """The winner's published scores on select and test items.

    Raises:
        PublishError: no such file, not parquet, other columns, too large, items that the lock does not name or that come
            twice, or scores that are missing.
    """
    path, name = folder / SCORES, f"{where}: {SCORES}" if where else str(folder / SCORES)
    if path.is_symlink() or not path.is_file():
        raise PublishError(f"{name}: not there; without it there is nothing to compare scores with")
    found: dict[tuple[str, Role], dict[int, Published]] = {}
    metrics = {task.task: task.metric for task in lock.run.tasks}
    items = {(task.task, role): set(task.roles[role].items) for task in lock.run.tasks for role in ROLES}
    most = sum(len(items[task, role]) for task in metrics for role in COMPARED)
    for row in _rows(path, name, lock.winner.id, list(metrics), most):
        task, role, item = row["task"], row["role"], row["item"]
        if item not in items[task, role]:
            raise PublishError(f"{name}: item {item!r} of {task!r} ({role}) is none of the lock's")
        rows = found.setdefault((task, role), {})
        if item in rows:
            raise PublishError(f"{name}: item {item!r} of {task!r} ({role}) has two scores of the winner")
        rows[item] = _published(row, metrics[task], name)
    missing = [task for task in metrics if items[task, "test"] - found.get((task, "test"), {}).keys()]
    if missing:
        raise PublishError(
            f"{name}: the winner's scores on test items of {missing[0]!r} are not all there; nothing to compare with"
        )
    return found


def _rows(path: Path, name: str, winner: str, tasks: list[str], most: int) -> Iterator[dict[str, Any]]:
    """The winner's rows of these tasks, which are at most as many as the lock has items."""
    import pyarrow
    import pyarrow.parquet

    texts = [column for column, text in _COLUMNS.items() if text]
    wanted: dict[str, list[str]] = {"candidate": [winner], "role": [*COMPARED], "task": tasks}
    count = values = size = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_form(file, name)
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=_BATCH, columns=list(_COLUMNS)):
                chosen = _chosen(batch, wanted, name)
                count += len(chosen)
                values += _values(chosen)
                size += _text(chosen, name)
                if count > most:
                    raise PublishError(
                        f"{name}: more scores of the winner than the {most:,} items of the lock"
                    )
                if values > MAX_CHOSEN or size > MAX_TEXTS:
                    raise PublishError(
                        f"{name}: {values:,} log-likelihoods and {size:,} bytes of metrics of the winner; more than any"
                        " run has"
                    )
                yield from chosen.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise PublishError(f"{name}: not parquet that can be read: {said[:200]!r}") from None


def _check_form(file: Any, name: str) -> None:
    import pyarrow

    about, schema = file.metadata, file.schema_arrow
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    size = sum(group.total_byte_size for group in groups)
    if about.num_rows > MAX_ROWS or size > MAX_BYTES:
        raise PublishError(f"{name}: {about.num_rows:,} rows, {size:,} bytes; more than any run has")
    for column, text in _COLUMNS.items():
        if column not in schema.names:
            raise PublishError(f"{name}: expected columns {', '.join(_COLUMNS)}; {column} is missing")
        kind = schema.field(column).type
        expected = (
            pyarrow.string()
            if text
            else pyarrow.int64()
            if column == "item"
            else pyarrow.list_(pyarrow.float64())
        )
        if kind != expected:
            raise PublishError(f"{name}: column {column} is not of type {expected}")
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    values = sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.startswith("logliks."))
    if values > MAX_VALUES:
        raise PublishError(f"{name}: {values:,} log-likelihoods; more than any run has")


def _chosen(batch: Any, wanted: Mapping[str, list[str]], name: str) -> Any:
    """The rows that have one of the wanted texts in each of these columns; another task of the winner's is an error."""
    import pyarrow
    import pyarrow.compute

    def among(column: str) -> Any:
        array = batch.column(column)
        known = pyarrow.compute.is_in(array.dictionary, value_set=pyarrow.array(wanted[column]))
        return pyarrow.compute.fill_null(pyarrow.compute.take(known, array.indices), False)

    mine = pyarrow.compute.and_(among("candidate"), among("role"))
    both = pyarrow.compute.and_(mine, among("task"))
    if pyarrow.compute.sum(both).as_py() != pyarrow.compute.sum(mine).as_py():
        raise PublishError(f"{name}: scores of the winner on a task that is none of the lock's")
    return batch.filter(both)


def _values(chosen: Any) -> int:
    """How many log-likelihoods the rows have."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(chosen.column("logliks"))
    return int(pyarrow.compute.sum(lengths).as_py() or 0)


def _text(chosen: Any, name: str) -> int:
    """How many bytes the rows' metrics have, each as often as it is named."""
    import pyarrow.compute

    array = chosen.column("metrics")
    lengths = pyarrow.compute.take(pyarrow.compute.binary_length(array.dictionary), array.indices)
    longest = int(pyarrow.compute.max(lengths).as_py() or 0)
    if longest > MAX_TEXT:
        raise PublishError(f"{name}: {longest:,} bytes of metrics on one item; more than any run has")
    return int(pyarrow.compute.sum(lengths.cast("int64")).as_py() or 0)


def _published(row: Mapping[str, Any], metric: str, name: str) -> Published:
    try:
        logliks = tuple(float(value) for value in row["logliks"])
        return Published(json.loads(row["metrics"]).get(metric), logliks)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PublishError(
            f"{name}: item {row['item']!r} of {row['task']!r} cannot be read: {error}"
        ) from None
