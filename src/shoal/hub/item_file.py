"""items.parquet: rendered requests of custom tasks as data, one row per request; written for, and read from, the Hub.

Reading trusts nothing: not its size, nor its types, nor that it holds what the lock names. Requests must have the lock's
hash, and so must what counts as right; nothing in the file is a template, a pattern or code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import PublishError
from shoal.hub.generation import check_generation
from shoal.hub.published import PublishedLock, PublishedTask
from shoal.hub.score_file import COMPARED
from shoal.hub.scoring import CHOICES, DataTask, answers_digest
from shoal.lock import RoleLock, TaskLock
from shoal.types import Role

if TYPE_CHECKING:  # they are heavy
    from shoal.evals.requests import ItemRequests
    from shoal.evals.scorer import PlannedTask

FILE = "items.parquet"
MAX_ROWS = 20_000_000
MAX_BYTES = 8 << 30  # of all columns, written out
MAX_TEXT = 4 << 20  # characters of one prompt or answer, in UTF-8 bytes
MAX_TEXTS = 2 << 30  # bytes of all different texts
_BATCH = 1 << 14  # rows
# name -> whether it is text (else a number)
COLUMNS: Mapping[str, bool] = {
    "task": True,
    "role": True,
    "item": False,
    "doc_hash": True,
    "request": False,
    "kind": True,
    "context": True,
    "continuation": True,
    "arguments": True,
    "target": True,
    "answer": True,
}
_UNREAD = ("target",)  # for people


def write(path: Path, columns: Mapping[str, list[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [(name, pyarrow.string() if text else pyarrow.int64()) for name, text in COLUMNS.items()]
    )
    pyarrow.parquet.write_table(pyarrow.table(dict(columns), schema), path, compression="zstd")


def instances(one: ItemRequests) -> Iterator[Any]:
    """The requests of an item, a generation item's gold answer last."""
    yield from one.instances
    if one.gold is not None:
        yield one.gold


def requests_digest(planned: PlannedTask) -> str:
    """sha256 over [item, kind, arguments...] of every request in item order, as compact JSON lines."""
    digest = hashlib.sha256()
    for item, one in sorted(planned.requests.items()):
        for instance in instances(one):
            digest.update(as_json([item, instance.request_type, *instance.args]).encode() + b"\n")
    return digest.hexdigest()


def as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def there(folder: Path) -> bool:
    path = folder / FILE
    return path.is_file() and not path.is_symlink()


def read_items(
    folder: Path, lock: PublishedLock, tasks: Collection[str], where: str
) -> dict[tuple[str, Role], PlannedTask]:
    """The requests of these tasks on select and test items, to be scored like those of a task that is here.

    Of a task whose metric has no rule, requests that only the metric needs (generation) are left out.

    Raises:
        PublishError: no such file or task in it; not parquet; other columns or types; too large; requests, items or answers
            that are not those of the lock; a task with nothing to compare by.
    """
    name = f"{where}: {FILE}"
    if not there(folder):
        raise PublishError(f"{name}: not there, though lock.yaml says that items were published")
    known = {task.task: task for task in lock.tasks}
    rows: dict[tuple[str, Role], dict[int, list[dict[str, Any]]]] = {
        (task, role): {item: [] for item in lock.run.task(task).roles[role].items}
        for task in tasks
        for role in COMPARED
    }
    for row in _rows(folder / FILE, name):
        items = rows.get((row["task"], row["role"]))
        if items is None:
            continue
        if row["item"] not in items:
            raise PublishError(
                f"{name}: item {row['item']!r} of {row['task']!r} ({row['role']}) is none of the lock's"
            )
        items[row["item"]].append(row)
    return {
        (task, role): _Reader(name, known[task], lock.run.task(task), role).planned(found)
        for (task, role), found in rows.items()
    }


