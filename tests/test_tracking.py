"""Trackers get what the journal has, once, whatever happens in between; through their own packages, read back by them."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import Killed, Mute, recipe, stable
from typer.testing import CliRunner
from wandb_server import WandbServer, serving

import shoal
from shoal.cli import app
from shoal.errors import RunError
from shoal.folder import RunFolder
from shoal.hub.portable import recipe_here
from shoal.hub.privacy import Scrubber, Secrets
from shoal.journal import EvaluationRow, Journal
from shoal.preflight import Prepared, restore
from shoal.recipe import parse_recipe
from shoal.run import evolve
from shoal.stages.observer import Silent
from shoal.tracking import TrackerError, Tracking, chosen
from shoal.tracking.marks import Marks
from shoal.tracking.points import points_of, weights_summary
from shoal.types import Job, Worker
from shoal.worker import LocalWorker

MINIMAL = "name: x\nmodels: [a/b, c/d]\ntasks: [{task: t}]\n"


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    @property
    def failures(self) -> list[str]:
        return [line for line in self.lines if " fails and gets nothing more " in line]


def tracked(
    mine: Any,
    run: Path,
    *names: str,
    meddle: Callable[[Job, int], Any] = lambda job, done: None,
    heard: Heard | None = None,
    **options: Any,
) -> tuple[dict[str, Any], Heard]:
    listener = heard or Heard()

    def worker(prepared: Prepared, device: str) -> Worker:
        return Mute(LocalWorker(prepared.recipe, prepared.lock, device), meddle)

    with Tracking(run, chosen(names, ()), listener) as seen:
        result = evolve(mine, run, device="cpu", observer=seen, worker=worker, **options)
    return result, listener


@pytest.fixture(scope="module")
def whole(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the run that nobody tracks and nothing disturbs."""
    return stable(tracked(recipe(pico), tmp_path_factory.mktemp("whole") / "run")[0])


def kill_at(count: int) -> Callable[[Job, int], None]:
    def kill(job: Job, done: int) -> None:
        if done == count:
            raise Killed

    return kill


def journalled(run: Path) -> dict[int, dict[str, float]]:
    """Step -> what is sent of the generation that ended there, by SQL."""
    found = {}
    with sqlite3.connect(run / "journal.sqlite") as db:
        for generation, told in db.execute("SELECT generation, fitness FROM tells ORDER BY generation"):
            of_it = (
                "FROM evaluations e JOIN candidates c ON c.id = e.candidate"
                " WHERE e.role = 'search' AND c.kind = 'search' AND c.generation = ?"
            )
            (last,) = db.execute(f"SELECT MAX(e.id) {of_it}", (generation,)).fetchone()
            (seconds,) = db.execute(
                f"SELECT SUM(seconds_merge + seconds_score + seconds_rest) {of_it}", (generation,)
            ).fetchone()
            (step,) = db.execute("SELECT SUM(items) FROM evaluations WHERE id <= ?", (last,)).fetchone()
            values = [value for value in json.loads(told) if value is not None]
            found[step] = {
                "fitness/best": max(values),
                "fitness/mean": statistics.fmean(values),
                "fitness/spread": statistics.pstdev(values),
                "search/generation": generation,
                "search/item_evaluations": step,
                "search/candidates": len(json.loads(told)),
                "search/failed": len(json.loads(told)) - len(values),
                "search/seconds": seconds,
                "search/items_per_task": 16,
            }
    return found


def spent(run: Path) -> int:
    with sqlite3.connect(run / "journal.sqlite") as db:
        return int(db.execute("SELECT SUM(items) FROM evaluations").fetchone()[0])


