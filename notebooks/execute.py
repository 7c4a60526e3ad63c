"""Execute every notebook in this folder and save it with its outputs: `python notebooks/execute.py`.

02 and 03 need a published recipe and a finished run. Both are made here first: a short run of the tiny zoo, whose models
are on a Hub, published to that Hub. It is the local Hub of tests/hub, so nothing is fetched or sent. Readers name a
repository and a run of their own, by the same variables: SHOAL_REPO and SHOAL_RUN.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))
from hub.local_hub import LocalHub
from hub.tiny_zoo import TOKEN, USER, put_zoo, quickstart

REPO = f"{USER}/quickstart"
BUDGET = 55
# in a process of its own, for huggingface_hub reads its variables once
PUBLISH = "import sys, shoal; _, recipe, run, repo = sys.argv; shoal.evolve(recipe, run, device='cpu'); shoal.publish(run, repo)"


@contextmanager
def published(folder: Path) -> Iterator[dict[str, str]]:
    """The variables of a reader with an empty cache and no token, for whom REPO is on the Hub.

    folder: for the run, in `run`, and the caches of publisher and reader.
    """
    with LocalHub() as hub:
        put_zoo(hub)
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(quickstart(BUDGET), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-c", PUBLISH, str(folder / "recipe.yaml"), str(folder / "run"), REPO],
            env=os.environ | hub.environment(folder / "publisher", TOKEN),
            check=True,
        )
        yield hub.environment(folder / "reader") | {"SHOAL_REPO": REPO, "SHOAL_RUN": str(folder / "run")}


def execute(path: Path, folder: Path, variables: Mapping[str, str]) -> nbformat.NotebookNode:
    """Run a notebook in `folder`; returns it with outputs. An exception in a cell is raised here."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=os.environ | variables)
    return notebook


def scrub(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what belongs to one machine: execution times, its folders, progress on stderr."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:
                    output.text = _scrubbed(output.text)
                for kind, text in output.get("data", {}).items():
                    if kind.startswith("text/"):
                        output.data[kind] = _scrubbed(text)
    notebook.metadata.pop("language_info", None)
    return notebook


def _scrubbed(text: str) -> str:
    text = re.sub(r'(<td [^>]*class="shoal-time">)[^<]*', r"\1", text)
    text = re.sub(r"  \[[^\]]* s(?: left)?\]$", "", text, flags=re.MULTILINE)
    return re.sub(r"(?<![\w<:/])/(?:[\w.-]+/)+", "", text)


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as place, published(Path(place) / "hub") as variables:
        for path in sorted(HERE.glob("*.ipynb")):
            folder = Path(place) / path.stem
            folder.mkdir()
            nbformat.write(scrub(execute(path, folder, variables)), path)
            print(f"{path.name}: executed", file=sys.stderr)


if __name__ == "__main__":
    main()
