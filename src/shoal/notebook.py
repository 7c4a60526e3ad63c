"""What a notebook shows of a run: one output of the cell, a bar per stage, updated in place.

It needs no widgets, so it works in every front end, and what is saved with the notebook is how the run ended.
"""

from __future__ import annotations

import html
import importlib
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shoal.endpoint import Say, without_bars
from shoal.page.words import duration
from shoal.progress import summary
from shoal.stages.observer import Observer, Silent

if TYPE_CHECKING:
    from shoal.journal import EvaluationRow
    from shoal.preflight import Prepared

PAUSE = 0.2  # seconds between two updates
LINES = 6  # of what is said, the last ones; all are in the journal
_FILE = re.compile(r"(\d+)/(\d+) (.+)")
_STEP = re.compile(r"[a-z]+ing\b")
_CELL = "text-align:left;border:none;padding:0 1.2em 0 0;white-space:nowrap"


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel (a terminal's IPython is none)."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def watching(observer: Observer | None, quiet: bool) -> Iterator[Observer]:
    """The given observer; without one bars in a notebook, nothing elsewhere or when quiet."""
    if observer is None and not quiet and in_notebook():
        with Bars() as bars:
            yield bars
    else:
        yield observer or Silent()


@contextmanager
def telling(title: str, say: Say | None, quiet: bool) -> Iterator[Say]:
    """To whom a call tells its steps: the given `say`; without one bars in a notebook, nothing elsewhere or when quiet."""
    if say is not None:
        yield say
    elif quiet or not in_notebook():
        with without_bars(quiet):  # the Hub client's own
            yield lambda text: None
    else:
        with Bars(title) as bars:
            yield bars.step


@dataclass
class _Stage:
    """One line of the display. seconds: from its start to its end, or to now.

    total: 0 where it is one step, not a count. told: by lines, of which the next one says that it is done.
    """

    name: str
    total: int
    done: int = 0
    note: str = ""
    told: bool = False
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def count(self) -> str:
        return f"{self.done}/{self.total}" if self.total else ""

    @property
    def bar(self) -> str:
        """As HTML; of a step that goes on one without an end."""
        if not self.total and self.ended is None:
            return "<progress></progress>"
        return f'<progress value="{self.done}" max="{max(1, self.total)}"></progress>'

    @property
    def time(self) -> str:
        """How long it took; of one that goes on, also how long it may still take, by the mean so far."""
        spent = (self.ended or time.monotonic()) - self.started
        if self.ended is not None or not self.done or not self.total:
            return duration(spent)
        left = spent / self.done * max(0, self.total - self.done)
        return f"{duration(spent)}, about {duration(left) if left >= 60 else f'{left:.0f} s'} left"


class Bars:
    """An observer; as a context it shows the last state at the end, whatever ended it."""

    def __init__(self, title: str = "") -> None:
        self._title = title
        self._stages: list[_Stage] = []
        self._said: list[str] = []
        self._handle: Any = None
        self._next = 0.0

    def say(self, text: str) -> None:
        self._said.append(text)
        self._show()

    def step(self, text: str) -> None:
        """One line of what a call tells: `3/12 NAME` of a file, `checking ...` of a step, anything else is a remark."""
        if found := _FILE.fullmatch(text):
            number, total = int(found[1]), int(found[2])
            last = self._stages[-1] if self._stages else None
            if last is None or last.total != total or last.done >= number:
                self._pass()
                last = _Stage("files", total, told=True)
                self._stages.append(last)
            last.done, last.note = number - 1, found[3]
            self._show(soon=False)
        elif _STEP.match(text):
            self._pass()
            self._stages.append(_Stage(text, 0, told=True))
            self._show()
        else:
            self.say(text)

    def begin(self, prepared: Prepared, done: int) -> None:
        self._title = (
            f"{prepared.recipe.name}: {prepared.space.size} genes, {prepared.generations} generations of"
            f" {prepared.lock.popsize}"
        )
        self._forget_steps()
        if done:
            self._said.append(f"continuing: {done} evaluations are in the journal")
        self._show()

    def stage(self, name: str, total: int) -> None:
        self._end()
        self._stages.append(_Stage(name, total))
        self._show()

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None:
        self._stages[-1].done += 1
        self._show(soon=False)

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None:
        self._stages[-1].note = f"generation {generation + 1}: {summary(fitness)}"
        self._show()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._pass()
        self._end()
        if kind is None and not self._title and not self._stages:
            self._title = "nothing was left to do: the run is finished"
            self._forget_steps()
        if self._handle is not None:
            self._show()

    def _forget_steps(self) -> None:
        """What was said until here is done; a note stays."""
        self._said = [line for line in self._said if line.startswith("note:")]

    def _pass(self) -> None:
        """What was told last is done."""
        last = self._stages[-1] if self._stages else None
        if last is not None and last.told and last.ended is None:
            last.done, last.note = last.total or 1, ""
            self._end()

    def _end(self) -> None:
        if self._stages and self._stages[-1].ended is None:
            self._stages[-1].ended = time.monotonic()

    def _show(self, soon: bool = True) -> None:
        """Draw the state anew; not `soon`: unless that was done a moment ago."""
        from IPython.display import display

        now = time.monotonic()
        if not soon and now < self._next:
            return
        self._next = now + PAUSE
        shown = {"text/html": self._html(), "text/plain": self._text()}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(shown, raw=True)

    def _html(self) -> str:
        rows = "".join(
            f'<tr style="background:none"><td style="{_CELL}">{html.escape(stage.name)}</td>'
            f'<td style="{_CELL}">{stage.bar}</td>'
            f'<td style="{_CELL};text-align:right">{stage.count}</td>'
            f'<td style="{_CELL};opacity:.7" class="shoal-time">{stage.time}</td>'
            f'<td style="{_CELL};white-space:normal">{html.escape(stage.note)}</td></tr>'
            for stage in self._stages
        )
        said = "".join(f"<div>{html.escape(line)}</div>" for line in self._lines())
        return (
            f'<div style="line-height:1.6"><b>{html.escape(self._title)}</b>'
            f'<table style="margin:.3em 0;border:none;border-collapse:collapse;font-size:inherit"><tbody>{rows}</tbody></table>'
            f'<div style="opacity:.7">{said}</div></div>'
        )

    def _text(self) -> str:
        """For those who do not see HTML; times stand last, in brackets."""
        lines = [
            " ".join(filter(None, [f"{stage.name:>10}", stage.count, stage.note])) + f"  [{stage.time}]"
            for stage in self._stages
        ]
        return "\n".join([*filter(None, [self._title]), *lines, *self._lines()])

    def _lines(self) -> list[str]:
        hidden = len(self._said) - LINES
        return [*([f"… {hidden} lines before"] if hidden > 0 else []), *self._said[-LINES:]]


if in_notebook():
    # what models and data sets are fetched with warns, when first imported, where there are no widgets; text does as well
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("tqdm.auto")
