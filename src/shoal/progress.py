"""What a terminal shows of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from shoal.journal import EvaluationRow
    from shoal.preflight import Prepared


class Lines:
    """Plain lines: one per stage and generation, for logs and pipes."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self._evaluations: list[EvaluationRow] = []
        self._total = self._count = 0
        self._started = time.perf_counter()

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """What is no progress but must be known: on stderr where progress is hidden."""
        if self.quiet:
            print(text, file=sys.stderr)
        else:
            self.say(text)

    def begin(self, prepared: Prepared, done: int) -> None:
        self.say(
            f"{prepared.recipe.name}: {prepared.space.size} genes, {prepared.generations} generations of {prepared.lock.popsize}"
        )
        if done:
            self.say(f"continuing: {done} evaluations are in the journal")

    def stage(self, name: str, total: int) -> None:
        self._total, self._count, self._evaluations = total, 0, []
        self._started = time.perf_counter()
        self.say(f"{name}: {total} to score")

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None:
        self._count += 1
        self._evaluations.append(row)

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None:
        left = self._total - self._count
        spent = (time.perf_counter() - self._started) / max(1, self._count)
        self.say(
            f"generation {generation}: {summary(fitness)}; {_seconds(self._evaluations)}; about {left * spent:.0f} s left"
        )
        self._evaluations = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class Bars(Lines):
    """A live bar per stage: candidates, best and mean against the anchor, seconds per candidate, time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bars = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task: object | None = None
        self._note = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int) -> None:
        self._note = ""
        self._evaluations = []
        self._task = self._bars.add_task(name, total=total, note="")

    def evaluated(self, row: EvaluationRow, fitness: float | None) -> None:
        super().evaluated(row, fitness)
        recent = self._evaluations[-8:]
        self._bars.update(self._task, advance=1, note=f"{self._note}{_seconds(recent)}")  # type: ignore[arg-type]

    def told(self, generation: int, fitness: Mapping[str, float | None]) -> None:
        self._note = f"gen {generation}: {summary(fitness)}  "
        self._bars.update(self._task, note=self._note)  # type: ignore[arg-type]


def observer(console: Console, quiet: bool) -> Lines:
    """Bars on a terminal, lines elsewhere, nothing but warnings when quiet."""
    return Bars(console) if console.is_terminal and not quiet else Lines(console, quiet)


@contextmanager
def merging(console: Console, quiet: bool) -> Iterator[Callable[[int, int, int, int], None]]:
    """Progress of a merge to disk: a bar on a terminal, a line per quarter elsewhere.

    The callable takes tensors done, all tensors, bytes done, all bytes.
    """
    if quiet or not console.is_terminal:
        quarter = 0

        def line(done: int, tensors: int, size: int, total: int) -> None:
            nonlocal quarter
            if not quiet and done < tensors and 4 * size // max(1, total) > quarter:
                quarter = 4 * size // total
                console.print(
                    f"merged {done} of {tensors} tensors, {size / 1e9:.2f} of {total / 1e9:.2f} GB",
                    markup=False,
                    highlight=False,
                )

        yield line
        return
    columns = (
        TextColumn("merging"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("merging", total=None, note="planning")

        def advance(done: int, tensors: int, size: int, total: int) -> None:
            bars.update(bar, total=total, completed=size, note=f"{done}/{tensors} tensors")

        yield advance


def summary(fitness: Mapping[str, float | None]) -> str:
    """Best and mean of a generation against the best anchor, in units of the search's scale."""
    values = [value for value in fitness.values() if value is not None]
    failed = len(fitness) - len(values)
    text = f"best {max(values):+.3f} mean {sum(values) / len(values):+.3f}" if values else "all failed"
    return text + (f" ({failed} failed)" if failed and values else "")


def _seconds(rows: list[EvaluationRow]) -> str:
    if not rows:
        return ""
    merge, score, rest = (
        sum(getattr(row, name) for row in rows) / len(rows)
        for name in ("seconds_merge", "seconds_score", "seconds_rest")
    )
    return f"{merge + score + rest:.2f} s/candidate (merge {merge:.3f}, score {score:.2f}, rest {rest:.3f})"
