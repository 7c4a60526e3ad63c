"""Files that are filled in place, and what is left when a merge to disk goes wrong: nothing that looks finished."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import CheckpointError
from shoal.merge import disk, write_model
from shoal.merge.resident import Output
from shoal.merge.writer import new_folder, write_shards
from shoal.types import MergePlan

TENSORS = {
    "a.odd": torch.arange(7, dtype=torch.bfloat16),
    "b.wide": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "c.scalar": torch.tensor(3, dtype=torch.int64),
    "d.empty": torch.empty(0, 4),
    "e.half": torch.arange(5, dtype=torch.float16),
    "f.mask": torch.tensor([True, False, True]),
    "g.bytes": torch.arange(3, dtype=torch.uint8),
    "h.double": torch.arange(3, dtype=torch.float64),
    "name with ü": torch.ones(3),
}


def outputs(tensors):
    return [Output(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]


def copying(tensors):
    """A merge that makes given tensors."""

    def fill(into):
        for output in outputs(tensors):
            into(output).put(0, tensors[output.name].reshape(-1))
            yield output

    return fill


@pytest.mark.parametrize("positioned", [True, False], ids=["pwrite", "a system without pwrite"])
@pytest.mark.parametrize("limit", [1 << 30, 40])
def test_the_files_are_what_safetensors_reads(limit, positioned, tmp_path, monkeypatch):
    if not positioned:
        monkeypatch.delattr(disk.os, "pwrite")
    index = write_shards(tmp_path, outputs(TENSORS), copying(TENSORS), limit)
    found = {}
    for file in sorted(tmp_path.iterdir()):
        assert file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") <= limit
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        found.update({n: (t, file.name) for n, t in load_file(file).items()})
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name][0].dtype == tensor.dtype
        assert torch.equal(found[name][0], tensor)
    if limit == 40:
        assert index is not None
        assert index["weight_map"] == {n: file for n, (_, file) in found.items()}
        assert index["metadata"] == {"total_size": sum(t.nbytes for t in TENSORS.values())}
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
        ]
    else:
        assert index is None
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_one_dtype_gives_the_very_file_that_safetensors_writes(tmp_path):
    tensors = {n: t.float() for n, t in TENSORS.items() if n != "name with ü"}
    write_shards(tmp_path, outputs(tensors), copying(tensors))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_names_twice_and_dtypes_that_cannot_be_stored_are_refused(tmp_path):
    twice = [*outputs(TENSORS), outputs(TENSORS)[0]]
    with pytest.raises(CheckpointError, match=r"'a\.odd' would be written twice"):
        write_shards(tmp_path, twice, copying(TENSORS))
    odd = [Output("x", (1,), torch.complex64)]
    with pytest.raises(
        CheckpointError, match=r"'x' has dtype torch\.complex64, which safetensors cannot hold"
    ):
        write_shards(tmp_path, odd, copying({}))


def test_progress_counts_tensors_and_bytes(tmp_path):
    seen = []
    write_shards(tmp_path, outputs(TENSORS), copying(TENSORS), progress=lambda *done: seen.append(done))
    total = sum(t.nbytes for t in TENSORS.values())
    assert [s[0] for s in seen] == list(range(1, len(TENSORS) + 1))
    assert seen[-1] == (len(TENSORS), len(TENSORS), total, total)


# --- a process of its own ----------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
import torch
from shoal.errors import ShoalError
from shoal.merge import write_model
from shoal.merge.resident import Output
from shoal.types import MergePlan
from shoal.merge import disk

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith("RssAnon")).split()[1])

class Merge:
    made = [Output(f"t{i}", (1 << 20,), torch.float32) for i in range(24)]
    def outputs(self, plan):
        return tuple(self.made)
    def fill(self, plan, into):
        value = torch.ones(1 << 10)
        for number, output in enumerate(self.made):
            target = into(output)
            for start in range(0, 1 << 20, len(value)):
                target.put(start, value)
            if number == 12:
                half()
            yield output

def half():
    pass

out, source = Path(sys.argv[1]), Path(sys.argv[2])
plan = MergePlan(("m",), None, ())
def write():
    try:
        write_model(out, plan, Merge(), source, source, max_shard_bytes=16 << 20)
    except ShoalError as error:
        print(error)
        sys.exit(error.exit_code)
"""


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def run(code: str, *arguments: object, **settings) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="RssAnon is Linux")
def test_no_memory_of_its_own_is_needed(source, tmp_path):
    code = "before = anonymous()\npeak = []\nhalf = lambda: peak.append(anonymous())\nwrite()\nprint(peak[0] - before)\n"
    process = run(code, tmp_path / "out", source)
    grown, errors = process.communicate()
    assert process.returncode == 0, errors
    assert int(grown) < 8 << 20  # of 96 MiB
    assert len(list((tmp_path / "out").glob("model-*-of-00006.safetensors"))) == 6


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_merge_leaves_nothing_that_looks_finished_and_the_next_one_clears_it(source, tmp_path):
    out = tmp_path / "out"
    code = "def half():\n    print('half', flush=True)\n    sys.stdin.read()\nwrite()\n"
    process = run(code, out, source)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    (left,) = (p for p in tmp_path.iterdir() if p != source)
    assert left.name.startswith(f".out.shoal-merging-{process.pid}-")
    # as long as it lives, its folder is its own
    with pytest.raises(ZeroDivisionError), new_folder(out):
        raise ZeroDivisionError
    assert left.is_dir()
    process.kill()
    process.communicate()
    assert not out.exists()
    assert left.is_dir()
    assert not (left / "config.json").exists()
    with new_folder(out) as folder:
        (folder / "file").write_text("")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_a_link_gets_the_folder_where_it_points(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, target in (("link", "empty"), ("dangling", "new")):
        (tmp_path / name).symlink_to(target)
        with new_folder(tmp_path / name) as folder:
            (folder / "file").write_text("")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target / "file").is_file()
    with (
        pytest.raises(CheckpointError, match="empty: exists and is not empty"),
        new_folder(tmp_path / "link"),
    ):
        pass


