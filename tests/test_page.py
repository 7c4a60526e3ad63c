"""The report of a run: it says what the result says and no more, whole in one file, whatever names and texts hold."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chromium import Chromium, find_chromium
from plotly.offline import get_plotlyjs
from runs import Meddler, meddled, recipe
from typer.testing import CliRunner

from shoal.api import evolve as evolve_public
from shoal.cli import app
from shoal.journal import CandidateRow, EvaluationRow
from shoal.page import Live, write_page
from shoal.page.course import course_of
from shoal.page.data import Page, gather
from shoal.page.figures import embedded, figures, label
from shoal.page.render import render
from shoal.page.state import failures, is_held
from shoal.page.words import banner, duration
from shoal.preflight import Prepared, restore
from shoal.recipe import load_recipe
from shoal.report import result_rows, result_words
from shoal.run import evolve
from shoal.sanity import PROMPTS, Sanity, Written
from shoal.stages.observer import Silent
from shoal.types import Capabilities, Failed, Job, Worker
from shoal.worker import LocalWorker

ATTACK = "<script>document.title='owned'</script>"
SECTIONS = [
    "scores",
    "search-heading",
    "weights",
    "trade-offs",
    "items",
    "guards",
    "cost",
    "lineage",
    "recipe",
]


class Outline(HTMLParser):
    """What a browser would find: elements, addresses, scripts, ids, headings."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.words: list[str] = []
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._in.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._in:
            while self._in.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._in and self._in[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = kind, text + data
        elif not self._in or self._in[-1] != "style":
            self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


class Mute(Meddler):
    """A worker that cannot generate, so that no merge of random models is turned away for what it writes."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), writes=False)


def mute(prepared: Prepared, device: str) -> Worker:
    return Mute(LocalWorker(prepared.recipe, prepared.lock, device), lambda job, count: None)


def merged(pico: Any, folder: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """A finished run whose winner is a merge: the first by seed, for of random models a parent may well win."""
    for seed in range(12):
        search = {"budget": 18, "popsize": 6, "items": 16, "objective": "metric", "seed": seed}
        run = folder / f"run{seed}"
        with Live(run, Silent()) as live:
            result = evolve(
                recipe(pico, search=search, **changes), run, device="cpu", observer=live, worker=mute
            )
        if result["winner"]["id"] not in {b["name"] for b in result["baselines"] if b["kind"] == "parent"}:
            return run, result
    raise AssertionError("a parent won every run")


@pytest.fixture(scope="module")
def finished(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return merged(pico, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def page(finished: tuple[Path, dict[str, Any]]) -> Page:
    return gather(finished[0])


@pytest.fixture(scope="module")
def attacked(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with a script in its name, in a parent's and in every item's text."""
    folder = tmp_path_factory.mktemp("attack")
    named = folder / "left<script>alert(1)<b>"
    shutil.copytree(pico.model("left"), named)
    shutil.copytree(pico.tasks, folder / "tasks")
    for name in ("pico_choice", "pico_next"):
        path = folder / "tasks" / f"{name}.yaml"
        task = json.loads(path.read_text()) | {"doc_to_text": ATTACK + "{{word}}:"}
        path.write_text(json.dumps(task))
    run, _ = merged(
        pico,
        folder,
        name=f"attack {ATTACK}",
        models=[str(named), str(pico.model("right"))],
        evaluation={"include_path": str(folder / "tasks"), "batch_size": 64},
    )
    return run / "report.html"


def test_a_run_leaves_its_report_verdict_first(finished: tuple[Path, dict[str, Any]]) -> None:
    run, result = finished
    outline = Outline((run / "report.html").read_text())
    claim = result["claim"][0].upper() + result["claim"][1:]
    assert claim in outline.text
    order = [attributes["id"] for tag, attributes in outline.tags if tag == "h2"]
    assert order == SECTIONS
    assert outline.text.index(claim) < outline.text.index("Parents, uniform merge and winner")


def test_the_numbers_are_the_results_own(finished: tuple[Path, dict[str, Any]]) -> None:
    run, result = finished
    outline = Outline((run / "report.html").read_text())
    for row in result_rows(result)[1]:
        assert " ".join(" ".join(row).split()) in outline.text
    for line in result_words(result)[1:]:
        assert line[1:] in outline.text
    assert f"The search ended with {result['cost']['ended']}." in outline.text
    assert result["weights_sha256"] in outline.text
    assert load_recipe(run / "recipe.yaml").to_yaml() in html.unescape((run / "report.html").read_text())
    for model in yaml.safe_load((run / "lock.yaml").read_text())["models"]:
        assert all(digest in outline.text for digest in model["files"].values())


def said(page: Page, **changes: Any) -> str:
    assert page.result is not None
    return Outline(render(replace(page, result={**page.result, **changes}))).text


def test_a_result_of_before_it_said_why_its_search_ended(page: Page) -> None:
    assert page.result is not None
    cost = {key: value for key, value in page.result["cost"].items() if key != "ended"}
    assert "The search ended" not in said(page, cost=cost)


def test_the_words_follow_the_verdict(page: Page) -> None:
    assert page.result is not None
    heads = {"beats": "Improvement shown", "worse": "Worse", "underpowered": "No improvement shown"}
    for verdict, head in heads.items():
        text = said(page, verdict=verdict, claim=f"what {verdict} means")
        assert f"{head} What {verdict} means." in text
        assert not any(other in text for other in heads.values() if other not in head)
    winner = {"verdict": "ties", "claim": "so it is"}
    parent = page.result["baselines"][0]["name"]
    assert "No difference that counts So it is." in said(
        page, **winner, winner={**page.result["winner"], "id": "mean@3"}
    )
    assert "No improvement So it is." in said(page, **winner, winner={**page.result["winner"], "id": parent})
    # a verdict of a later version is shown as it is
    assert "Degenerate So it is." in said(page, verdict="degenerate", claim="so it is")


def test_guards_are_shown_as_found(page: Page) -> None:
    assert "The recipe guards no task" in said(page)
    guard = {"task": "sums", "max_drop": 0.02, "against": "base", "difference": -0.03, "low": None}
    text = said(page, guards=[guard | {"holds": False, "broken": True}])
    assert "sums base 2.0 -3.0 unknown broken" in text
    assert "not shown to hold" in said(page, guards=[guard | {"holds": False, "broken": False}])


def test_what_models_write_is_shown_as_found(page: Page) -> None:
    assert page.result is not None
    winner = page.result["winner"]["id"]
    measured = Sanity(texts=1, ended=1.0, distinct=0.5, length=12.0, broken=0.0)
    texts = (
        Written(winner, (f"well {ATTACK}",), (True,), measured),
        Written("best@9", (), (), None, "no room"),
    )
    found = {
        "written": {},
        "disqualified": {"best@9": "could not write: no room"},
        "unchecked": {"base": "so"},
    }
    shown = Outline(render(replace(page, texts=texts, result={**page.result, "sanity": found})))
    assert "best@9 was disqualified : could not write: no room." in shown.text
    assert "base was not asked to write: so." in shown.text
    assert f"{winner} 100 50 12 0 best@9 no room" in shown.text
    assert f"{PROMPTS[0].split()[0]} " in shown.text and f"well {ATTACK}" in shown.text


def test_gained_and_lost_items_are_those_of_the_claim(
    pico: Any, finished: tuple[Path, dict[str, Any]], page: Page
) -> None:
    _, result = finished
    parents = [b for b in result["baselines"] if b["kind"] == "parent"]
    assert page.parent == max(parents, key=lambda b: b["score"])["name"]
    rows = [json.loads(line) for line in (pico.tasks / "test.jsonl").read_text().splitlines()]
    seen = 0
    for task in page.items:
        (claim,) = [
            c for c in result["comparisons"] if c.get("task") == task.task and c["against"] == page.parent
        ]
        assert (task.won, task.gone) == (claim["wins"], claim["losses"])
        assert task.won + task.gone + task.same_right + task.same_wrong == claim["n"]
        for change in (*task.gained, *task.lost):
            seen += 1
            assert change.text is not None and change.text.prompt == f"{rows[change.item]['word']}:"
            if task.task == "pico_choice":
                assert change.text.target == rows[change.item]["options"][rows[change.item]["gold"]]
                assert change.chosen is not None and change.chosen[0] != change.chosen[1]
                right = [rows[change.item]["gold"] == chosen for chosen in change.chosen]
                assert right == [change.winner == 1, change.parent == 1]
    assert seen


def test_without_texts_there_are_ids_only(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = finished
    full = (run / "report.html").read_text()
    bare = write_page(run, tmp_path / "bare.html", item_text=False).read_text()
    assert "<blockquote" in full and "<blockquote" not in bare
    items = [i for task in gather(run, item_text=False).items for i in (*task.gained, *task.lost)]
    assert items and all(i.text is None and i.hash[:12] in bare for i in items)
    assert not (run / ".report.html").exists() and list(tmp_path.iterdir()) == [tmp_path / "bare.html"]


def test_a_run_whose_task_is_gone_or_changed_has_a_report(pico: Any, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    shutil.copytree(pico.tasks, tasks)
    for name in ("pico_choice", "pico_next"):
        path = tasks / f"{name}.yaml"
        path.write_text(path.read_text().replace(str(pico.tasks), str(tasks)))
    run, _ = merged(pico, tmp_path, evaluation={"include_path": str(tasks), "batch_size": 64})
    assert any(task.gained or task.lost for task in gather(run).items)
    rows = (tasks / "test.jsonl").read_text().replace('"word": "', '"word": "hh').splitlines()
    (tasks / "test.jsonl").write_text("\n".join(rows) + "\n")
    changed = gather(run)
    assert {task.reason for task in changed.items if task.gained or task.lost} == {
        "the data set on this machine is another one than the run's, so texts are left out"
    }
    shutil.rmtree(tasks)
    gone = gather(run)
    shown = [task for task in gone.items if task.gained or task.lost]
    assert shown and all("texts are left out" in task.reason for task in shown)
    assert all(change.text is None for task in shown for change in (*task.gained, *task.lost))
    assert "texts are left out" in Outline(render(gone)).text


def test_weights_are_those_of_the_genome(pico: Any, tmp_path: Path) -> None:
    space = {"shape": "curve", "coefficients": 2, "tensor_types": ["attn", "mlp"]}
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), Live(run, Silent()) as live:
        evolve(recipe(pico, space=space), run, device="cpu", observer=live, worker=meddled(stop_after(14)))
    mine, lock = load_recipe(run / "recipe.yaml"), gather(run).lock
    searched = restore(mine, lock).space
    page = gather(run, decode=searched.decode)
    assert page.course.leader is not None and page.merge == page.course.leader.candidate
    (genome,) = [row.genome for row in rows_of(run) if row.id == page.merge]
    table = searched.values(np.array(genome))
    assert [m.model for m in page.weights] == ["left", "right"]
    for found in page.weights:
        for kind, values in zip(found.types, found.values, strict=True):
            if kind in ("attn", "mlp"):
                row = table.values[table.rows.index(f"weight[{found.model}].{kind}")]
                columns = [table.columns.index(str(layer)) for layer in found.layers]
                assert np.allclose(row[columns], values)
        assert [name for name, _ in found.outside] == ["embed", "norm", "head"]


def rows_of(run: Path) -> list[CandidateRow]:
    from shoal.journal import Journal

    journal = Journal(run / "journal.sqlite")
    try:
        return journal.candidates()
    finally:
        journal.close()


def stop_after(count: int, error: type[BaseException] = KeyboardInterrupt) -> Any:
    def meddle(job: Job, done: int) -> None:
        if done > count:
            raise error

    return meddle


def test_cost_adds_up(finished: tuple[Path, dict[str, Any]], page: Page) -> None:
    cost = finished[1]["cost"]
    assert sum(stage.items for stage in page.spent) == cost["item_evaluations"]
    assert [stage.stage for stage in page.spent[:3]] == ["anchors", "search", "selection"]
    total = sum(stage.seconds for stage in page.spent) + page.loading
    assert total == pytest.approx(cost["seconds"]["total"])
    anchors, search = page.spent[:2]
    costs = [cost for cost, _ in page.course.means]
    assert costs == sorted(costs) and costs[-1] == anchors.items + search.items
    assert all(anchors.items < point.cost <= costs[-1] for point in page.course.points)
    values = [value for _, value in page.course.best]
    assert values == sorted(values) and values[-1] == max(p.fitness for p in page.course.points)


def test_fitness_starts_anew_where_what_is_maximised_changes() -> None:
    done = [
        EvaluationRow(f"g{g}c{c}", "search", "done", None, 0.0, 0.0, 0.0, 10)
        for g in range(3)
        for c in range(2)
    ]
    tells = {0: {"g0c0": 0.9, "g0c1": None}, 1: {"g1c0": 0.1, "g1c1": 0.2}, 2: {"g2c0": 0.0, "g2c1": 0.3}}
    events = [
        {"generation": g, "objectives": {"sums": "metric" if g else "smooth", "words": "smooth"}}
        for g in range(3)
    ]
    found = course_of(done, tells, events)
    assert [p.cost for p in found.points] == [10, 30, 40, 50, 60]
    assert found.best == ((40, 0.2), (60, 0.3))
    assert [(c.generation, c.words, c.anew) for c in found.changes] == [(1, "sums by its metric", True)]
    assert found.leader is not None and found.leader.candidate == "g2c1"
    # a finer space is another way to the same end
    grown = course_of(done, tells, events[:1], [{"generation": 2, "to": "layers, 24 genes"}])
    assert [(c.generation, c.words, c.anew) for c in grown.changes] == [
        (2, "a finer space, layers, 24 genes", False)
    ]
    assert grown.best == ((10, 0.9), (40, 0.9), (60, 0.9))
    assert grown.leader is not None and grown.leader.candidate == "g0c0"


def test_no_name_and_no_text_is_read_as_html(attacked: Path) -> None:
    text = attacked.read_text()
    outline = Outline(text)
    assert ATTACK in outline.text  # literally, as words
    assert "left<script>alert(1)<b>" in outline.text
    assert len([task for task in gather(attacked.parent).items if task.gained or task.lost])
    *data, plotly, ours = outline.scripts
    assert data and all(kind == "application/json" for kind, _ in data)
    # Plotly is compressed: it is not run as it stands, but unpacked
    assert plotly[0] == "application/gzip" and ours[0] is None
    unpacked = gzip.decompress(base64.b64decode(plotly[1], validate=True)).decode()
    assert unpacked == get_plotlyjs() and len(text) < 0.6 * len(unpacked)
    # the two scripts are those that the page's own policy names, and no other may run
    (policy,) = [m["content"] for m in outline.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and "default-src 'none'" in policy
    (allowed,) = re.findall(r"script-src ([^;]+);", policy)
    digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in (unpacked, ours[1])]
    assert allowed.split() == [f"'sha256-{digest}'" for digest in digests]
    assert not outline.of("b") and ATTACK not in unpacked + ours[1]
    for _, figure in data:
        assert not set("<>&") & set(figure)
        json.loads(figure)


def test_names_in_plots_are_shown_as_they_are() -> None:
    import plotly.graph_objects as go

    assert label(ATTACK) == "&lt;script&gt;document.title='owned'&lt;/script&gt;"
    text = embedded(go.Figure(layout={"title": {"text": "</script><!-- & "}}))
    assert "<" not in text and json.loads(text)["layout"]["title"]["text"] == "</script><!-- & "


def test_the_page_loads_nothing(attacked: Path) -> None:
    outline = Outline(attacked.read_text())
    for tag, attributes in outline.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "form", "video", "audio"), tag
        for name in ("src", "srcset", "href", "action", "data", "poster", "background"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, name, value)
        assert not any(name.startswith("on") for name in attributes), attributes
    (style,) = re.findall(r"<style>(.*?)</style>", attacked.read_text(), flags=re.DOTALL)
    assert "url(" not in style and "@import" not in style


def test_anchors_and_labels_lead_somewhere(finished: tuple[Path, dict[str, Any]]) -> None:
    outline = Outline((finished[0] / "report.html").read_text())
    ids = [attributes["id"] for _, attributes in outline.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    wanted = [a["href"] for a in outline.of("a")] + [
        f"#{s['aria-labelledby']}" for s in outline.of("section")
    ]
    assert {str(target)[1:] for target in wanted} <= set(ids)
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    plots = [attributes for attributes in outline.of("div") if "data-figure" in attributes]
    assert plots and all(p["role"] == "img" and len(p["aria-label"] or "") > 20 for p in plots)
    assert {f"figure-{p['data-figure']}" for p in plots} <= set(ids)
    assert all("scope" in attributes for attributes in outline.of("th"))


def contrast(first: str, second: str) -> float:
    """WCAG 2.2, "contrast ratio"."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_texts_can_be_read_in_light_and_dark() -> None:
    style = (Path(__file__).parent.parent / "src/shoal/page/page.css").read_text()
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in style.split(":root")[1:3]]
    for colours in schemes:
        assert len(colours) == 22
        for back in ("paper", "card", "soft", "heat-low", "heat-mid", "heat-high"):
            assert contrast(colours["ink"], colours[back]) >= 4.5, back
        for text in ("muted", "link", "winner", "parent", "uniform"):
            assert contrast(colours[text], colours["paper"]) >= 4.5, text
        for tone in ("good", "bad", "even", "open"):
            assert contrast(colours[tone], colours[f"{tone}-soft"]) >= 4.5, tone
        # dots of candidates are not text: 3 to 1
        assert contrast(colours["candidate"], colours["paper"]) >= 3


class Reader(Silent):
    """Reads the page whenever it may have been written."""

    def __init__(self, run: Path) -> None:
        self.run, self.pages, self.heard = run, list[str](), list[str]()
        self.held: list[bool] = []

    def say(self, text: str) -> None:
        self.heard.append(text)

    def look(self) -> None:
        path = self.run / "report.html"
        self.held.append(is_held(self.run))
        if path.is_file():
            self.pages.append(Outline(path.read_text()).text)

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None:
        self.look()

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None:
        self.look()


def test_the_page_is_fresh_while_a_run_goes_on(pico: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    reader = Reader(run)
    with Live(run, reader, pause=0, share=0) as live:
        result = evolve(recipe(pico), run, device="cpu", observer=live)
    assert all("Still going on" in text for text in reader.pages) and all(reader.held)
    assert "Loading models and tasks; 0 of 3 generations told" in reader.pages[0]
    told = [int(re.findall(r"; (\d) of 3 generations told", text)[0]) for text in reader.pages]
    assert told == sorted(told) and {0, 1, 2, 3} == set(told)
    assert "there is no verdict yet" in reader.pages[-1] and result["claim"][1:] not in reader.pages[-1]
    assert result["claim"][1:] in Outline((run / "report.html").read_text()).text
    assert not is_held(run) and not list(run.glob(".report.html*"))


def test_a_page_is_written_once_a_while_only(pico: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    reader = Reader(run)
    with Live(run, reader, pause=1e9) as live:
        evolve(recipe(pico), run, device="cpu", observer=live)
    # the one of the beginning until the end
    assert len(set(reader.pages)) == 1


def test_a_page_that_cannot_be_written_is_said_once_and_stops_nothing(pico: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    reader = Reader(run)

    def block(job: Job, done: int) -> None:
        if done == 1:
            (run / "report.html").unlink()
            (run / "report.html").mkdir()

    with Live(run, reader, pause=0, share=0) as live:
        evolve(recipe(pico), run, device="cpu", observer=live, worker=meddled(block))
    assert len([text for text in reader.heard if "the report cannot be written" in text]) == 1
    assert (run / "DONE").is_file()


def test_a_stopped_run_says_so(pico: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), Live(run, Silent()) as live:
        evolve(recipe(pico), run, device="cpu", observer=live, worker=meddled(stop_after(9)))
    text = Outline((run / "report.html").read_text()).text
    assert (
        "Stopped before its end Interrupted by its user. It was searching; 1 of 3 generations told." in text
    )
    # from outside, later, the reason is not known
    (run / "report.html").unlink()
    text = Outline(write_page(run).read_text()).text
    assert "Stopped before its end Why is not in its journal. It was searching; 1 of 3" in text
    assert "What was finished is kept" in text and "Nothing is compared yet" in text
    result = evolve_public(recipe(pico), run, device="cpu")
    assert result["claim"][1:] in Outline((run / "report.html").read_text()).text


def test_a_run_that_has_only_a_lock_has_a_report(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for name in ("recipe.yaml", "lock.yaml"):
        shutil.copy(finished[0] / name, tmp_path / name)
    text = Outline(write_page(tmp_path).read_text()).text
    assert "It was loading models and tasks; 0 of 3 generations told. No candidate has been scored" in text
    assert "Nothing has been scored yet." in text
    assert not (tmp_path / "journal.sqlite").exists()


def fail_all(job: Job, count: int) -> Failed | None:
    if job.candidate.startswith("g"):
        return Failed(job.candidate, f"no room for {ATTACK}", 0.1)
    return None


def test_a_run_whose_candidates_all_fail_says_why(pico: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Exception, match="10 candidates in a row"), Live(run, Silent()) as live:
        evolve(recipe(pico), run, device="cpu", observer=live, worker=meddled(fail_all))
    text = Outline((run / "report.html").read_text()).text
    assert f"10 candidates in a row failed, the last one with: no room for {ATTACK}" in text
    assert "Every candidate so far has failed." in text and "No candidate has been told yet." in text
    assert f"10 g000c00 no room for {ATTACK}" in text
    # found out from the journal alone
    text = Outline(write_page(run).read_text()).text
    assert "The last 10 candidates failed, the last one with: no room" in text
    assert failures([]) == ()


def test_a_winner_that_is_a_parent_has_a_report(pico: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = pico.recipe()["search"] | {"budget": 8}
    with Live(run, Silent()) as live:
        result = evolve(
            recipe(pico, search=small), run, device="cpu", observer=live, worker=meddled(fail_all)
        )
    assert result["verdict"] == "ties"
    text = Outline((run / "report.html").read_text()).text
    assert f"No improvement {result['claim'][0].upper()}{result['claim'][1:]}." in text
    if result["winner"]["id"] in ("base", "left", "right"):
        assert f"the winner is {result['winner']['id']} itself: nothing was merged" in text


def test_one_task_has_nothing_to_trade(pico: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evolve(recipe(pico, tasks=[{"task": "pico_next", "metric": "acc"}]), run, device="cpu")
    page = gather(run)
    assert page.front is None and "nothing to trade" in Outline(render(page)).text
    assert not [name for name in figures(page) if name.startswith(("front", "tasks"))]


def test_a_metric_that_is_no_number_per_item_is_said(pico: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tasks = [{"task": "pico_next", "metric": "perplexity"}]
    evolve(recipe(pico, tasks=tasks), run, device="cpu")
    page = gather(run)
    outline = Outline(render(page))
    assert page.items == () or "None to show" not in outline.text
    for task in page.items:
        assert not task.binary and task.won + task.gone + task.same_right == len(
            page.lock.tasks[0].roles["test"].items
        )


def test_the_command_writes_and_refuses(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "mine.html"
    done = CliRunner().invoke(app, ["report", str(finished[0]), "--out", str(out), "--no-item-text"])
    assert done.exit_code == 0 and done.stdout == f"{out}\n" and "<blockquote" not in out.read_text()
    done = CliRunner().invoke(app, ["report", str(tmp_path / "none")])
    assert (
        done.exit_code == 2
        and done.stderr == f"error: {tmp_path / 'none'}: no run here (expected lock.yaml)\n"
    )
    done = CliRunner().invoke(app, ["report", str(finished[0]), "--out", str(tmp_path / "no" / "page.html")])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1


def test_durations_in_words() -> None:
    assert [duration(s) for s in (0.04, 59.9, 61, 3599, 3600, 9000)] == [
        "0.0 s",
        "59.9 s",
        "1 min 01 s",
        "59 min 59 s",
        "1 h 00 min",
        "2 h 30 min",
    ]


def test_the_banner_of_a_page_without_result(page: Page) -> None:
    running = banner(replace(page, result=None, state=replace(page.state, kind="running")))
    assert running.tone == "open" and running.head == "Still going on"
    stopped = banner(
        replace(page, result=None, state=replace(page.state, kind="stopped", reason="no memory"))
    )
    assert stopped.tone == "bad" and stopped.text.startswith("No memory. ")


program = find_chromium()


@pytest.mark.skipif(program is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")
def test_a_browser_shows_it_without_complaint(attacked: Path, tmp_path: Path) -> None:
    assert program is not None
    with Chromium(program, tmp_path / "profile") as browser:
        for width, dark, phone in ((1280, False, False), (375, False, True), (1280, True, False)):
            browser.open(attacked, width, dark=dark, phone=phone)
            browser.wait("html.drawn")
            assert browser.problems == []
            assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data"}
            assert browser.run("document.title").startswith(f"attack {ATTACK}")
            assert browser.run("document.documentElement.scrollWidth") == width
            plots = browser.run("document.querySelectorAll('[data-figure]').length")
            assert plots >= 5
            assert browser.run("document.querySelectorAll('[data-figure] svg.main-svg').length") >= plots
            too_wide = "[...document.querySelectorAll('[data-figure] svg.main-svg')].filter(s => s.getBoundingClientRect().right > innerWidth).length"
            assert browser.run(too_wide) == 0
            back = browser.run("getComputedStyle(document.body).backgroundColor")
            assert back == ("rgb(16, 23, 29)" if dark else "rgb(255, 255, 255)")
            tick = browser.run("getComputedStyle(document.querySelector('.ytick text')).fill")
            assert tick == ("rgb(228, 236, 242)" if dark else "rgb(23, 34, 45)")
        # a reader who changes the scheme keeps a page that can be read
        browser.scheme(dark=False)
        browser.settle()
        assert (
            browser.run("getComputedStyle(document.querySelector('.ytick text')).fill") == "rgb(23, 34, 45)"
        )
        # names are words in plots too
        assert "left<script>alert(1)<b>" in browser.run(
            "[...document.querySelectorAll('#differences .ytick text')].map(t => t.textContent)"
        )
        # the page's policy: a script that got into it all the same does not run
        browser.run(
            "document.head.append(Object.assign(document.createElement('script'), {textContent: 'window.owned = 1'}))"
        )
        assert browser.run("typeof window.owned") == "undefined"
        browser.pdf(tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").stat().st_size > 20_000


@pytest.mark.skipif(program is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")
def test_a_browser_runs_nothing_else_than_plotly(attacked: Path, tmp_path: Path) -> None:
    assert program is not None
    other = base64.b64encode(gzip.compress(b"window.owned = 1; window.Plotly = {}")).decode()
    page = tmp_path / "page.html"
    with Chromium(program, tmp_path / "profile") as browser:
        for packed, said in ((other, "not what was packed"), ("AAAA", "cannot unpack")):
            text = attacked.read_text()
            changed = re.sub(r'(id="plotly">)[^<]+', lambda m, packed=packed: m[1] + packed, text)  # type: ignore[misc]
            page.write_text(changed)
            browser.open(page, 1280)
            browser.wait("[data-figure]:not(:empty)")
            assert said in browser.run("document.getElementById('differences').textContent")
            assert browser.run("typeof window.owned + document.documentElement.className") == "undefined"


@pytest.mark.skipif(program is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")
def test_a_browser_shows_a_run_that_has_just_begun(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    assert program is not None
    for name in ("recipe.yaml", "lock.yaml"):
        shutil.copy(finished[0] / name, tmp_path / name)
    out = write_page(tmp_path, running=True)
    with Chromium(program, tmp_path / "profile") as browser:
        browser.open(out, 375, phone=True)
        assert browser.problems == []
        assert browser.run("document.documentElement.scrollWidth") == 375
        assert browser.run("document.getElementById('live').checked")