def agrees(sent: dict[int, dict[str, float]], run: Path) -> None:
    """The generations as sent are those of the journal, and the last one has the weights of the search's mean."""
    expected = journalled(run)
    assert list(sent) == list(expected)
    for step, values in expected.items():
        shown = {name: sent[step][name] for name in values}
        assert shown == pytest.approx(values, rel=1e-6, abs=1e-9)
        assert {name.split("/")[1] for name in sent[step] if name.startswith("weights/")} == {"left", "right"}
    found, lock = RunFolder(run).open()
    mean = Journal(run / "journal.sqlite")
    row = mean.candidate(f"mean@{len(expected)}")
    mean.close()
    assert row is not None and row.genome is not None
    weights = weights_summary(restore(found, lock).decode(row.genome))
    last = sent[list(expected)[-1]]
    assert {n: v for n, v in last.items() if n.startswith("weights/")} == pytest.approx(weights, rel=1e-6)
    assert f"weights/{'left'}/attn/weight" in weights and "weights/right/mlp/weight/lowest" in weights


# --- recipe and choice


def test_a_recipe_names_one_tracker_or_several_and_is_the_same_run() -> None:
    plain = parse_recipe(MINIMAL)
    one, two = parse_recipe(MINIMAL + "track: wandb"), parse_recipe(MINIMAL + "track: [tensorboard, trackio]")
    assert (plain.track, one.track, two.track) == ((), ("wandb",), ("tensorboard", "trackio"))
    assert plain.digest() == one.digest() == two.digest()
    assert parse_recipe(two.to_yaml()) == two
    with pytest.raises(shoal.errors.RecipeError, match=r"track\.0: .*'tensorboard', .*found 'tensorbord'"):
        parse_recipe(MINIMAL + "track: tensorbord")


def test_the_digest_is_what_it_was_before_there_were_trackers() -> None:
    """So that earlier runs go on, and earlier publications are what their locks name."""
    content = parse_recipe(MINIMAL).model_dump(mode="json")
    assert content.pop("track") == []
    for key in ("budget", "max_seconds"):
        content["search"].pop(key)
    import hashlib

    expected = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert parse_recipe(MINIMAL + "track: wandb").digest() == expected


def test_what_is_asked_for_stands_above_the_recipe() -> None:
    pytest.importorskip("tensorboard")
    assert chosen(None, ("tensorboard", "tensorboard")) == ("tensorboard",)
    assert chosen("none", ("wandb",)) == chosen((), ("wandb",)) == chosen(["none"], ("wandb",)) == ()
    assert chosen(["tensorboard", "tensorboard"], ("wandb",)) == ("tensorboard",)
    with pytest.raises(TrackerError, match="no tracker 'wandbb'; did you mean 'wandb'"):
        chosen("wandbb", ())
    with pytest.raises(TrackerError, match="none stands alone"):
        chosen(["none", "wandb"], ())


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_one_line_before_anything_is_done(
    name: str, pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # what Python itself takes for a package that is not there
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(pico.recipe(track=name)))
    run = tmp_path / "run"
    for arguments in ([], ["--track", name]):
        done = CliRunner().invoke(
            app, ["evolve", str(path), "--run", str(run), "--device", "cpu", *arguments]
        )
        assert done.exit_code == 2, done.output
        assert done.stderr.count("\n") == 1 and f"pip install 'shoal[{name}]'" in done.stderr
        assert not run.exists()
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)


def test_trackers_of_the_command_and_of_nothing(pico: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(pico.recipe()))
    done = CliRunner().invoke(app, ["evolve", str(path), "--run", str(tmp_path / "run"), "--track", "mlflow"])
    assert done.exit_code == 2 and "no tracker 'mlflow'" in done.stderr and not (tmp_path / "run").exists()


def test_who_goes_on_from_a_publication_is_not_tracked_by_it(pico: Any, tmp_path: Path) -> None:
    mine = recipe(pico, track="wandb")
    tracked(mine, tmp_path / "run")
    _, lock = RunFolder(tmp_path / "run").open()
    published, _ = recipe_here(mine, lock, Scrubber(Secrets((), (), ())))
    assert published.track == ()


