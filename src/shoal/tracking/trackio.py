"""trackio: a local database, or the Space or server that its own variables name (TRACKIO_SPACE_ID, TRACKIO_SERVER_URL)."""

from __future__ import annotations

import contextlib
import io
import secrets
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shoal.tracking.ending import Ending
from shoal.tracking.marks import Mark, Marks
from shoal.tracking.tracker import About, Unsent

PROJECT = "shoal"


def check() -> None:
    """Raises ImportError where the package is missing."""
    from trackio import finish, init  # noqa: F401


class Trackio:
    """One run there per run here. trackio resumes by name, so the name has an id behind it, kept in RUN/tracking.json."""

    def __init__(self, run: Path, about: About, marks: Marks) -> None:
        import trackio

        mark = marks.get("trackio")
        if mark is None:
            mark = Mark(f"{about.name}-{secrets.token_hex(3)}", PROJECT)
            marks.put("trackio", mark)
        with _quiet() as self._heard:
            self._run: Any = trackio.init(
                project=PROJECT,
                name=mark.id,
                config={**about.config, "recipe_yaml": about.recipe},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        # it writes in the background: what it holds is what it says, and the mark only where it does not
        self.last = int(getattr(self._run, "_next_step", mark.step + 1)) - 1
        self.words = f"run {mark.id}, trackio show --project {PROJECT}"

    def point(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def end(self, ending: Ending) -> None:
        from trackio import Markdown

        texts = {
            "result/verdict": Markdown("\n\n".join(ending.words)),
            "result/table": Markdown(ending.table),
        }
        self._run.log({**ending.numbers, **texts}, step=ending.step)

    def close(self, finished: bool) -> None:
        import trackio

        with _quiet() as heard:
            trackio.finish()
        lost = [*self._heard, *heard, *sorted(getattr(self._run, "_warned_failures", ()))]
        if lost:
            raise Unsent(lost[0])


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Its lines off the terminal, where the run's own progress is; what it warns of is told to the caller."""
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning)
        try:
            yield heard
        finally:
            heard += [str(one.message) for one in caught]