def test_only_folders_of_dead_merges_to_the_same_place_are_removed(tmp_path):
    kept = [
        ".out.shoal-merging-x-1",
        f".out.shoal-merging-{os.getpid()}-1",
        ".outer.shoal-merging-999999999-1",
    ]
    for name in (*kept, ".out.shoal-merging-999999999-1"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.shoal-merging-999999999-2").symlink_to(tmp_path / kept[0])
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*kept, "out", ".out.shoal-merging-999999999-2"]
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mount namespaces")
def test_a_disk_that_is_too_small_is_known_before_the_merge_begins(source, tmp_path):
    disk_, script = tmp_path / "disk", tmp_path / "script.py"
    disk_.mkdir()
    script.write_text(WRITER + "def half():\n    print('merged')\nwrite()\n")
    own = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    mount = f"mount -t tmpfs -o size=40m none {disk_}"
    if subprocess.run([*own, "sh", "-c", mount], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    code = f"{mount} && {sys.executable} {script} {disk_}/out {source}; echo $?; ls -A {disk_}"
    done = subprocess.run([*own, "sh", "-c", code], check=False, capture_output=True, text=True)
    line, status = done.stdout.splitlines()  # and no files
    assert status == "2"
    assert line.startswith(f"{disk_}: the disk is full, ")
    assert line.endswith("free some space or choose another disk (nothing was written)")


@pytest.mark.skipif(os.name == "nt", reason="RLIMIT_FSIZE")
def test_a_limit_on_the_size_of_files_is_one_line(source, tmp_path):
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    process = run("write()\n", tmp_path / "out", source, preexec_fn=limit)
    line, errors = process.communicate()
    assert (process.returncode, errors) == (2, "")
    assert "a file would be larger than this system allows; merge into smaller shards" in line
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_errors_of_the_disk_are_one_line_and_leave_nothing(code, source, tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(disk, "_reserve", fail)
    plan = MergePlan(("m",), None, ())

    class Merge:
        def outputs(self, plan):
            return tuple(outputs(TENSORS))

        def fill(self, plan, into):
            return copying(TENSORS)(into)

    expected = "cannot be written" if code == errno.EIO else "the disk is full"
    with pytest.raises(CheckpointError, match=expected):
        write_model(tmp_path / "out", plan, Merge(), source, source)
    monkeypatch.undo()
    # reported late, by the flush
    monkeypatch.setattr(disk.os, "fsync", fail)
    with pytest.raises(CheckpointError, match=expected):
        write_model(tmp_path / "out", plan, Merge(), source, source)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_where_space_cannot_be_reserved_the_file_is_only_made_long(tmp_path, monkeypatch):
    monkeypatch.delattr(disk.os, "posix_fallocate", raising=False)
    write_shards(tmp_path, outputs(TENSORS), copying(TENSORS))
    assert load_file(tmp_path / "model.safetensors").keys() == TENSORS.keys()


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def config(llamas, tmp_path):
    models = [{"model": str(p), "parameters": {"weight": 0.5}} for p in llamas[:2]]
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "float32"}))
    return file


