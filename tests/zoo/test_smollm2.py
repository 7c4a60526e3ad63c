"""SmolLM2: what can be said without downloading it; and the experts that the repository holds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shoal.errors import ShoalError
from shoal.zoo.smollm2 import build_smollm2, weights_sha256

RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2"
TASKS = ("smol_addition", "smol_subtraction", "smol_blimp")


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"smollm2_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder in the form of the public files, two items each."""
    (tmp_path / "arithmetic").mkdir()
    (tmp_path / "blimp").mkdir()
    for name, word, answers in (
        ("two_digit_addition", "plus", (9, 11)),
        ("two_digit_subtraction", "minus", (5, 5)),
    ):
        rows = [
            {"context": f"\n\nQ: What is {a} {word} {b}?\n\nA:", "completion": f" {c}"}
            for (a, b), c in zip(((7, 2), (8, 3)), answers, strict=True)
        ]
        (tmp_path / "arithmetic" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name in module(RECIPE / "tasks" / "data.py").BLIMP:
        rows = [
            {"sentence_good": f"{name} {i}", "sentence_bad": "x", "UID": name, "field": "f"} for i in (0, 1)
        ]
        (tmp_path / "blimp" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path))
    return tmp_path


def test_unknown_sources_and_revisions_of_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=r"no source 'hug' for smollm2: did you mean 'hub'\?"):
        build_smollm2(tmp_path / "m", "hug")
    with pytest.raises(ShoalError, match="source 'gguf' has none"):
        build_smollm2(tmp_path / "m", "gguf", revision="main")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_other_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ShoalError, match="--source gguf") as caught:
        build_smollm2(tmp_path / "m", "hub", revision="no-such-revision")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_the_hash_is_of_the_tensors(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from shoal.merge import weights_sha256 as of_tensors

    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weights_sha256(tmp_path) == of_tensors(tensors.items())


def test_tasks_load_and_say_what_lm_evals_own_say(data: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(RECIPE / "tasks"), include_defaults=False)
    tasks: dict[str, Any] = manager.load(list(TASKS))["tasks"]
    doc = tasks["smol_addition"].validation_docs()[0]
    assert tasks["smol_addition"].doc_to_text(doc) == "Question: What is 7 plus 2?\nAnswer:"
    assert tasks["smol_addition"].doc_to_target(doc) == " 9"
    pairs = tasks["smol_blimp"].validation_docs()
    assert len(pairs) == 16 and len(set(pairs["UID"][:8])) == 8
    assert tasks["smol_blimp"].doc_to_choice(pairs[0]) == [pairs[0]["sentence_good"], "x"]


def test_missing_data_is_an_error_that_says_what_and_from_where(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = module(RECIPE / "tasks" / "data.py")
    (data / "arithmetic" / "two_digit_addition.jsonl").unlink()
    with pytest.raises(RuntimeError, match=r"expected arithmetic/two_digit_addition.jsonl .*openai/gpt-3"):
        functions.addition()
    monkeypatch.delenv("SHOAL_DATA")
    with pytest.raises(RuntimeError, match="SHOAL_DATA is not set"):
        functions.blimp()


@pytest.mark.parametrize("skill", ["addition", "subtraction"])
def test_committed_adapters_name_their_base_and_no_machine(skill: str) -> None:
    from safetensors import safe_open

    folder = RECIPE / "adapters" / skill
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    note = json.loads((folder / "shoal_base.json").read_text())
    assert note["source"] == "gguf" and len(note["weights_sha256"]) == 64
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        assert len(list(weights.keys())) == 30 * 7 * 2


def test_training_never_meets_an_excluded_pair(data: Path) -> None:
    import itertools

    import numpy as np

    script = module(RECIPE / "train_experts.py")
    excluded = script.excluded_pairs([data / "arithmetic" / "two_digit_addition.jsonl"])
    assert excluded == {(7, 2), (8, 3)}
    pairs = list(itertools.islice(script.training_pairs(excluded, np.random.default_rng(0)), 9_998))
    assert len(set(pairs)) == 9_998 and not excluded & set(pairs)


def test_the_training_script_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, RECIPE / "train_experts.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "addition" in done.stdout and "--exclude" in done.stdout
