"""The notebooks, executed as `make notebooks` does, on fewer items; and what a notebook shows of a run."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

import shoal
from shoal.notebook import in_notebook, telling, watching
from shoal.stages.observer import Silent

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALL = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# what its outputs say if everything went well, beside the notebook's own assertions
SAID = {
    "01_evolve": ["search 55/55 generation 5: best", "r:hdcabf> ", "| uniform merge |"],
    "02_reproduce": [
        "files 12/12",
        "merging and writing the weights",
        "rebuilt from its parents",
        "reproduced: weights and scores agree on {compared:,} items",
    ],
    "03_look_inside": ["tiny_sort: {tested} items", "| weight of tiny-sort |", "tiny_sort: gained\n    s:"],
}
COMMITTED = {"compared": 3719, "tested": 1000}


def said_by(name: str, compared: int, tested: int) -> list[str]:
    """compared: selection and test items of all tasks; tested: test items of one."""
    return [words.format(compared=compared, tested=tested) for words in SAID[name]]


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "notebooks" / "execute.py"))


@pytest.fixture(scope="module")
def reader(tool: dict[str, Any], small_zoo: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The variables of somebody for whom a recipe is published, who has its run, too."""
    with tool["published"](tmp_path_factory.mktemp("published") / "hub") as variables:
        yield variables


def cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in cells(notebook) for output in cell["outputs"]]


def texts(notebook: Any) -> list[str]:
    """What can be read in the outputs, as text or as Markdown."""
    found = []
    for output in outputs(notebook):
        data = output.get("data", {})
        found += [output.get("text"), *(data[kind] for kind in sorted(data) if kind.startswith("text/"))]
    return ["".join(text) for text in found if text]


@ALL
def test_a_notebook_runs(path: Path, tool: dict[str, Any], reader: dict[str, str], tmp_path: Path) -> None:
    notebook = tool["execute"](path, tmp_path, reader)
    assert all(cell.execution_count for cell in cells(notebook))
    said = "\n".join(texts(notebook))
    tasks = shoal.load_run(reader["SHOAL_RUN"]).lock.tasks
    items = {role: [len(task.roles[role].items) for task in tasks] for role in ("select", "test")}
    for words in said_by(path.stem, sum(items["select"] + items["test"]), items["test"][0]):
        assert words in said
    assert "**no**" not in said  # a check that does not agree
    errors = "".join(output.text for output in outputs(notebook) if output.get("name") == "stderr")
    assert "Warning" not in errors
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) == {"01_evolve": 1, "02_reproduce": 0, "03_look_inside": 4}[path.stem]
    scrubbed = "\n".join(texts(tool["scrub"](notebook)))
    assert str(tmp_path) not in scrubbed and not personal(scrubbed)


def personal(text: str) -> list[str]:
    """What belongs to one machine: paths from its root, addresses, times."""
    times = re.findall(r'shoal-time">[^<]+|\[[\d.]+ s\]', text)
    return times + re.findall(r"(?<![\w<:/.])/\w[\w.-]*/[\w./-]+|127\.0\.0\.1|localhost", text)


def test_what_belongs_to_a_machine_is_found() -> None:
    for text in (
        "in /tmp/x/run",
        "(/home/me/a.py)",
        "at 127.0.0.1:80",
        "test 6/6  [1.2 s]",
        'shoal-time">3 s',
    ):
        assert personal(text)
    for text in (
        "6/6",
        "org/name",
        "</td></tr>",
        '"shoal-time"></td>',
        "journal/scores.parquet",
        "../runs/x",
    ):
        assert not personal(text)


