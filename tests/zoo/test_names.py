"""Where zoos are, and what is said of one that does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal import zoo
from shoal.errors import ShoalError
from shoal.evals.catalogue import Catalogue
from shoal.zoo.tiny import MEMBERS
from shoal.zoo.tiny_tasks import METRICS, items


def test_the_cache_is_the_users_or_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    assert zoo.cache_folder() == tmp_path / "zoo"
    monkeypatch.delenv("SHOAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert zoo.cache_folder().parts[-2:] == ("shoal", "zoo")


def test_names() -> None:
    assert zoo.names() == ("tiny", "smollm2")
    assert zoo.names("tiny") == MEMBERS


def test_tasks_are_written_without_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of their own, whose YAMLs name items that are there; once."""
    from shoal.preflight import resolve_include_path

    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    said: list[str] = []
    folder = resolve_include_path("zoo:tiny/tasks", Path(), said.append)
    assert folder is not None and folder == zoo.tasks_path("tiny")
    assert said == ["zoo tiny: writing tasks"]
    assert not list(tmp_path.rglob("*.safetensors")) and not (zoo.cache_folder() / "tiny").exists()
    assert {path.stem for path in folder.glob("*.yaml")} == METRICS.keys()
    source = Catalogue(folder).load("tiny_choice")
    assert source.docs("test") == items()["tiny_choice"]["test"]


def test_unknown_zoos_and_members_are_errors_that_list_the_valid_ones() -> None:
    with pytest.raises(ShoalError, match=r"no zoo 'tinny': did you mean 'tiny'\? valid: smollm2, tiny"):
        zoo.member_path("tinny", "base")
    with pytest.raises(ShoalError, match=r"zoo 'tiny' has no model 'revers': did you mean 'reverse'\?"):
        zoo.member_path("tiny", "revers")
    with pytest.raises(ShoalError, match="no zoo 'big'"):
        zoo.tasks_path("big")
    with pytest.raises(ShoalError, match="zoo 'smollm2' has no tasks"):
        zoo.tasks_path("smollm2")
