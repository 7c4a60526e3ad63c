"""The journal of a run as parquet: ids, hashes, correctness, log-likelihoods. No prompt, target or generation.

| file | a row is |
| --- | --- |
| journal/scores.parquet | one item as one candidate was scored on it |
| journal/candidates.parquet | a candidate, in the order in which they were asked for |
| journal/evaluations.parquet | a finished piece of work: a candidate on items of one role |
| journal/generations.parquet | the fitness that the optimizer was told of a candidate |
| journal/events.parquet | a start, a disturbance, an opening of the test items, ... |

`scores.metrics` is JSON of the metrics that are numbers (or lists of numbers); `value` is the claimed metric's where it
is one number, `correct` where that is 0 or 1.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from shoal.hub.privacy import Scrubber
from shoal.lock import Lock
from shoal.types import ROLES

FOLDER = "journal"
SCORES = f"{FOLDER}/scores.parquet"
# what is known to hold no text but ours; an event of any other kind is not published
_EVENTS: Mapping[str, tuple[str, ...]] = {
    "start": ("device",),
    "loaded": ("seconds",),
    "note": ("text",),
    "disturbed": ("candidate", "what"),
    "budget": ("before", "after", "max_seconds"),
    "course": (),  # all of its fields: numbers and names of tasks
    "growth": (),
    "out of time": ("generation", "max_seconds", "spent"),
    "search ended": ("reason", "generations", "candidates"),
    "stopped": ("reason",),
    "disqualified": ("candidate", "reason"),
    "unwritten": ("candidates", "reason"),
    "written": ("candidate", "prompts", "ended", "sanity", "seconds_merge", "seconds_score"),
    "test opened": ("winner", "generations"),
}


def write_tables(journal: Path, out: Path, lock: Lock, scrubber: Scrubber) -> list[str]:
    """Write every table under `out`; returns the kinds of events that were left out.

    journal: RUN/journal.sqlite, which is opened for reading only.
    """
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    with closing(_opened(journal)) as database:
        _write(out / SCORES, _scores(database, lock))
        _write(out / FOLDER / "candidates.parquet", _candidates(database))
        _write(out / FOLDER / "evaluations.parquet", _evaluations(database, scrubber))
        _write(out / FOLDER / "generations.parquet", _generations(database))
        events, left_out = _events(database, scrubber)
        _write(out / FOLDER / "events.parquet", events)
    return left_out


def clean_journal(journal: Path, out: Path, scrubber: Scrubber) -> None:
    """A copy of a journal, as a journal, whose events and errors are those that are published."""
    with closing(_opened(journal)) as source, closing(sqlite3.connect(out)) as database:
        source.backup(database)
        with database:
            events = database.execute("SELECT id, kind, data FROM events").fetchall()
            for number, kind, text in events:
                if kind not in _EVENTS:
                    database.execute("DELETE FROM events WHERE id=?", (number,))
                else:
                    data = json.loads(text)
                    texts = data.get("texts")  # what is written to prompts of our own is shown
                    clean = json.dumps({**_plain(data, scrubber), **({"texts": texts} if texts else {})})
                    database.execute("UPDATE events SET data=? WHERE id=?", (clean, number))
            errors = database.execute("SELECT id, error FROM evaluations WHERE error IS NOT NULL").fetchall()
            for number, text in errors:
                clean = plain_error(text, scrubber)
                database.execute("UPDATE evaluations SET error=? WHERE id=?", (clean, number))


def _opened(journal: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{journal.resolve().as_uri()}?mode=ro", uri=True)


def items_met(journal: Path) -> dict[tuple[str, str], int]:
    """(task, role) -> how many different items any candidate was scored on."""
    with closing(_opened(journal)) as database:
        query = "SELECT task, role, COUNT(DISTINCT item) FROM scores GROUP BY task, role"
        return {(task, role): count for task, role, count in database.execute(query)}


def _write(path: Path, table: Any) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=1 << 18)


def _table(columns: Sequence[tuple[str, Any]], rows: Iterable[Sequence[Any]]) -> Any:
    import pyarrow

    values: list[list[Any]] = [[] for _ in columns]
    for row in rows:
        for column, value in zip(values, row, strict=True):
            column.append(value)
    schema = pyarrow.schema(list(columns))
    arrays = [pyarrow.array(v, type=kind) for v, (_, kind) in zip(values, columns, strict=True)]
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def _scores(database: sqlite3.Connection, lock: Lock) -> Any:
    import pyarrow as pa

    hashes = {
        (task.task, role, item): found
        for task in lock.tasks
        for role in ROLES
        for item, found in zip(task.roles[role].items, task.roles[role].hashes, strict=True)
    }
    claimed = {task.task: task.metric for task in lock.tasks}
    columns = [
        ("candidate", pa.string()),
        ("role", pa.string()),
        ("task", pa.string()),
        ("item", pa.int64()),
        ("rung", pa.int32()),
        ("doc_hash", pa.string()),
        ("value", pa.float64()),
        ("correct", pa.bool_()),
        ("metrics", pa.string()),
        ("objective", pa.float64()),
        ("logliks", pa.list_(pa.float64())),
        ("tokens", pa.int64()),
    ]

    def rows() -> Iterable[Sequence[Any]]:
        query = (
            "SELECT candidate, role, task, item, rung, metrics, objective, logliks, tokens FROM scores"
            " ORDER BY candidate, role, task, item, rung"
        )
        for candidate, role, task, item, rung, metrics, objective, logliks, tokens in database.execute(query):
            numbers = {k: v for k, v in json.loads(metrics).items() if _numeric(v)}
            value = numbers.get(claimed.get(task, ""))
            value = None if isinstance(value, list) or value is None else float(value)
            correct = bool(value) if value in (0.0, 1.0) else None
            yield (
                candidate,
                role,
                task,
                item,
                rung,
                hashes.get((task, role, item)),
                value,
                correct,
                json.dumps(numbers),
                objective,
                json.loads(logliks),
                tokens,
            )

    return _table(columns, rows())


def _numeric(value: Any) -> bool:
    """A number, or lists of them: a metric may also be a pair of texts, reference and generation, as for BLEU."""
    if isinstance(value, list):
        return all(_numeric(part) for part in value)
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def _candidates(database: sqlite3.Connection) -> Any:
    import pyarrow as pa

    columns = [
        ("candidate", pa.string()),
        ("kind", pa.string()),
        ("generation", pa.int64()),
        ("position", pa.int64()),
        ("genome", pa.list_(pa.float64())),
        ("plan_digest", pa.string()),
    ]
    query = "SELECT id, kind, generation, position, genome, plan_digest FROM candidates ORDER BY asked"
    rows = (
        (*start, None if genome is None else json.loads(genome), digest)
        for *start, genome, digest in database.execute(query)
    )
    return _table(columns, rows)


def _evaluations(database: sqlite3.Connection, scrubber: Scrubber) -> Any:
    import pyarrow as pa

    columns = [
        ("candidate", pa.string()),
        ("role", pa.string()),
        ("rung", pa.int32()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("items", pa.int64()),
        ("seconds_merge", pa.float64()),
        ("seconds_score", pa.float64()),
        ("seconds_rest", pa.float64()),
    ]
    query = (
        "SELECT candidate, role, rung, status, error, items, seconds_merge, seconds_score, seconds_rest"
        " FROM evaluations ORDER BY id"
    )
    rows = (
        (*row[:4], None if row[4] is None else plain_error(row[4], scrubber), *row[5:])
        for row in database.execute(query)
    )
    return _table(columns, rows)


def _plain(data: dict[str, Any], scrubber: Scrubber) -> dict[str, Any]:
    """An event's data without what is private; `what` and `error` are texts of errors."""
    errors = {k: plain_error(data[k], scrubber) for k in ("what", "error") if isinstance(data.get(k), str)}
    clean: dict[str, Any] = scrubber.data({**data, **errors})
    return clean


