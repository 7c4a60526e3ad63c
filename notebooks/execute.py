"""Execute every notebook in this folder and save it with its outputs: `python notebooks/execute.py`."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in `folder`; returns it with outputs. An exception in a cell is raised here."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def scrub(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what belongs to one machine: execution times, its folders, progress on stderr."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:
                    output.text = re.sub(r"/(?:[\w.-]+/)+", "", output.text)
    notebook.metadata.pop("language_info", None)
    return notebook


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(scrub(execute(path, Path(folder))), path)
        print(f"{path.name}: executed", file=sys.stderr)


if __name__ == "__main__":
    main()