# --- points


def test_steps_differ_even_where_a_generation_scored_nothing() -> None:
    def row(candidate: str, role: Any, items: int, rung: int = 0) -> EvaluationRow:
        status = "done" if items else "failed"
        return EvaluationRow(candidate, role, status, None, 0.5, 0.25, 0.25, items, rung)

    evaluations = [
        row("base", "search", 100),
        row("a", "search", 8),
        row("b", "search", 8),
        row("a", "search", 8, rung=1),
        row("c", "search", 0),
        row("d", "search", 0),
        row("mean@2", "select", 50),
        row("e", "search", 16),
    ]
    tells = {0: {"a": 0.5, "b": -0.5}, 1: {"c": None, "d": None}, 2: {"e": 0.25}}
    courses = [{"generation": 0, "items": 8}, {"generation": 2, "items": 16}]
    first, failed, last = points_of(evaluations, tells, courses)
    assert (first.step, failed.step, last.step) == (124, 125, 190)
    assert first.values["fitness/spread"] == 0.5 and first.values["search/seconds"] == 3.0
    assert failed.values["search/failed"] == 2 and "fitness/best" not in failed.values
    assert "search/items_per_task" not in failed.values and last.values["search/items_per_task"] == 16
    assert last.values["fitness/spread"] == 0


# --- TensorBoard


def events_of(run: Path) -> tuple[dict[int, dict[str, float]], dict[str, list[tuple[int, str]]]]:
    """As TensorBoard shows them: step -> scalars, tag -> (step, text)."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(
        str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    ).Reload()
    scalars: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in scalars.setdefault(event.step, {}), f"{tag} twice at {event.step}"
            scalars[event.step][tag] = event.value
    texts = {
        tag.removesuffix("/text_summary"): [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
    }
    return dict(sorted(scalars.items())), texts


def written(run: Path) -> list[tuple[int, str]]:
    """Everything that lies in the event files, purged or not."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    return [
        (event.step, value.tag)
        for path in sorted((run / "tensorboard").iterdir())
        for event in loader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


def ends_as(result: dict[str, Any], numbers: dict[str, float]) -> None:
    assert numbers["result/score"] == pytest.approx(result["winner"]["score"])
    assert numbers["result/shrinkage"] == pytest.approx(result["winner"]["shrinkage"], rel=1e-5)
    assert numbers["result/item_evaluations"] == result["cost"]["item_evaluations"]