@ALL
def test_a_notebook_is_committed_with_outputs_of_no_machine(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert [cell["execution_count"] for cell in cells(notebook)] == list(
        range(1, len(cells(notebook)) + 1)
    ), "run `make notebooks` and commit the result"
    assert not [o for o in outputs(notebook) if o["output_type"] == "error" or o.get("name") == "stderr"]
    said = "\n".join(texts(notebook))
    assert all(words in said for words in said_by(path.stem, **COMMITTED)) and not personal(said)


@ALL
def test_a_notebook_uses_the_public_interface_only(path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in cells(json.loads(path.read_text(encoding="utf-8"))))
    used = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            assert not [a.name for a in node.names if a.name.startswith("shoal.")]
        elif isinstance(node, ast.ImportFrom):
            assert node.module and node.module.partition(".")[0] != "shoal"
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr == "__file__"
            if isinstance(node.value, ast.Name) and node.value.id == "shoal":
                used.add(node.attr)
    assert used and used - {"__file__"} <= set(shoal.__all__)


def run_cells(
    folder: Path, *code: str, failing: bool = False, variables: Mapping[str, str] | None = None
) -> list[list[Any]]:
    """The outputs of each cell. variables: of the environment, beside this process's."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in code])
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        allow_errors=failing,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    ).execute(env=os.environ | (variables or {}))
    return [cell.outputs for cell in notebook.cells]


def test_a_run_shows_bars_in_one_output_and_leaves_plots_alone(pico: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(pico.recipe()))
    short = pico.recipe()["search"] | {"budget": 4}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(pico.recipe(search=short)))
    shown, again, quiet, plotted = run_cells(
        tmp_path,
        "import matplotlib.pyplot as plt, shoal\nresult = shoal.evolve('recipe.yaml', 'run', device='cpu')",
        "assert shoal.evolve('recipe.yaml', 'run', device='cpu') == result",
        "shoal.evolve('short.yaml', 'quiet', device='cpu', quiet=True)['verdict']",
        "plt.plot([1, 2])\nplt.show()",
    )
    bars = [output for output in shown if output.output_type == "display_data"]
    assert len(bars) == 1
    page, text = bars[0].data["text/html"], bars[0].data["text/plain"]
    assert re.findall(r'<progress value="(\d+)" max="(\d+)">', page)[:2] == [("4", "4"), ("12", "12")]
    assert re.search(
        r"pico: 8 genes, 3 generations of 4\n   anchors 4/4 +\[.* s\]\n    search 12/12 generation 3: best",
        text,
    )
    assert "checking models" not in text  # a step that was done before the search
    assert [output.data["text/plain"] for output in again] == ["nothing was left to do: the run is finished"]
    assert [output.output_type for output in quiet] == ["execute_result"]
    assert "image/png" in plotted[-1].data  # as before a run: its own plots go to files


def test_what_is_said_is_text_and_an_error_leaves_the_bars(tmp_path: Path) -> None:
    said, failed = run_cells(
        tmp_path,
        "from shoal.notebook import Bars\nwith Bars() as bars:\n    bars.stage('search', 4)\n    for i in range(9):\n        bars.say(f'<b>{i}</b>')",
        "with Bars() as bars:\n    bars.stage('search', 4)\n    bars.evaluated(None, None)\n    raise ValueError('stopped')",
        failing=True,
    )
    page = said[0].data["text/html"]
    assert "<div>&lt;b&gt;8&lt;/b&gt;</div>" in page and "<b>8</b>" not in page
    assert "<div>… 3 lines before</div>" in page and "&gt;2&lt;" not in page and "&gt;3&lt;" in page
    assert [output.output_type for output in failed] == ["display_data", "error"]
    assert "search 1/4" in failed[0].data["text/plain"] and "left" not in failed[0].data["text/plain"]


def test_calls_on_the_hub_show_their_steps(
    tool: dict[str, Any], reader: dict[str, str], tmp_path: Path
) -> None:
    home = Path(reader["SHOAL_RUN"]).with_name("publisher")
    publisher = reader | {"HF_HOME": str(home), "HF_TOKEN": tool["TOKEN"]}
    published, again, quiet, mine, failed = run_cells(
        tmp_path,
        "import os, shoal\nshoal.publish(os.environ['SHOAL_RUN'], 'example/again').repo",
        "shoal.reproduce('example/again').agrees",
        "shoal.reproduce('example/again', quiet=True).agrees",
        "lines = []\nshoal.download('example/again', 'model', say=lines.append)\nprint(*lines, sep='|')",
        "shoal.download('example/none')",
        failing=True,
        variables=publisher,
    )
    sent, made = published[0].data["text/plain"], again[0].data["text/plain"]
    assert [output.output_type for output in published] == ["display_data", "execute_result"]
    assert sent.startswith("publish example/again\nrendering the requests of the tasks  [")
    count = re.search(r"files (\d+)/(\d+)  \[", sent)
    assert count and count[1] == count[2] and "created" in sent.splitlines()[-1]
    assert re.search(r"files (\d+)/\1  \[", made) and "\n   merging  [" in made
    # everything is over: nothing is drawn as if it went on
    page = again[0].data["text/html"]
    assert page.count("<progress value=") == page.count("<progress") >= 3
    assert all(value == most for value, most in re.findall(r'<progress value="(\d+)" max="(\d+)">', page))
    assert [output.output_type for output in quiet] == ["execute_result"]
    assert {output.output_type for output in mine} == {"stream"}  # no bars; the Hub client has its own
    assert "".join(output.text for output in mine if output.name == "stdout").startswith("1/")
    assert failed[-1].output_type == "error" and "no such repository" in str(failed[-1].evalue)


def test_a_step_goes_on_until_the_next_and_is_not_done_by_an_error(tmp_path: Path) -> None:
    going, failed = run_cells(
        tmp_path,
        "from shoal.notebook import Bars\nbars = Bars('download')\n"
        "for text in ('1/3 a', '2/3 b', 'checking the weights'):\n    bars.step(text)",
        "with Bars('download') as bars:\n    for text in ('1/3 a', 'note: slow', '3/3 <c>'):\n        bars.step(text)\n"
        "    raise ValueError('stopped')",
        failing=True,
    )
    assert re.findall(r"<progress.*?>", going[0].data["text/html"]) == [
        '<progress value="3" max="3">',
        "<progress>",
    ]
    page = failed[0].data["text/html"]
    assert '<progress value="2" max="3">' in page and "&lt;c&gt;" in page and "<div>note: slow</div>" in page


def test_there_are_no_bars_outside_a_notebook() -> None:
    assert not in_notebook()
    lines: list[str] = []
    with telling("title", lines.append, False) as say, telling("title", None, False) as silent:
        say("checking")
        silent("checking")
    assert lines == ["checking"]
    mine = Silent()
    with watching(mine, False) as given, watching(None, False) as none:
        assert given is mine and type(none) is Silent
