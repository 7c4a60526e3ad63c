from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.errors import CheckpointError
from shoal.merge import Checkpoint, check_compatible, check_tokenizers
from shoal.merge.checkpoint import SINGLE

Edit = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture
def edited(tmp_path: Path, llamas: list[Path]) -> Callable[[Edit], Checkpoint]:
    def edit(change: Edit) -> Checkpoint:
        folder = Path(shutil.copytree(llamas[1], tmp_path / "edited"))
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE)
        return Checkpoint.open(folder)

    return edit


def test_a_family_fits(llamas):
    check_compatible([(p.name, Checkpoint.open(p)) for p in llamas])
    check_tokenizers([(p.name, p) for p in llamas])


def test_a_tied_head_may_be_absent(tmp_path, tied_llamas):
    folder = Path(shutil.copytree(tied_llamas[1], tmp_path / "both"))
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / SINGLE)
    check_compatible([("base", Checkpoint.open(tied_llamas[0])), ("both", Checkpoint.open(folder))])


NORM = "model.norm.weight"
MISFITS: dict[str, tuple[Edit, str]] = {
    "missing": (
        lambda t: t.pop(NORM),
        r"'odd' does not fit 'base': expected tensor 'model\.norm\.weight', found none",
    ),
    "extra": (lambda t: t.update(x=torch.zeros(2)), "'odd' does not fit 'base': it holds tensor 'x'"),
    "shape": (
        lambda t: t.update({NORM: torch.ones(3)}),
        r"tensor 'model\.norm\.weight': expected shape \(32,\), found \(3,\)",
    ),
    "dtype": (
        lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}),
        r"tensor 'model\.norm\.weight': expected dtype torch\.float32, found torch\.int8",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit_are_named(misfit, llamas, edited):
    change, message = MISFITS[misfit]
    with pytest.raises(CheckpointError, match=message):
        check_compatible([("base", Checkpoint.open(llamas[0])), ("odd", edited(change))])


def test_other_architectures_and_depths_are_named(llamas, gpt2s, tmp_path, small_llama):
    base = ("base", Checkpoint.open(llamas[0]))
    with pytest.raises(
        CheckpointError, match="expected architecture LlamaForCausalLM, found GPT2LMHeadModel"
    ):
        check_compatible([base, ("gpt", Checkpoint.open(gpt2s[0]))])
    small_llama(layers=3).save_pretrained(tmp_path / "deep")
    with pytest.raises(CheckpointError, match="expected number of layers 2, found 3"):
        check_compatible([base, ("deep", Checkpoint.open(tmp_path / "deep"))])


def test_tokenizers_that_differ_are_named(llamas, tmp_path, tokenizer, words):
    base = ("base", llamas[0])
    tokenizer(tmp_path / "swapped", [*words[:10], words[11], words[10], *words[12:]])
    with pytest.raises(
        CheckpointError, match=r"'swapped'.* not that of 'base': token 'w6': expected id 10, found 11"
    ):
        check_tokenizers([base, ("swapped", tmp_path / "swapped")])
    tokenizer(tmp_path / "short", words[:-1])
    with pytest.raises(CheckpointError, match="token 'w59': expected id 63, found none"):
        check_tokenizers([base, ("short", tmp_path / "short")])
    tokenizer(tmp_path / "chat", words, eos="w0")
    with pytest.raises(CheckpointError, match=r"eos token: expected id 2 \('</s>'\), found 4 \('w0'\)"):
        check_tokenizers([base, ("chat", tmp_path / "chat")])
    with pytest.raises(CheckpointError, match="model 'none': no tokenizer can be loaded"):
        check_tokenizers([base, ("none", tmp_path)])
