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
        (column("item", lambda t: t["item"].cast(pyarrow.string())), "column item is of type string"),
        (column("metrics", lambda t: t["metrics"].cast(pyarrow.binary())), "metrics is of type binary"),
        (column("logliks", lambda t: t["item"]), "column logliks is of type int64"),
        (lambda t: pyarrow.concat_tables([t] * 2), "more scores of the winner than the"),
        (
            column("item", lambda t: pyarrow.compute.add(t["item"], 10**6)),
            r"item 10\d+ of .* is none of the lock's",
        ),
        (
            column("metrics", lambda t: named("{" + " " * (1 << 20), len(t))),
            "1,048,577 bytes in one text",
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


def test_a_small_file_does_not_become_large(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Millions of log-likelihoods in some kilobytes, and a megabyte of text named a million times: both are refused."""

    folder = tmp_path / "p"
    shutil.copytree(made.recipe, folder)
    monkeypatch.setattr(score_file, "MAX_VALUES", 2_500_000)
    schema = pyarrow.parquet.read_schema(made.recipe / SCORES)
    lock = load_published(made.recipe / "lock.yaml")
    values = pyarrow.array([0.0]).take(pyarrow.array([0] * (1_000_000)))
    one = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1_000_000], pyarrow.int32()), values)
    with pyarrow.parquet.ParquetWriter(folder / SCORES, schema, compression="zstd") as writer:
        for _ in range(3):
            row = pyarrow.Table.from_pylist(
                [{"candidate": lock.winner.id, "role": "test", "task": "x", "item": 0, "metrics": "{}"}],
                schema,
            )
            writer.write_table(row.set_column(schema.get_field_index("logliks"), "logliks", one))
    assert (folder / SCORES).stat().st_size < 1 << 20
    with pytest.raises(PublishError, match="3,000,000 log-likelihoods"):
        read(folder)

    text = named("{" + " " * (1 << 20), 1_000_000)
    others = {
        "candidate": pyarrow.array([lock.winner.id]).take(pyarrow.array([0] * len(text))),
        "role": pyarrow.array(["test"]).take(pyarrow.array([0] * len(text))),
        "task": pyarrow.array(["x"]).take(pyarrow.array([0] * len(text))),
        "item": pyarrow.array([0] * len(text)),
        "logliks": pyarrow.nulls(len(text), pyarrow.list_(pyarrow.float64())),
    }
    # written without the note that it was a dictionary
    pyarrow.parquet.write_table(
        pyarrow.table({**others, "metrics": text}), folder / SCORES, store_schema=False, compression="zstd"
    )
    assert (folder / SCORES).stat().st_size < 1 << 20
    with pytest.raises(PublishError, match="more scores of the winner"):
        read(folder)