def _rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    wanted = [column for column in COLUMNS if column not in _UNREAD]
    texts = [column for column in wanted if COLUMNS[column]]
    seen: dict[str, str] = {}
    left = MAX_TEXTS
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_form(file, wanted, name)
        # text stays a dictionary: a few bytes that are named a million times must not become gigabytes
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
                columns: dict[str, list[Any]] = {}
                for column in wanted:
                    array = batch.column(column)
                    if not COLUMNS[column]:
                        columns[column] = array.to_pylist()
                        continue
                    _check_texts(array.dictionary, column, name)
                    values = []
                    for text in array.dictionary.to_pylist():
                        if text is not None and text not in seen:
                            left -= len(text)
                            seen[text] = text
                        values.append(seen.get(text))
                    if left < 0:
                        raise PublishError(f"{name}: its texts are more than {MAX_TEXTS:,} characters")
                    columns[column] = [None if i is None else values[i] for i in array.indices.to_pylist()]
                for cells in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, cells, strict=True))
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise PublishError(f"{name}: not parquet that can be read: {said}") from None


def _check_form(file: Any, wanted: Sequence[str], name: str) -> None:
    import pyarrow

    about, schema = file.metadata, file.schema_arrow
    size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    if about.num_rows > MAX_ROWS or size > MAX_BYTES:
        raise PublishError(f"{name}: {about.num_rows:,} rows, {size:,} bytes; more than any run has")
    for column in wanted:
        if column not in schema.names:
            raise PublishError(f"{name}: expected columns {', '.join(wanted)}; {column} is missing")
        kind = schema.field(column).type
        if kind != (pyarrow.string() if COLUMNS[column] else pyarrow.int64()):
            raise PublishError(f"{name}: column {column} is of type {kind}")


def _check_texts(dictionary: Any, column: str, name: str) -> None:
    import pyarrow.compute

    lengths = pyarrow.compute.binary_length(dictionary)
    longest = pyarrow.compute.max(lengths).as_py() or 0
    total: int = pyarrow.compute.sum(lengths).as_py() or 0
    if longest > MAX_TEXT or total > MAX_TEXTS:
        raise PublishError(
            f"{name}: column {column} has {longest:,} bytes in one text, {total:,} in all; more than any run has"
        )