def test_the_command_says_what_it_did_in_one_line(config, tmp_path):
    loud = CliRunner().invoke(app, ["merge", str(config), "-o", str(tmp_path / "a")])
    assert loud.exit_code == 0, loud.output
    assert loud.stdout.splitlines()[-1].startswith(f"{tmp_path / 'a'}: 21 tensors, 0.00 GB in ")
    assert any(line.startswith("merged ") for line in loud.stdout.splitlines())
    quiet = CliRunner().invoke(
        app, ["merge", str(config), "-o", str(tmp_path / "b"), "-q", "--shard-size", "0.001"]
    )
    assert quiet.exit_code == 0
    assert len(quiet.stdout.splitlines()) == 1


def test_the_command_refuses_in_one_line(config, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    bad = tmp_path / "bad.yml"
    bad.write_text("merge_method: [")
    for source, out, expected in (
        (config, "full", "exists and is not empty"),
        (bad, "out", "no valid YAML"),
        (tmp_path / "none.yml", "out", "found nothing"),
    ):
        result = CliRunner().invoke(app, ["merge", str(source), "-o", str(tmp_path / out)])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert expected in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert (tmp_path / "full" / "file").is_file()
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="SIGINT")
def test_ctrl_c_is_one_line_and_leaves_nothing(config, tmp_path, monkeypatch):
    from shoal.merge.resident import Merger

    fill = Merger.fill

    def interrupted(self, plan, into):
        for number, output in enumerate(fill(self, plan, into)):
            if number == 5:
                signal.raise_signal(signal.SIGINT)
            yield output

    monkeypatch.setattr(Merger, "fill", interrupted)
    # a shell that starts the tests in the background has them ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    result = CliRunner().invoke(app, ["merge", str(config), "-o", str(tmp_path / "out"), "-q"])
    signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.stderr == f"error: interrupted; {tmp_path / 'out'} was not written\n"
    assert [p.name for p in tmp_path.iterdir()] == ["merge.yml"]


def test_a_run_is_written_the_same_way(llamas, tmp_path, make_plan):
    from shoal.merge import Checkpoint, Merger, tensor_groups

    parents = [Checkpoint.open(p) for p in llamas[:2]]
    groups = tensor_groups(parents[0])
    plan = make_plan(groups, "task_arithmetic", models=2, dtype="bfloat16")
    write_model(tmp_path / "out", plan, Merger(parents, groups), llamas[0], llamas[0])
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in Merger(parents, groups).tensors(plan):
        assert torch.equal(written[name], tensor)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
