"""What the page says in words. Verdict and claim are the result's own; nothing here adds to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.page.data import Page
from shoal.page.state import Stage

_VERDICTS = {
    "beats": ("good", "✓", "Improvement shown"),
    "ties": ("even", "=", "No difference that counts"),
    "worse": ("bad", "✗", "Worse"),
    "underpowered": ("even", "?", "No improvement shown"),
}
_STAGES: Mapping[Stage, str] = {
    "loading": "loading models and tasks",
    "anchors": "scoring parents and uniform merge on search items",
    "search": "searching",
    "selection": "choosing among finalists",
    "test": "scoring winner, parents and uniform merge on test items",
}


@dataclass(frozen=True)
class Banner:
    """tone: good, even, bad or open, which decides the colour; mark: the same as a sign; head and text: in words."""

    tone: str
    mark: str
    head: str
    text: str


def banner(page: Page) -> Banner:
    """The first thing that the page says."""
    if page.result is not None:
        return _verdict(page.result)
    state = page.state
    told, planned = state.generations
    done = f"{told} of {'at most ' if page.lock.stages else ''}{planned} generations told"
    if state.kind == "running":
        return Banner(
            "open", "…", "Still going on", f"{_first(_STAGES[state.stage])}; {done}. {_so_far(page)}"
        )
    if state.reason:
        head, reason = "Stopped before its end", f"{_first(state.reason)}. "
    else:
        head, reason = "Stopped before its end", "Why is not in its journal. "
    return Banner(
        "bad",
        "■",
        head,
        f"{reason}It was {_STAGES[state.stage]}; {done}. {_so_far(page)} What was finished is kept: the command that"
        " started it goes on from there.",
    )


def _verdict(result: Mapping[str, Any]) -> Banner:
    found = str(result["verdict"])
    tone, mark, head = _VERDICTS.get(found, ("even", "·", _first(found)))
    if found == "ties" and any(b["name"] == result["winner"]["id"] for b in result["baselines"]):
        head = "No improvement"
    return Banner(tone, mark, head, f"{_first(str(result['claim']))}.")


def _so_far(page: Page) -> str:
    """No result is promised by a search score, and the page says so."""
    if not page.course.points:
        if page.failures and page.state.stage in ("search", "selection", "test"):
            return "Every candidate so far has failed."
        return "No candidate has been scored to the end yet."
    return (
        "The scores below are on search items and promise more than test items keep; there is no verdict yet."
    )


def _first(text: str) -> str:
    return text[:1].upper() + text[1:]


def unit(page: Page) -> str:
    """In what fitness is counted."""
    return "points" if page.lock.search.scale == "unit" else "spreads of the anchors"


def factor(page: Page) -> float:
    return 100.0 if page.lock.search.scale == "unit" else 1.0


def plot_words(page: Page) -> dict[str, str]:
    """What each plot shows, for those who do not see it; figure -> words."""
    course, found = page.course, dict[str, str]()
    if course.points:
        best = course.best[-1]
        found["search"] = (
            f"Fitness of {len(course.points)} candidates over item evaluations. The best so far rises to"
            f" {factor(page) * best[1]:+.1f} {unit(page)} over the best anchor after {best[0]:,} item evaluations; the mean"
            f" of the last generation is {factor(page) * course.means[-1][1]:+.1f}."
        )
    if page.result is not None:
        found["differences"] = "The winner's lead over each baseline with its 95% interval: " + "; ".join(
            f"{c['against']} {_lead(c)}" for c in page.result["comparisons"] if "task" not in c
        )
        found["tasks"] = "The same, task by task; the table below the plot has the numbers."
    if page.front is not None:
        members = ", ".join(entry.id for entry in page.front.members()[:12])
        found["front"] = (
            f"{len(page.front.entries)} candidates by their scores on two tasks; on the front by all tasks: {members}"
        )
    for index, shown in enumerate(page.weights):
        values = [v for row in shown.values for v in row if v is not None]
        if values:
            of = f" of {shown.model}" if shown.model else ""
            found[f"weights{index}"] = (
                f"{shown.parameter}{of} by tensor type and layer, from {min(values):.2f} to {max(values):.2f}; the table"
                " below has all values."
            )
    return found


def _lead(c: Mapping[str, Any]) -> str:
    return f"{100 * c['difference']:+.1f} points ({interval(c)})"


def interval(c: Mapping[str, Any]) -> str:
    if c["low"] is None or c["high"] is None:
        return "unknown"
    return f"{100 * c['low']:+.1f} to {100 * c['high']:+.1f}"


def duration(seconds: float) -> str:
    """1.2 s, 4 min 05 s, 3 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
