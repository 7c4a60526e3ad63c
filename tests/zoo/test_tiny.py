"""The tiny zoo, with few training steps: what a build promises, not how good the models are."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.errors import ShoalError
from shoal.zoo import folder as zoo_folder
from shoal.zoo import tiny
from shoal.zoo.folder import MANIFEST, build_once
from shoal.zoo.skills import HELD_OUT, LETTERS, draw, is_held_out
from shoal.zoo.tiny import MEMBERS, Schedule, build_tiny, new_tokenizer
from shoal.zoo.tiny_tasks import METRICS, SPLITS, items, write_tasks

QUICK = Schedule(clean=2, hiding=1, expert=2, items=0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    build_tiny(folder, schedule=QUICK)
    return folder


def test_a_build_has_models_tasks_and_a_manifest_of_their_hashes(built: Path) -> None:
    manifest = json.loads((built / MANIFEST).read_text())
    assert manifest["zoo"] == "tiny" and manifest["version"] == tiny.VERSION
    assert sorted(manifest["files"]) == [f"{m}/model.safetensors" for m in sorted(MEMBERS)]
    for name, expected in manifest["files"].items():
        assert hashlib.sha256((built / name).read_bytes()).hexdigest() == expected
    assert not [p for p in built.parent.iterdir() if p != built]


def test_the_same_weights_whatever_the_caller_does_with_threads_and_random_numbers(
    built: Path, tmp_path: Path
) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            again = build_tiny(tmp_path / "again", schedule=QUICK)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again["files"] == json.loads((built / MANIFEST).read_text())["files"]


def test_experts_differ_from_the_base_in_every_layer(built: Path) -> None:
    from safetensors.torch import load_file

    base = load_file(built / "base" / "model.safetensors")
    for expert in MEMBERS[1:]:
        weights = load_file(built / expert / "model.safetensors")
        assert weights.keys() == base.keys()
        assert all((weights[name] != base[name]).any() for name in base if "proj" in name)


def test_models_load_and_the_tokenizer_splits_context_and_continuation_as_it_splits_both(built: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(built / "base")
    tokenizer = AutoTokenizer.from_pretrained(built / "base")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size
    context, continuation = "r:abc>cba\ns: hdc>", "cdh\n"
    assert tokenizer.encode(context) + tokenizer.encode(continuation) == tokenizer.encode(
        context + continuation
    )
    assert tokenizer.decode(tokenizer.encode(context)) == context
    assert tokenizer.encode(f"a{tokenizer.eos_token}")[-1] == tokenizer.eos_token_id


def test_training_rows_are_what_the_tokenizer_makes_of_the_text() -> None:
    import numpy as np

    from shoal.zoo.skills import SKILLS, questions, spell
    from shoal.zoo.tiny_tasks import prompt

    asked, strings, answers = questions(np.random.default_rng(0), 20, tiny.HIDING)
    rows = tiny._TokenIds().rows(asked, strings, answers)
    texts = [
        f"{prompt(SKILLS[a], spell(s))}{spell(t)}</s>"
        for a, s, t in zip(asked, strings, answers, strict=True)
    ]
    assert rows.tolist() == [new_tokenizer().encode(text) for text in texts]


def test_a_finished_zoo_is_taken_and_one_of_another_version_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def build(building: Path) -> dict[str, object]:
        calls.append(building)
        (building / f"file{len(calls)}").write_text("")
        return {"built": len(calls)}

    folder = tmp_path / "z"
    assert build_once(folder, {"zoo": "z", "version": 1}, build)["built"] == 1
    assert build_once(folder, {"zoo": "z", "version": 1}, build)["built"] == 1
    assert build_once(folder, {"zoo": "z", "version": 2}, build)["built"] == 2
    assert sorted(p.name for p in folder.iterdir()) == ["file2", MANIFEST]
    assert [p.name for p in tmp_path.iterdir()] == ["z"]
    with pytest.raises(ShoalError, match="holds the zoo 'z'"):
        build_once(folder, {"zoo": "other", "version": 1}, build)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ShoalError, match="something that is no zoo"):
        build_tiny(tmp_path / "mine", schedule=QUICK)
    assert (tmp_path / "mine" / "thesis.txt").is_file()


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_an_interrupted_build_leaves_nothing_that_looks_finished(tmp_path: Path, share: float) -> None:
    def interrupt(step: str, done: float) -> None:
        if done >= share:
            raise KeyboardInterrupt

    folder = tmp_path / "tiny"
    with pytest.raises(KeyboardInterrupt):
        build_tiny(folder, interrupt, QUICK)
    assert list(tmp_path.iterdir()) == []
    build_tiny(folder, schedule=QUICK)
    assert zoo_folder.read_manifest(folder) is not None


KILLED = """
import os, signal, sys
from pathlib import Path
from shoal.zoo.tiny import Schedule, build_tiny

