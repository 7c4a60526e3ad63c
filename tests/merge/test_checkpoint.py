from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.errors import CheckpointError
from shoal.merge import Checkpoint, weights_sha256
from shoal.merge.checkpoint import INDEX, SINGLE


@pytest.fixture
def folder(tmp_path: Path, llamas: list[Path]) -> Path:
    return Path(shutil.copytree(llamas[0], tmp_path / "model"))


def shard(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    (folder / SINGLE).unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in part}, folder / f"part-{number}.safetensors")
        weight_map.update(dict.fromkeys(part, f"part-{number}.safetensors"))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_tensors_are_what_safetensors_reads_in_one_file_or_in_shards(folder):
    expected = load_file(folder / SINGLE)
    one = Checkpoint.open(folder)
    assert one.names == tuple(sorted(expected))
    hashes = [weights_sha256((n, one.tensor(n)) for n in one.names)]
    shard(folder)
    checkpoint = Checkpoint.open(folder)
    assert [f.name for f in checkpoint.files()] == ["part-0.safetensors", "part-1.safetensors"]
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)
    hashes.append(weights_sha256((n, checkpoint.tensor(n)) for n in reversed(checkpoint.names)))
    assert hashes[0] == hashes[1]


def test_the_hash_sees_names_dtypes_shapes_and_bits():
    x = torch.arange(6.0)
    seen = {
        weights_sha256(t)
        for t in (
            [("a", x)],
            [("b", x)],
            [("a", x.view(2, 3))],
            [("a", x.to(torch.bfloat16))],
            [("a", torch.tensor([-0.0, 1, 2, 3, 4, 5]))],
            [("a", x), ("b", x)],
        )
    }
    assert len(seen) == 6


def test_a_copy_of_a_tied_head_is_no_weight_of_its_own(tmp_path, tied_llamas):
    folder = Path(shutil.copytree(tied_llamas[0], tmp_path / "model"))
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / SINGLE)
    assert "lm_head.weight" not in Checkpoint.open(folder).names
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / SINGLE)
    assert "lm_head.weight" in Checkpoint.open(folder).names


def test_missing_folder_and_config(tmp_path, folder):
    with pytest.raises(CheckpointError, match="no such model folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(folder)


def test_pickles_are_not_read(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds only pytorch_model\.bin; only safetensors are read"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_files(folder, damage):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes({"cut": data[:-100], "noise": b"\xff" * 64, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        Checkpoint.open(folder)


def test_index_and_shards_that_disagree(folder, tmp_path):
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = "part-0.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names tensor 'ghost\.weight' in part-0\.safetensors"):
        Checkpoint.open(folder)
    (folder / "part-0.safetensors").rename(tmp_path / "part-0.safetensors")
    with pytest.raises(CheckpointError, match=r"part-0\.safetensors: shard missing"):
        Checkpoint.open(folder)
    index["weight_map"] = {"x": "../../etc/passwd"}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        Checkpoint.open(folder)