def plain_error(text: str, scrubber: Scrubber) -> str:
    """Our own errors as they are; of a library's error only its kind, for its message may quote an item."""
    kind = re.match(r"[A-Za-z_.]*(?:Error|Exception|Warning|Exit|Interrupt|Iteration)(?=: )", text)
    return kind[0] if kind else scrubber.text(text)


def _generations(database: sqlite3.Connection) -> Any:
    import pyarrow as pa

    columns = [("generation", pa.int64()), ("candidate", pa.string()), ("fitness", pa.float64())]
    query = "SELECT generation, candidates, fitness FROM tells ORDER BY generation"
    rows = (
        (generation, candidate, value)
        for generation, candidates, fitness in database.execute(query)
        for candidate, value in zip(json.loads(candidates), json.loads(fitness), strict=True)
    )
    return _table(columns, rows)


def _events(database: sqlite3.Connection, scrubber: Scrubber) -> tuple[Any, list[str]]:
    """Events with their seconds after the first one, and the kinds that are not published."""
    import pyarrow as pa

    found = database.execute("SELECT time, kind, data FROM events ORDER BY id").fetchall()
    start = found[0][0] if found else 0.0
    kept = []
    for moment, kind, text in found:
        if kind in _EVENTS:
            data = json.loads(text)
            fields = _EVENTS[kind] or tuple(data)
            kept.append(
                (
                    moment - start,
                    kind,
                    json.dumps(_plain({key: data[key] for key in fields if key in data}, scrubber)),
                )
            )
    columns = [("seconds", pa.float64()), ("kind", pa.string()), ("data", pa.string())]
    left_out = list(dict.fromkeys(kind for _, kind, _ in found if kind not in _EVENTS))
    return _table(columns, kept), left_out