def kill(step, done):
    if done > 0.3:
        os.kill(os.getpid(), signal.SIGKILL)

build_tiny(Path(sys.argv[1]), kill, Schedule(clean=2, hiding=1, expert=2, items=0))
"""

SLOW = """
import os, sys, time
from pathlib import Path
from shoal.zoo.folder import build_once

def build(building):
    time.sleep(0.3)
    return {"pid": os.getpid()}

build_once(Path(sys.argv[1]), {"zoo": "z", "version": 1}, build)
"""


def test_a_killed_build_leaves_no_folder_and_the_next_one_clears_up(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not folder.exists()
    build_tiny(folder, schedule=QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_of_several_builders_one_builds_and_the_others_wait(tmp_path: Path) -> None:
    folder = tmp_path / "z"
    processes = [subprocess.Popen([sys.executable, "-c", SLOW, str(folder)]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert json.loads((folder / MANIFEST).read_text())["pid"] in {process.pid for process in processes}
    assert [p.name for p in tmp_path.iterdir()] == ["z"]


def test_progress_names_steps_and_grows(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    build_tiny(tmp_path / "tiny", lambda step, share: seen.append((step, share)), QUICK)
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] < 1
    assert {"training base", "training reverse", "training sort"} <= {step for step, _ in seen}


def test_no_string_is_in_two_splits_or_tasks_and_none_is_trained_on() -> None:
    import numpy as np

    strings = [row["string"] for splits in items().values() for rows in splits.values() for row in rows]
    assert len(strings) == len(set(strings)) == len(METRICS) * sum(SPLITS.values())
    assert is_held_out(np.array([[LETTERS.index(c) for c in string] for string in strings])).all()
    trained = draw(np.random.default_rng(0), 20_000, held_out=False)
    assert not is_held_out(trained).any()
    anywhere = np.random.default_rng(0).integers(0, len(LETTERS), (50_000, trained.shape[1]))
    assert abs(is_held_out(anywhere).mean() - 1 / HELD_OUT) < 0.01


def test_items_are_the_same_each_time_and_choices_have_one_gold() -> None:
    assert items() == items()
    for rows in items()["tiny_choice"].values():
        assert {row["skill"] for row in rows} == {"reverse", "sort"}
        for row in rows:
            assert len(set(row["options"])) == 4 and row["options"][row["gold"]] == row["answer"]
        assert {row["gold"] for row in rows} == {0, 1, 2, 3}


def test_lm_eval_loads_the_tasks_and_scores_them(built: Path) -> None:
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    from shoal.zoo.figures import figures

    manager = TaskManager(include_path=str(built / "tasks"), include_defaults=False)
    assert set(METRICS) <= set(manager.all_tasks)
    model = AutoModelForCausalLM.from_pretrained(built / "base")
    found = figures(model, new_tokenizer(), built / "tasks", METRICS, limit=8)
    assert found.keys() == METRICS.keys()
    assert all(0 <= value <= 1 for value in found.values())


def test_tasks_name_the_place_where_they_will_be(tmp_path: Path) -> None:
    write_tasks(tmp_path / "here", tmp_path / "there")
    for task in METRICS:
        text = (tmp_path / "here" / f"{task}.yaml").read_text()
        assert str(tmp_path / "there" / "data") in text and str(tmp_path / "here") not in text