class _Reader:
    """Rows of one task and role become requests. name: of the file, for messages."""

    def __init__(self, name: str, task: PublishedTask, run: TaskLock, role: Role) -> None:
        assert task.scoring is not None  # items are published
        self._task, self._run, self._role, self._scoring = task, run, role, task.scoring
        self._where = f"{name}: {task.task!r} ({role})"

    def planned(self, rows: Mapping[int, list[dict[str, Any]]]) -> PlannedTask:
        from shoal.evals.catalogue import TaskSource
        from shoal.evals.scorer import PlannedTask

        locked: RoleLock = self._run.roles[self._role]
        hashes = dict(zip(locked.items, locked.hashes, strict=True))
        answers, requests = [], {}
        for item, found in sorted(rows.items()):
            found = sorted(found, key=lambda row: (row["request"] is None, row["request"]))
            if not found or [row["request"] for row in found] != list(range(len(found))):
                raise self._error(f"the requests of item {item} are not all there")
            told = {(row["doc_hash"], row["answer"]) for row in found}
            if len(told) != 1 or found[0]["doc_hash"] != hashes[item]:
                raise self._error(f"item {item} is not the one that lock.yaml names, by its content's hash")
            answers.append((item, hashes[item], found[0]["answer"] or ""))
            requests[item] = self._requests(item, found)
        source = TaskSource(self._task.task, DataTask(self._task.task, self._scoring, self._run.metric))
        planned = PlannedTask(source, requests)
        for what, here, expected in (
            ("requests", requests_digest(planned), (self._task.requests or {}).get(self._role)),
            ("answers", answers_digest(answers), self._scoring.answers.get(self._role)),
        ):
            if here != expected:
                raise self._error(
                    f"its {what} have the hash {here[:12]}, lock.yaml says {(expected or 'none')[:12]}: items were changed"
                )
        if self._scoring.rule is not None:
            return planned
        return replace(planned, requests=self._without_generation(requests))

    def _requests(self, item: int, rows: list[dict[str, Any]]) -> ItemRequests:
        from shoal.evals.requests import ItemRequests

        doc = self._answer(item, rows)
        made = [self._instance(item, row, doc) for row in rows]
        gold = made.pop() if len(made) == 2 and made[0].request_type == "generate_until" else None
        kinds = {one.request_type for one in made}
        expected = {"multiple_choice": "loglikelihood"}.get(self._run.output_type, self._run.output_type)
        if kinds != {expected} or (gold is not None and gold.request_type != "loglikelihood"):
            raise self._error(f"item {item} has requests of other kinds than a {self._run.output_type} task")
        if len(made) != 1 and self._run.output_type != "multiple_choice":
            raise self._error(f"item {item} has {len(made)} requests, expected one")
        if self._scoring.rule in CHOICES and len(doc["choices"]) != len(made):
            raise self._error(f"item {item} has {len(made)} requests for {len(doc['choices'])} options")
        return ItemRequests(doc, tuple(made), gold)

    def _answer(self, item: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What counts as right: texts, or indices of right ones among the choices."""
        if self._scoring.rule in (None, "greedy"):
            return {}
        try:
            found = json.loads(rows[0]["answer"])
            gold, choices = found["gold"], found.get("choices")
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
            raise self._error(f"item {item}: cannot read what counts as right") from None
        if self._scoring.rule in CHOICES:
            fine = _all(choices, str) and _all(gold, int) and all(0 <= one < len(choices) for one in gold)
        else:
            fine = _all(gold, str) and bool(gold)
        if not fine:
            raise self._error(f"item {item}: what counts as right is not what {self._scoring.rule} needs")
        return {"gold": gold, "choices": choices}

    def _instance(self, item: int, row: Mapping[str, Any], doc: dict[str, Any]) -> Any:
        from lm_eval.api.instance import Instance

        kind, context, continuation = row["kind"], row["context"], row["continuation"]
        arguments: tuple[Any, ...] = ()
        if kind == "loglikelihood" and isinstance(context, str) and isinstance(continuation, str):
            arguments = (context, continuation)
        elif kind == "loglikelihood_rolling" and isinstance(context, str):
            arguments = (context,)
        elif kind == "generate_until" and isinstance(context, str):
            arguments = (context, self._generation(item, row["arguments"]))
        if not arguments:
            raise self._error(f"item {item} has a request of kind {str(kind)[:40]!r} without what it needs")
        return Instance(
            request_type=kind,
            doc=doc,
            arguments=arguments,
            idx=row["request"],
            metadata=(self._task.task, item, 1),
        )

    def _generation(self, item: int, text: Any) -> dict[str, Any]:
        try:
            found = json.loads(text)
            if not isinstance(found, dict):
                raise TypeError("expected a mapping")
            check_generation(found)
        except (TypeError, ValueError, RecursionError) as error:
            raise self._error(f"item {item}: arguments of generation: {error}") from None
        return found

    def _without_generation(self, requests: Mapping[int, ItemRequests]) -> dict[int, ItemRequests]:
        """Nothing is generated that nobody can judge."""
        if self._run.output_type != "generate_until":
            return dict(requests)
        if requests and not any(one.gold is not None for one in requests.values()):
            raise PublishError(
                f"{self._where}: {self._run.metric} cannot be computed without the task's own files ({self._scoring.why}), and"
                " no log-likelihood was published; name the folder that you have the task in by --include-path"
            )
        return {item: replace(one, instances=()) for item, one in requests.items()}

    def _error(self, what: str) -> PublishError:
        return PublishError(f"{self._where}: {what}")


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)