def test_tensorboard_has_what_the_journal_has(pico: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    result = shoal.evolve(recipe(pico), run, device="cpu", track="tensorboard")
    scalars, texts = events_of(run)
    end = scalars.pop(spent(run))
    agrees(scalars, run)
    ends_as(result, end)
    verdict, table = texts["result/verdict"][0][1], texts["result/table"][0][1]
    assert f"verdict: {result['verdict']}: {result['claim']}" in verdict and "search score" in verdict
    assert "| uniform merge |" in table and "| winner (" in table and " to +" in table
    assert [step for step, _ in texts["recipe"]] == [0, spent(run)]
    assert "    - ./left\n" in texts["recipe"][0][1] and str(pico.folder) not in str(texts)


def test_tensorboard_is_not_sent_twice_what_was_sent(
    pico: Any, whole: dict[str, Any], tmp_path: Path
) -> None:
    """Killed in the second and in the third generation, and once between a generation and its mark."""
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    with pytest.raises(Killed):
        tracked(recipe(pico), run, "tensorboard", meddle=kill_at(4 + 4 + 2))
    with pytest.raises(Killed):
        tracked(recipe(pico), run, "tensorboard", meddle=kill_at(2 + 4 + 1))
    result, heard = tracked(recipe(pico), run, "tensorboard")
    assert stable(result) == whole and not heard.failures
    scalars, texts = events_of(run)
    scalars.pop(spent(run))
    agrees(scalars, run)
    assert len(written(run)) == len(set(written(run)))
    assert len(list((run / "tensorboard").iterdir())) == 3 and len(texts["recipe"]) == 2
    # a finished run has nothing more to say
    tracked(recipe(pico), run, "tensorboard")
    assert len(list((run / "tensorboard").iterdir())) == 3


def test_tensorboard_forgets_a_point_whose_mark_was_lost(
    pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    run, real = tmp_path / "run", Marks.sent

    def dying(self: Marks, tracker: str, step: int) -> None:
        if len(journalled(run)) == 2:
            raise Killed
        real(self, tracker, step)

    with monkeypatch.context() as patch:
        patch.setattr(Marks, "sent", dying)
        with pytest.raises(Killed):
            tracked(recipe(pico), run, "tensorboard")
    tracked(recipe(pico), run, "tensorboard")
    scalars, _ = events_of(run)
    scalars.pop(spent(run))
    agrees(scalars, run)
    lost = list(journalled(run))[1]
    assert written(run).count((lost, "fitness/best")) == 2


def test_a_larger_budget_goes_on_in_the_same_place(pico: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    tracked(recipe(pico), run, "tensorboard")
    ended = spent(run)
    larger = recipe(pico, search={**pico.recipe()["search"], "budget": 16})
    result, _ = tracked(larger, run, "tensorboard", reopen_test=True)
    scalars, texts = events_of(run)
    ends_as(result, scalars.pop(spent(run)))
    assert "result/score" in scalars.pop(ended) and list(scalars) == list(journalled(run))
    assert len(scalars) == 4 and "budget: 16" in texts["recipe"][-1][1]


def test_trackers_change_while_a_run_goes_on(pico: Any, tmp_path: Path) -> None:
    """Untracked at first, then by the recipe: earlier generations are sent as well; the run is the same one."""
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    with pytest.raises(Killed):
        tracked(recipe(pico), run, meddle=kill_at(4 + 4 + 2))
    assert not (run / "tensorboard").exists()
    shoal.evolve(recipe(pico, track="tensorboard"), run, device="cpu")
    scalars, _ = events_of(run)
    scalars.pop(spent(run))
    agrees(scalars, run)
    assert not journal_events(run, "budget")
    with pytest.raises(RunError, match="belongs to a different recipe") as caught:
        shoal.evolve(recipe(pico, track=[], claim={"resamples": 2000}), run, device="cpu")
    assert "resamples: 2000" in str(caught.value) and "track:" not in str(caught.value)


def journal_events(run: Path, kind: str) -> list[Any]:
    journal = Journal(run / "journal.sqlite")
    found = journal.events(kind)
    journal.close()
    return found


def test_a_finished_run_can_be_sent_afterwards(pico: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    tracked(recipe(pico), run)
    result = shoal.evolve(recipe(pico), run, device="cpu", track=["tensorboard"])
    scalars, _ = events_of(run)
    ends_as(result, scalars.pop(spent(run)))
    expected = journalled(run)
    assert list(scalars) == list(expected)
    for step, values in expected.items():  # where the search was then, only a process that replays it knows
        assert scalars[step] == pytest.approx(values, rel=1e-6, abs=1e-9)


def test_a_tracker_that_cannot_be_opened_is_said_once_and_made_up_for(
    pico: Any, whole: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"

    class Blocking(Heard):
        def begin(self, prepared: Any, done: int) -> None:
            (run / "tensorboard").write_text("in the way")

    result, heard = tracked(recipe(pico), run, "tensorboard", heard=Blocking())
    assert stable(result) == whole
    assert len(heard.failures) == 1 and heard.failures[0].startswith("note: tensorboard fails")
    (run / "tensorboard").unlink()
    tracked(recipe(pico), run, "tensorboard")
    assert list(events_of(run)[0]) == [*journalled(run), spent(run)]


def test_a_failing_tracker_is_no_progress_that_quiet_hides(pico: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    path, run = tmp_path / "mine.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(pico.recipe()))
    command = ["evolve", str(path), "--run", str(run), "--device", "cpu", "--quiet"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and done.stderr == ""
    (run / "tensorboard").write_text("in the way")
    done = CliRunner().invoke(app, [*command, "--track", "tensorboard"])
    assert done.exit_code == 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("note: tensorboard fails and gets nothing more for now")
    assert "tensorboard fails" not in done.stdout


def test_a_tracker_that_breaks_on_the_way_is_said_once_and_goes_on_later(
    pico: Any, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    real, run = SummaryWriter.add_scalar, tmp_path / "run"

    def full(self: Any, tag: str, value: float, step: int) -> None:
        if len(journalled(run)) == 2 and tag == "fitness/mean":
            raise OSError(28, "No space left on device")
        real(self, tag, value, step)

    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "add_scalar", full)
        result, heard = tracked(recipe(pico), run, "tensorboard")
    assert len(heard.failures) == 1 and "No space left on device" in heard.failures[0]
    assert stable(result) == whole
    assert "fitness/mean" not in events_of(run)[0][list(journalled(run))[1]]
    tracked(recipe(pico), run, "tensorboard")
    scalars, _ = events_of(run)
    assert list(scalars) == [*journalled(run), spent(run)]
    for step, values in journalled(run).items():
        assert {name: scalars[step][name] for name in values} == pytest.approx(values, rel=1e-6, abs=1e-9)


# --- Weights & Biases


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, with no settings of this machine and nobody logged in."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb" / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    package = pytest.importorskip("wandb")
    package.teardown()
    yield package
    package.teardown()


@pytest.fixture
def offline(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def server(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serving() as stored:
        monkeypatch.setenv("WANDB_BASE_URL", stored.url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        yield stored
        wandb.teardown()


def records(path: Path) -> Iterator[Any]:
    """The records of an offline run's file: protobuf in a log of blocks of 32 KiB, as LevelDB's."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(part)
            part = b""


def offline_runs(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"))


def history(run: Path) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Step -> values, and the summary, over all offline files of a run."""
    lines: dict[int, dict[str, Any]] = {}
    summary: dict[str, Any] = {}
    for path in offline_runs(run):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                values = {
                    "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
                }
                assert record.history.step.num not in lines, "a step twice"
                lines[record.history.step.num] = values
            elif kind == "summary":
                summary |= {
                    "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update
                }
    return lines, summary


def test_wandb_offline_has_what_the_journal_has_once(offline: None, pico: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        tracked(recipe(pico), run, "wandb", meddle=kill_at(4 + 4 + 2))
    result, heard = tracked(recipe(pico), run, "wandb")
    assert not heard.failures
    first, second = offline_runs(run)
    assert (
        first.name
        == second.name
        == f"run-{json.loads((run / 'tracking.json').read_text())['wandb']['id']}.wandb"
    )
    lines, summary = history(run)
    end = lines.pop(spent(run))
    agrees(lines, run)
    ends_as(result, end)
    assert summary["verdict"] == result["verdict"]
    table = summary["scores"]["uniform merge"]
    against = next(c for c in result["comparisons"] if c["against"] == "uniform merge" and "task" not in c)
    assert (table["lead"], table["low"], table["high"]) == pytest.approx(
        (against["difference"], against["low"], against["high"])
    )
    page = (second.parent / "files" / end["result/table/path"]).read_text()
    assert "<td>uniform merge</td>" in page
    tracked(recipe(pico), run, "wandb")
    assert len(offline_runs(run)) == 2


def test_wandb_is_sent_nothing_private(offline: None, pico: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tracked(recipe(pico), run, "wandb")
    (path,) = offline_runs(run)
    found = list(records(path))
    assert [r.run.host for r in found if r.WhichOneof("record_type") == "run"] == ["-"]
    assert not [r for r in found if r.WhichOneof("record_type") in ("environment", "output", "output_raw")]
    files = [p for p in (path.parent / "files").rglob("*") if p.is_file()]
    assert [p.suffix for p in files] == [".html"]
    nothing_private(
        [b"".join(r.SerializeToString() for r in found), *(p.read_bytes() for p in files)], pico, tmp_path
    )


def nothing_private(sent: list[bytes], pico: Any, tmp_path: Path) -> None:
    words = [json.loads(line)["word"] for line in (pico.tasks / "test.jsonl").read_text().splitlines()]
    private = [
        str(tmp_path),
        str(pico.folder),
        str(Path.home()),
        sys.executable,
        *(f"{word}:" for word in words),
    ]
    everything = b"\n".join(sent)
    assert b"pico_choice" in everything
    for text in private:
        assert text.encode() not in everything, text


def test_wandb_goes_on_where_its_server_says_that_it_is(
    server: WandbServer, wandb: Any, pico: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        tracked(recipe(pico), run, "wandb", meddle=kill_at(4 + 4 + 4 + 2))
    (stored,) = server.runs.values()
    assert len(stored.steps) == 2 and stored.name == "pico"
    # the second one was taken by the client, and never arrived
    stored.history.pop()
    stored.summary = dict(stored.history[-1])
    result, heard = tracked(recipe(pico), run, "wandb")
    assert not heard.failures and list(server.runs) == [
        json.loads((run / "tracking.json").read_text())["wandb"]["id"]
    ]
    sent = {line["_step"]: line for line in stored.history}
    assert len(sent) == len(stored.history)
    ends_as(result, sent.pop(spent(run)))
    agrees(sent, run)
    assert stored.summary["verdict"] == result["verdict"]
    assert stored.config["recipe"]["value"]["models"] == ["./left", "./right"]
    nothing_private(server.bodies, pico, tmp_path)
    upserts = [json.loads(body) for body in server.bodies if b"mutation UpsertBucket" in body]
    assert {sent["variables"]["host"] for sent in upserts} <= {None, "-"} and upserts
    assert any(server.url in line for line in heard.lines)


def test_wandb_without_a_network_is_said_once_and_made_up_for(
    server: WandbServer,
    wandb: Any,
    pico: Any,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not there at the beginning; then it goes away on the way."""
    run = tmp_path / "run"
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "3")
    server.down = True
    with pytest.raises(Killed):
        tracked(recipe(pico), run, "wandb", meddle=kill_at(4 + 2))
    server.down = False
    wandb.teardown()

    def cut(job: Job, done: int) -> None:
        server.down = done >= 4

    result, heard = tracked(recipe(pico), run, "wandb", meddle=cut)
    assert len(heard.failures) == 1 and heard.failures[0].startswith("note: wandb fails")
    assert stable(result) == whole
    wandb.teardown()
    server.down = False
    _, again = tracked(recipe(pico), run, "wandb")
    assert not again.failures
    (stored,) = server.runs.values()
    assert stored.steps == [*journalled(run), spent(run)]


def test_wandb_without_a_login_is_one_line_before_anything_is_done(
    wandb: Any, pico: Any, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(pico.recipe()))
    done = CliRunner().invoke(app, ["evolve", str(path), "--run", str(tmp_path / "run"), "--track", "wandb"])
    assert done.exit_code == 2 and "wandb login" in done.stderr and "WANDB_MODE=offline" in done.stderr
    assert not (tmp_path / "run").exists()


# --- trackio


@pytest.fixture(scope="module")
def trackio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package, with a folder of its own; it reads where that is at its import."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("TRACKIO_")]:
            patch.delenv(name)
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("trackio")


def rows_of(run: Path) -> tuple[list[int], dict[int, dict[str, Any]], dict[str, Any]]:
    """Steps as they came, step -> values, and the config, from trackio's database."""
    from trackio.utils import TRACKIO_DIR

    name = json.loads((run / "tracking.json").read_text())["trackio"]["id"]
    with sqlite3.connect(TRACKIO_DIR / "shoal.db") as db:
        found = db.execute(
            "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,)
        ).fetchall()
        (config,) = db.execute("SELECT config FROM configs WHERE run_name = ?", (name,)).fetchone()
    return [step for step, _ in found], {s: json.loads(m) for s, m in found}, json.loads(config)


def test_trackio_has_what_the_journal_has_once(
    trackio: Any, pico: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        tracked(recipe(pico), run, "trackio", meddle=kill_at(4 + 4 + 2))
    result, heard = tracked(recipe(pico), run, "trackio")
    assert not heard.failures and "Trackio" not in capsys.readouterr().out
    steps, sent, config = rows_of(run)
    assert len(steps) == len(set(steps))
    end = sent.pop(spent(run))
    agrees(sent, run)
    ends_as(result, end)
    assert result["claim"] in end["result/verdict"]["_value"]
    assert "| uniform merge |" in end["result/table"]["_value"]
    assert config["recipe"]["models"] == ["./left", "./right"] and "name: pico" in config["recipe_yaml"]
    nothing_private([json.dumps([sent, end, config]).encode()], pico, tmp_path)


def test_trackio_goes_on_after_what_it_holds(trackio: Any, pico: Any, tmp_path: Path) -> None:
    """It writes in the background: what a killed process did not get down is sent again."""
    from trackio.utils import TRACKIO_DIR

    run = tmp_path / "run"
    with pytest.raises(Killed):
        tracked(recipe(pico), run, "trackio", meddle=kill_at(4 + 4 + 4 + 2))
    name = json.loads((run / "tracking.json").read_text())["trackio"]["id"]
    steps, _, _ = rows_of(run)
    assert len(steps) == 2
    with sqlite3.connect(TRACKIO_DIR / "shoal.db") as db:
        db.execute("DELETE FROM metrics WHERE run_name = ? AND step = ?", (name, steps[-1]))
    tracked(recipe(pico), run, "trackio")
    assert rows_of(run)[0] == [*journalled(run), spent(run)]


def test_several_trackers_and_one_that_fails(trackio: Any, pico: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"

    class Blocking(Heard):
        def begin(self, prepared: Any, done: int) -> None:
            (run / "tensorboard").write_text("in the way")

    _, heard = tracked(recipe(pico), run, "tensorboard", "trackio", heard=Blocking())
    assert len(heard.failures) == 1 and math.isfinite(rows_of(run)[1][spent(run)]["result/score"])


DYING = """
import os, sys, time
from pathlib import Path
from test_tracking import tracked
from shoal.recipe import load_recipe

def die(job, done):
    if done == 14:
        time.sleep(2)  # two generations were sent, and are written in the background
        os._exit(9)

tracked(load_recipe(sys.argv[1]), Path(sys.argv[2]), "tensorboard", "trackio", "wandb", meddle=die)
"""


def test_a_killed_process_has_sent_what_it_marked(
    offline: None, trackio: Any, pico: Any, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    run, path = tmp_path / "run", tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(pico.recipe()))
    paths = [str(Path(__file__).parent), str(Path(shoal.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", DYING, str(path), str(run)]
    dead = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert dead.returncode == 9, dead.stderr
    sent = list(journalled(run))
    assert len(sent) == 2
    assert list(events_of(run)[0]) == list(history(run)[0]) == rows_of(run)[0] == sent
    _, heard = tracked(recipe(pico), run, "tensorboard", "trackio", "wandb")
    assert not heard.failures
    sent = [*journalled(run), spent(run)]
    assert list(events_of(run)[0]) == list(history(run)[0]) == rows_of(run)[0] == sent
    assert len(written(run)) == len(set(written(run)))
