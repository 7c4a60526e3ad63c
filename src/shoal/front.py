"""How a front is shown: its table, the words under it, and for two tasks a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shoal.pareto import BASELINES, Entry, Front, Place

PLOT = "front.png"
WIDE, HIGH = 55.0, 11.0  # of a label, in pixels


def scale_of(front: Front, task: str) -> float:
    """100 where the baselines' scores of a task are shares, which are shown in percent, else 1.

    All but the anchor's may leave [0, 1] by at most 1: they are the anchor's and a difference, estimated from a few items.
    """
    shares = {e.id: e.places[task].score for e in front.entries if e.kind in BASELINES}
    is_share = 0 <= shares[front.anchor] <= 1 and all(-1 <= score <= 2 for score in shares.values())
    return 100.0 if is_share else 1.0


def front_rows(front: Front, everyone: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the front, or everyone, each task's score and the interval of its difference to the anchor."""
    header = [
        "candidate",
        *(head for task in front.tasks for head in (task, f"over {front.anchor}")),
        "items",
        "front",
    ]
    rows = []
    for entry in front.entries:
        if not (everyone or entry.front):
            continue
        cells = [entry.id]
        for task in front.tasks:
            place, scale = entry.places[task], scale_of(front, task)
            cells.append(f"{scale * place.score:.{1 if scale > 1 else 3}f}")
            cells.append("anchor" if entry.id == front.anchor else _interval(place, scale))
        standing = "yes" if entry.front else "possible" if entry.possible else f"no ({entry.dominated_by})"
        if entry.disqualified is not None:
            standing = "disqualified"
        counts = sorted({entry.places[task].items for task in front.tasks})
        rows.append([*cells, " / ".join(map(str, counts)), standing])
    return header, rows


def _interval(place: Place, scale: float) -> str:
    digits = 1 if scale > 1 else 3
    gain, low, high = (f"{scale * x:+.{digits}f}" for x in (place.gain, place.low, place.high))
    return f"{gain} ({low} to {high})"


def front_words(front: Front) -> list[str]:
    """The lines under the table."""
    members, possible = front.members(), front.possible()
    turned_away = [entry for entry in front.entries if entry.disqualified is not None]
    sure = len(front.entries) - len(possible) - len(turned_away)
    counts = (
        f"{len(members)} of {len(front.entries)} candidates are on the front by their scores; by their 95% intervals"
        f" {len(possible)} could be, and {sure} cannot"
    )
    measures = ", ".join(f"{task} by {front.measures[task]}" for task in front.tasks)
    lines = [
        counts,
        f"scores: {measures}, on {front.role} items; intervals are of the paired difference to {front.anchor}",
    ]
    if front.role == "search":
        lines.append(
            "candidates were bred on these items, and the best of many looks better than it is: --role select shows the"
            " finalists on others"
        )
    if front.role == "test":
        lines.append("a choice by test scores uses the test items up: it needs others for its claim")
    for entry in turned_away:
        lines.append(f"{entry.id} is disqualified by what it writes: {entry.disqualified}")
    if front.failed:
        lines.append(f"{front.failed} failed candidates are left out")
    lines.append(f"a model of one: shoal merge {front.run} --candidate ID -o DIR")
    return lines


def write_plot(front: Front, path: Path) -> Path:
    """The front over its two tasks as PNG: everyone, the front with its intervals, the baselines by name."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    x, y = front.tasks
    factor = {task: scale_of(front, task) for task in front.tasks}
    figure, axes = pyplot.subplots(figsize=(7, 5.5), layout="constrained")

    def at(entries: Sequence[Entry], task: str) -> list[float]:
        return [factor[task] * entry.places[task].score for entry in entries]

    groups = (
        (
            "dominated for sure, or disqualified",
            "#c3cad3",
            [e for e in front.entries if not e.possible],
        ),
        ("could be on the front", "#7a8ca0", [e for e in front.entries if e.possible and not e.front]),
    )
    for label, colour, entries in groups:
        if entries:
            axes.scatter(at(entries, x), at(entries, y), s=18, color=colour, linewidths=0, label=label)
    members = sorted(front.members(), key=lambda e: e.places[x].score)
    axes.errorbar(
        at(members, x),
        at(members, y),
        xerr=_errors(front, members, x),
        yerr=_errors(front, members, y),
        fmt="o-",
        ms=5,
        lw=1.2,
        elinewidth=0.7,
        color="#0b6e4f",
        ecolor="#9cc5b5",
        label=f"front (95% intervals of the difference to {front.anchor})",
    )
    baselines = [e for e in front.entries if e.kind in BASELINES]
    axes.scatter(
        at(baselines, x), at(baselines, y), s=60, marker="D", facecolors="none", edgecolors="#d1495b",
        linewidths=1.5, label="parents and uniform merge", zorder=3,
    )  # fmt: skip
    labelled: list[tuple[float, float]] = []
    for entry in {e.id: e for e in [*baselines, *members]}.values():
        point = (at([entry], x)[0], at([entry], y)[0])
        here = tuple(float(v) for v in axes.transData.transform(point))
        # ids are in the table: one that would be written over another is left out
        if any(abs(here[0] - there[0]) < WIDE and abs(here[1] - there[1]) < HIGH for there in labelled):
            continue
        labelled.append((here[0], here[1]))
        axes.annotate(entry.id, point, textcoords="offset points", xytext=(5, 5), fontsize=7)
    axes.set_xlabel(_axis(front, x))
    axes.set_ylabel(_axis(front, y))
    axes.set_title(f"Candidates on {front.role} items", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _axis(front: Front, task: str) -> str:
    unit = ", %" if scale_of(front, task) > 1 else ""
    return f"{task} ({front.measures[task]}{unit}{'' if front.higher[task] else ', lower is better'})"


def _errors(front: Front, entries: Sequence[Entry], task: str) -> list[list[float]]:
    """[2, n]: how far the interval reaches below and above the score."""
    factor = scale_of(front, task)
    worse = [max(0.0, factor * (e.places[task].gain - e.places[task].low)) for e in entries]
    better = [max(0.0, factor * (e.places[task].high - e.places[task].gain)) for e in entries]
    return [worse, better] if front.higher[task] else [better, worse]
