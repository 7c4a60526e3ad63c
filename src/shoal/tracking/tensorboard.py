"""TensorBoard: event files under RUN/tensorboard; nothing leaves the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.tracking.ending import Ending
from shoal.tracking.marks import Mark, Marks
from shoal.tracking.tracker import About


def check() -> None:
    """Raises ImportError where the package is missing."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401


class TensorBoard:
    """An event file of its own per process; the first one's later steps, if any, are purged by the next one's start."""

    def __init__(self, run: Path, about: About, marks: Marks) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder, mark = run / "tensorboard", marks.get("tensorboard")
        if mark is None or not any(folder.glob("events.out.tfevents.*")):
            mark = Mark("tensorboard")
            marks.put("tensorboard", mark)
        self.last = mark.step
        self.words = f"tensorboard --logdir {folder}"
        # a point whose mark was not written any more is sent again, in place of the first one
        purge = None if mark.step < 0 else mark.step + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)
        self._recipe = about.recipe
        if mark.step < 0:
            self._writer.add_text("recipe", _code(about.recipe), 0)

    def point(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, ending: Ending) -> None:
        self._writer.add_text("result/verdict", "\n\n".join(ending.words), ending.step)
        self._writer.add_text("result/table", ending.table, ending.step)
        self._writer.add_text("recipe", _code(self._recipe), ending.step)
        self.point(ending.step, ending.numbers)

    def close(self, finished: bool) -> None:
        self._writer.close()


def _code(text: str) -> str:
    """As a block of Markdown, in which TensorBoard shows text."""
    return "".join(f"    {line}\n" for line in text.splitlines())
