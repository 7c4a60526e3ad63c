"""Published scores are read as a stranger's file: types, sizes and counts first, objects last."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pytest
from hub.publications import Made

from shoal.errors import PublishError
from shoal.hub import score_file
from shoal.hub.published import load_published
from shoal.hub.score_file import COMPARED, read_scores
from shoal.hub.tables import SCORES

Change = Callable[[Any], Any]


def changed(made: Made, folder: Path, change: Change) -> Path:
    """A copy of the publication with other scores, without a note of what was a dictionary. change: of the table."""
    shutil.copytree(made.recipe, folder)
    table = pyarrow.parquet.read_table(folder / SCORES)
    pyarrow.parquet.write_table(change(table), folder / SCORES, store_schema=False)
    return folder


def read(folder: Path) -> Any:
    return read_scores(folder, load_published(folder / "lock.yaml"))


def named(text: str, times: int) -> Any:
    return pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * times, pyarrow.int32()), pyarrow.array([text])
    )


def column(name: str, array: Any) -> Change:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, array(table))


def test_the_winners_rows_are_read_and_no_others(made: Made) -> None:
    lock = load_published(made.recipe / "lock.yaml")
    found = read(made.recipe)
    assert set(found) == {(task.task, role) for task in lock.run.tasks for role in COMPARED}
    for task in lock.run.tasks:
        for role in COMPARED:
            assert set(found[task.task, role]) == set(task.roles[role].items)


def test_rows_come_in_any_order_and_in_batches(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(made, tmp_path / "p", lambda table: table.sort_by([("objective", "descending")]))
    monkeypatch.setattr(score_file, "_BATCH", 7)
    assert read(folder) == read(made.recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns("logliks"), "logliks is missing"),
        (column("item", lambda t: t["item"].cast(pyarrow.string())), "column item is not of type int64"),
        (column("metrics", lambda t: t["metrics"].cast(pyarrow.binary())), "metrics is not of type string"),
        (column("logliks", lambda t: t["item"]), "column logliks is not of type list"),
        (lambda t: pyarrow.concat_tables([t] * 2), "more scores of the winner than the"),
        (
            column("item", lambda t: pyarrow.compute.add(t["item"], 10**6)),
            r"item 10\d+ of .* is none of the lock's",
        ),
        (
            column("metrics", lambda t: named("{" + " " * (1 << 20), len(t))),
            "1,048,577 bytes of metrics on one item",
        ),
        (
            column("metrics", lambda t: pyarrow.array(["[" * 100_000] * len(t))),
            "cannot be read",
        ),
        (
            column("logliks", lambda t: pyarrow.nulls(len(t), pyarrow.list_(pyarrow.float64()))),
            "cannot be read",
        ),
        (lambda t: t.slice(0, 0), "are not all there"),
    ],
)
def test_what_is_not_as_written_is_refused(made: Made, tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(PublishError, match=message):
        read(changed(made, tmp_path / "p", change))


def test_an_item_has_one_score(made: Made, tmp_path: Path) -> None:
    """Also where another row is missing, so that there are not too many."""
    lock = load_published(made.recipe / "lock.yaml")

    def twice(table: Any) -> Any:
        rows = table.to_pylist()
        mine = [
            i for i, row in enumerate(rows) if (row["candidate"], row["role"]) == (lock.winner.id, "test")
        ]
        chosen = next(
            i for i, row in enumerate(rows) if (row["candidate"], row["role"]) == (lock.winner.id, "select")
        )
        rows[chosen] = rows[mine[0]]
        return pyarrow.Table.from_pylist(rows, table.schema)

    with pytest.raises(PublishError, match="has two scores of the winner"):
        read(changed(made, tmp_path / "p", twice))


def test_another_task_of_the_winners_is_refused_without_its_name(made: Made, tmp_path: Path) -> None:
    folder = changed(made, tmp_path / "p", column("task", lambda t: named("\x1b" * (1 << 20), len(t))))
    with pytest.raises(PublishError, match="a task that is none of the lock's") as caught:
        read(folder)
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)


def repeated(value: Any, times: int) -> Any:
    return pyarrow.array([value]).take(pyarrow.array([0] * times))


@pytest.mark.parametrize(
    ("limit", "message"),
    [("MAX_VALUES", "3,000,000 log-likelihoods; more"), ("MAX_CHOSEN", "3,000,000 log-likelihoods and")],
)
def test_a_few_kilobytes_do_not_become_millions_of_numbers(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, message: str
) -> None:
    folder = tmp_path / "p"
    shutil.copytree(made.recipe, folder)
    monkeypatch.setattr(score_file, limit, 2_500_000)
    schema = pyarrow.parquet.read_schema(made.recipe / SCORES)
    lock = load_published(made.recipe / "lock.yaml")
    task = lock.run.tasks[0]
    lists = pyarrow.ListArray.from_arrays(
        pyarrow.array([0, 1_000_000, 2_000_000, 3_000_000], pyarrow.int32()), repeated(0.0, 3_000_000)
    )
    rows = pyarrow.Table.from_pylist(
        [
            {"candidate": lock.winner.id, "role": "test", "task": task.task, "item": item, "metrics": "{}"}
            for item in task.roles["test"].items[:3]
        ],
        schema,
    )
    rows = rows.set_column(schema.get_field_index("logliks"), "logliks", lists)
    pyarrow.parquet.write_table(rows, folder / SCORES, compression="zstd")
    assert (folder / SCORES).stat().st_size < 1 << 16
    with pytest.raises(PublishError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("limit", "least", "message"),
    [
        ("MAX_TEXTS", 5 << 20, "bytes of metrics of the winner; more"),
        ("MAX_TEXT", 1 << 10, "on one item; more"),
    ],
)
def test_one_text_that_is_named_often_is_counted_as_often(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, least: int, message: str
) -> None:
    text = '{"acc": 1' + " " * (1 << 19) + "}"
    folder = changed(made, tmp_path / "p", column("metrics", lambda t: named(text, len(t))))
    assert (folder / SCORES).stat().st_size < 1 << 20
    assert read(folder)  # it is within the limits that hold
    monkeypatch.setattr(score_file, limit, least)
    with pytest.raises(PublishError, match=message):
        read(folder)


def test_too_many_rows_are_not_made_into_objects(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    shutil.copytree(made.recipe, folder)
    lock = load_published(made.recipe / "lock.yaml")
    task, count = lock.run.tasks[0], 1_000_000
    columns = {
        "candidate": repeated(lock.winner.id, count),
        "role": repeated("test", count),
        "task": repeated(task.task, count),
        "item": repeated(task.roles["test"].items[0], count),
        "metrics": repeated("{}", count),
        "logliks": pyarrow.nulls(count, pyarrow.list_(pyarrow.float64())),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / SCORES, store_schema=False)
    with pytest.raises(PublishError, match="more scores of the winner than the"):
        read(folder)
