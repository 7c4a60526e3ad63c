"""lm-eval's index of its own tasks is read once, kept, and built anew when a task file changes."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shoal.evals.index import kept_index


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is taken for lm-eval's own: three real tasks, one of which a tag names, and a group of its own."""
    import lm_eval.tasks

    folder, real = tmp_path / "own", Path(lm_eval.tasks.__file__).parent
    for name in ("arc", "gsm8k", "piqa"):
        shutil.copytree(real / name, folder / name)
    (folder / "group.yaml").write_text("group: both\ntask: [arc_easy, gsm8k]\n")
    monkeypatch.setattr(lm_eval.tasks, "__file__", str(folder / "__init__.py"))
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The task files that were read."""
    import lm_eval.tasks._index as module

    files, load = list[Path](), module.load_yaml

    def loaded(path: Any, **options: Any) -> Any:
        files.append(Path(path))
        return load(path, **options)

    monkeypatch.setattr(module, "load_yaml", loaded)
    return files


def manager(*include: Path) -> Any:
    from lm_eval.tasks import TaskManager

    with kept_index():
        return TaskManager(include_path=[str(path) for path in include] or None)


def test_it_is_what_lm_eval_reads(own: Path, read: list[Path]) -> None:
    from lm_eval.tasks import TaskManager

    expected = TaskManager()
    assert {"arc_easy", "gsm8k", "piqa", "both"} <= expected.task_index.keys()
    assert manager().task_index == expected.task_index
    read.clear()
    again = manager()
    assert not read
    assert again.task_index == expected.task_index
    assert (again.all_subtasks, again.all_tags) == (expected.all_subtasks, expected.all_tags)


def test_an_include_path_comes_after_it(own: Path, read: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "piqa.yaml").write_text("task: piqa\ndataset_path: mine\n")
    manager()
    read.clear()
    index = manager(tmp_path / "mine").task_index
    assert read == [tmp_path / "mine" / "piqa.yaml"]
    assert index["piqa"].cfg == {"task": "piqa", "dataset_path": "mine"}
    assert "arc_easy" in index


def test_a_changed_a_new_and_a_lost_file_are_seen(own: Path) -> None:
    manager()
    (own / "group.yaml").write_text("group: all_three\ntask: [arc_easy, gsm8k, piqa]\n")
    (own / "new.yaml").write_text("task: new\n")
    index = manager().task_index
    assert {"all_three", "new"} <= index.keys() and "both" not in index
    (own / "new.yaml").unlink()
    assert "new" not in manager().task_index


def test_a_changed_file_that_others_include_is_seen(own: Path) -> None:
    (own / "_base_yaml").write_text("dataset_path: old\ntag: before\n")
    (own / "new.yaml").write_text("include: _base_yaml\ntask: new\n")
    assert manager().task_index["new"].cfg["dataset_path"] == "old"
    (own / "_base_yaml").write_text("dataset_path: changed\ntag: after\n")
    index = manager().task_index
    assert index["new"].cfg["dataset_path"] == "changed" and "after" in index and "before" not in index


@pytest.mark.parametrize("content", [b"", b"not gzip", b"cut", b"damaged"])
def test_a_broken_file_is_built_anew(own: Path, tmp_path: Path, content: bytes) -> None:
    expected = manager().task_index
    (file,) = (tmp_path / "cache" / "lm-eval").iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    damaged = {b"cut": whole[:middle], b"damaged": whole[:middle] + b"damaged" + whole[middle + 7 :]}
    file.write_bytes(damaged.get(content, content))
    assert manager().task_index == expected
    assert json.loads(gzip.decompress(file.read_bytes())) == json.loads(gzip.decompress(whole))


def test_what_json_has_no_word_for_is_not_kept(own: Path, tmp_path: Path) -> None:
    (own / "dated.yaml").write_text("task: dated\nmetadata: {1: 2026-01-01}\n")
    assert manager().task_index["dated"].cfg["metadata"].keys() == {1}
    assert manager().task_index["dated"].cfg["metadata"].keys() == {1}
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_costs_time_only(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "file" / "cache"))
    assert "arc_easy" in manager().task_index


def test_lm_eval_is_left_as_it_was(own: Path) -> None:
    from lm_eval.tasks._index import TaskIndex

    build = TaskIndex.build
    with pytest.raises(RuntimeError), kept_index():
        assert TaskIndex.build is not build
        raise RuntimeError
    assert TaskIndex.build is build
