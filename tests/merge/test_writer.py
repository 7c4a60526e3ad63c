from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shoal.errors import CheckpointError
from shoal.merge import (
    Checkpoint,
    Merger,
    merge_mergekit_config,
    tensor_groups,
    to_mergekit,
    weights_sha256,
    write_model,
)


@pytest.fixture
def merged(llamas, make_plan):
    parents = [Checkpoint.open(p) for p in llamas]
    groups = tensor_groups(parents[0])
    plan = make_plan(groups, "task_arithmetic", models=4, dtype="bfloat16")
    return plan, Merger(parents, groups)


@pytest.mark.parametrize("limit", [1 << 30, 20_000])
def test_what_is_written_is_what_was_merged(limit, merged, llamas, tmp_path):
    plan, merger = merged
    out = tmp_path / "deep" / "out"
    text = to_mergekit(plan, ["a", "b", "c", "d"])
    write_model(out, plan, merger, llamas[0], llamas[1], mergekit_yaml=text, max_shard_bytes=limit)
    written = Checkpoint.open(out)
    assert weights_sha256((n, written.tensor(n)) for n in written.names) == weights_sha256(
        merger.tensors(plan)
    )
    assert (len(written.files()) > 1) == (limit < 1 << 30)
    assert all(f.stat().st_size < limit + 4096 for f in written.files())
    assert written.config["dtype"] == "bfloat16"
    assert (out / "tokenizer.json").read_bytes() == (llamas[1] / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == (
        llamas[0] / "generation_config.json"
    ).read_bytes()
    assert (out / "mergekit_config.yml").read_text() == text
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_existing_folders_are_kept_unless_empty(merged, llamas, tmp_path):
    plan, merger = merged
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", plan, merger, llamas[0], llamas[0])
    with pytest.raises(CheckpointError, match="exists and is not empty; choose another folder, or remove it"):
        write_model(tmp_path / "out", plan, merger, llamas[0], llamas[0])


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_nothing_is_left_when_the_merge_breaks_off(error, merged, llamas, tmp_path):
    plan, merger = merged

    class Breaking(Merger):
        def fill(self, plan, into):
            for number, output in enumerate(super().fill(plan, into)):
                if number == 10:
                    raise error
                yield output

    breaking = Breaking(merger.parents, list(merger.groups.values()))
    with pytest.raises(type(error)):
        write_model(tmp_path / "out", plan, breaking, llamas[0], llamas[0], max_shard_bytes=4096)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_makes_too_little_is_no_model(merged, llamas, tmp_path):
    plan, merger = merged

    class Lazy(Merger):
        def fill(self, plan, into):
            yield from list(super().fill(plan, into))[:-2]

    lazy = Lazy(merger.parents, list(merger.groups.values()))
    with pytest.raises(CheckpointError, match=r"did not make tensor .* \(2 of 21 are missing\)"):
        write_model(tmp_path / "out", plan, lazy, llamas[0], llamas[0])
    assert list(tmp_path.iterdir()) == []


def template_of(folder: Path) -> str | None:
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(folder).chat_template
    assert template is None or isinstance(template, str)
    return template


def test_chat_templates(merged, llamas, tmp_path, tokenizer, words):
    plan, merger = merged
    literal = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for name, template in (("a", "{{ 'one' }}"), ("b", "{{ 'two' }}"), ("c", "{{ 'two' }}")):
        tokenizer(tmp_path / name, words, template=template)
    three = [tmp_path / n for n in "abc"]

    def written(wanted: str | None, source: Path) -> str | None:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        write_model(out, plan, merger, llamas[0], source, wanted, parent_paths=three)
        return template_of(out)

    assert written(None, llamas[0]) is None
    assert written(None, three[0]) == "{{ 'one' }}"
    assert written(literal, three[0]) == literal
    assert written("auto", three[0]) == "{{ 'two' }}"
    assert "<|im_start|>" in str(written("chatml", llamas[0]))
    with pytest.raises(
        CheckpointError, match="'chatmll' is neither a Jinja text nor a name; did you mean 'chatml'"
    ):
        written("chatmll", llamas[0])


def test_a_template_in_tokenizer_config_gives_way_to_the_wanted_one(
    merged, llamas, tmp_path, tokenizer, words
):
    plan, merger = merged
    tokenizer(tmp_path / "old", words)
    settings = tmp_path / "old" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "{{ 'old' }}"}))
    write_model(tmp_path / "out", plan, merger, llamas[0], tmp_path / "old", "{{ 'new' }}")
    assert template_of(tmp_path / "out") == "{{ 'new' }}"
    write_model(tmp_path / "kept", plan, merger, llamas[0], tmp_path / "old", "auto")
    assert template_of(tmp_path / "kept") == "{{ 'old' }}"


def test_the_written_yaml_gives_the_written_weights_again(merged, llamas, tmp_path):
    plan, merger = merged
    text = to_mergekit(plan, [str(p) for p in llamas])
    write_model(tmp_path / "out", plan, merger, llamas[0], llamas[0], mergekit_yaml=text)
    merge_mergekit_config(tmp_path / "out" / "mergekit_config.yml", tmp_path / "again")
    ours, theirs = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "again")
    assert ours.names == theirs.names
    for name in ours.names:
        torch.testing.assert_close(ours.tensor(name), theirs.tensor(name), rtol=2**-8, atol=1e-7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "out"]
    assert not (tmp_path / "again" / ".lora").exists()
