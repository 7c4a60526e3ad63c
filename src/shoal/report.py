"""What a run shows at its end: the table of parents, uniform merge and winner, and two plots as PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from shoal.errors import RunError
from shoal.folder import RunFolder
from shoal.journal import Journal
from shoal.lock import Lock
from shoal.preflight import restore
from shoal.recipe import Recipe

PLOTS = ("convergence.png", "weights.png")
_VERDICT_STYLE = {"beats": "bold green", "ties": "yellow", "worse": "bold red", "underpowered": "yellow"}


def load_result(run: Path) -> dict[str, Any]:
    """result.json of a finished run.

    Raises:
        RunError: there is none.
    """
    path = RunFolder(run).result
    if not RunFolder(run).done.is_file():
        raise RunError(f"{run}: no finished run here (expected {path.name}); continue it with `shoal evolve`")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def result_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table; scores in percent, differences in points with 95% intervals.

    Tasks and `overall` are on test items; `on search items` stands beside it, for what a search score promises and a
    test score does not keep. Empty where a baseline was not scored by the metric there.
    """
    tasks = list(result["winner"]["tasks"])
    overall = {c["against"]: c for c in result["comparisons"] if "task" not in c}
    header = ["", *tasks, "overall", "on search items", "winner's lead", "95% interval"]
    rows = []
    for entry in result["baselines"]:
        c = overall[entry["name"]]
        rows.append(
            [
                f"{entry['name']} ({entry['kind']})" if entry["kind"] == "parent" else entry["name"],
                *_scores(entry, tasks),
                f"{100 * c['difference']:+.1f}",
                _interval(c),
            ]
        )
    winner = result["winner"]
    rows.append([f"winner ({winner['id']})", *_scores(winner, tasks), "", ""])
    return header, rows


def _scores(entry: dict[str, Any], tasks: Sequence[str]) -> list[str]:
    searched = entry.get("search_score")
    return [
        *(f"{100 * entry['tasks'][task]:.1f}" for task in tasks),
        f"{100 * entry['score']:.1f}",
        "" if searched is None else f"{100 * searched:.1f}",
    ]


def _interval(c: dict[str, Any]) -> str:
    if c["low"] is None or c["high"] is None:
        return "unknown"
    return f"{100 * c['low']:+.1f} to {100 * c['high']:+.1f}"


def result_table(result: dict[str, Any]) -> Table:
    header, rows = result_rows(result)
    table = Table(title=f"{result['name']}: {result['test_items']} held-out test items", title_justify="left")
    table.add_column(header[0], no_wrap=True)
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1], style="bold")
    return table


def result_words(result: dict[str, Any]) -> list[str]:
    """The lines under the table: verdict and claim, who was disqualified, tasks, exact tests, search against test score, cost."""
    cost = result["cost"]
    seconds = cost["seconds"]
    return [
        f"verdict: {result['verdict']}: {result['claim']}",
        *_sanity_words(result),
        *_task_words(result),
        *_test_words(result),
        _shrinkage_words(result),
        "cost: "
        + f"{cost['candidates']} candidates, {cost['item_evaluations']} item evaluations, {seconds['total']:.0f} s"
        + f" (merge {seconds['merge']:.1f}, score {seconds['score']:.1f}, rest {seconds['rest']:.1f})",
    ]


def _sanity_words(result: dict[str, Any]) -> list[str]:
    """Who was turned away by the sanity guard, or that nobody was looked at; nothing where all write well."""
    guard = result.get("sanity")
    if guard is None:  # of a run before there was the guard
        return []
    lines = [
        f"disqualified by what it writes to fixed prompts: {name}: {reason}"
        for name, reason in guard["disqualified"].items()
    ]
    unchecked = guard["unchecked"]
    if unchecked:
        reasons = "; ".join(dict.fromkeys(unchecked.values()))
        lines.append(f"sanity guard: {', '.join(unchecked)} were not asked to write: {reasons}")
    return lines


def _task_words(result: dict[str, Any]) -> list[str]:
    """Per task, with intervals that hold together. "Better" on a task is said beside an overall `beats` only: tasks
    looked at after an overall claim that failed would be a second chance."""
    claims = result.get("task_claims", [])
    if not claims:
        return []
    parts = []
    for c in claims:
        said = "worse" if c["worse"] else "better" if c["better"] and result["verdict"] == "beats" else ""
        words = f"{c['task']} {100 * c['difference']:+.1f} ({_interval(c)}) to {c['against']}"
        parts.append(f"{words}: {said}" if said else words)
    return [f"by task, to its best baseline, 95% intervals that hold together (Holm): {'; '.join(parts)}"]


def _test_words(result: dict[str, Any]) -> list[str]:
    """Exact McNemar on the closest baseline of each 0/1 metric."""
    parts = []
    for task in result["winner"]["tasks"]:
        # an overall comparison of one task is that task's
        found = [c for c in result["comparisons"] if c.get("task") == task and c.get("test") == "mcnemar"]
        if found:
            c = min(found, key=lambda c: c["difference"])
            parts.append(f"{task} {c['wins']} won, {c['losses']} lost to {c['against']}, p = {_p(c['p'])}")
    return [f"exact McNemar test, two-sided, on the closest baseline: {'; '.join(parts)}"] if parts else []


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "under 0.001"


def _shrinkage_words(result: dict[str, Any]) -> str:
    """Search, select and test score of the winner, and how its lead over the best baseline shrank on the way."""
    winner = result["winner"]
    search, select, test = (100 * winner[k] for k in ("search_score", "select_score", "score"))
    text = f"search score {search:.1f}, selection {select:.1f}, test {test:.1f}"
    baselines = [b for b in result["baselines"] if b["name"] != winner["id"]]
    if not baselines or any(b.get("search_score") is None for b in baselines):
        return text
    leads = [
        100 * (winner[k] - max(b[of] for b in baselines))
        for k, of in (("search_score", "search_score"), ("score", "score"))
    ]
    return (
        f"{text}; lead over the best baseline {leads[0]:+.1f} on search items, {leads[1]:+.1f} on test items"
    )


def verdict_style(result: dict[str, Any]) -> str:
    return _VERDICT_STYLE[result["verdict"]]


def write_plots(run: Path) -> list[Path]:
    """convergence.png and weights.png of a run, in its folder."""
    folder = RunFolder(run)
    recipe, lock = folder.open()
    journal = Journal(folder.journal)
    try:
        return [_convergence(folder, lock, journal), *_heat_map(folder, recipe, lock, journal)]
    finally:
        journal.close()


def _figure(width: float, height: float) -> Any:
    """Figure and axes, without pyplot: a notebook's own backend and figures stay as they are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


def _convergence(folder: RunFolder, lock: Lock, journal: Journal) -> Path:
    figure, axes = _figure(7, 4)
    tells = journal.tells()
    points = [(g, f) for g, told in tells.items() for f in told.values() if f is not None]
    axes.scatter(
        [g + 1 for g, _ in points],
        [f for _, f in points],
        s=14,
        color="#7a8ca0",
        alpha=0.6,
        linewidths=0,
        label="candidates",
    )
    kept = {g: [f for f in told.values() if f is not None] for g, told in tells.items()}
    generations = [g for g in kept if kept[g]]
    axes.plot(
        [g + 1 for g in generations], [max(kept[g]) for g in generations], color="#0b6e4f", lw=2, label="best"
    )
    axes.plot(
        [g + 1 for g in generations],
        [sum(kept[g]) / len(kept[g]) for g in generations],
        color="#d1495b",
        lw=2,
        label="mean",
    )
    axes.axhline(0, color="black", lw=1, ls="--", label="best parent or uniform merge")
    if points:
        values = sorted(f for _, f in points)
        # a few hopeless candidates must not flatten the rest of the plot
        low = min(values[len(values) // 20], 0.0)
        span = max(values[-1], 0.0) - low or 1.0
        axes.set_ylim(low - 0.1 * span, max(values[-1], 0.0) + 0.1 * span)
    for event in journal.events("growth"):
        axes.axvline(event["generation"] + 0.5, color="#c3cad3", lw=1, zorder=0)
        axes.annotate(
            event["to"].partition(",")[0], (event["generation"] + 0.5, 1), xycoords=("data", "axes fraction"),
            xytext=(3, -3), textcoords="offset points", va="top", fontsize=7, color="#7a8ca0",
        )  # fmt: skip
    sizes = [lock.popsize, *(stage.popsize for stage in lock.stages)]
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"generation ({' or '.join(map(str, dict.fromkeys(sizes)))} candidates each)")
    unit = "in units of the score" if lock.search.scale == "unit" else "in spreads of the anchors"
    axes.set_ylabel(f"gain on search items\n({unit})")
    axes.set_title("Search progress", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, folder.path / "convergence.png")


def _heat_map(folder: RunFolder, recipe: Recipe, lock: Lock, journal: Journal) -> list[Path]:
    """The winner's parameters over layers; nothing where the winner has no genome (a parent, the uniform merge)."""
    result = load_result(folder.path)
    (folder.path / "weights.png").unlink(missing_ok=True)  # of an earlier winner
    row = journal.candidate(result["winner"]["id"])
    if row is None or row.genome is None:
        return []
    table = restore(recipe, lock).space_of(row.genome).values(np.array(row.genome))
    values = np.asarray(table.values, dtype=float)
    figure, axes = _figure(max(6.0, 1.6 + 0.42 * len(table.columns)), 1.4 + 0.5 * len(table.rows))
    top = float(np.nanmax(np.abs(values))) or 1.0
    image = axes.imshow(values, cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
    axes.set_xticks(range(len(table.columns)), table.columns, fontsize=8)
    axes.set_yticks(range(len(table.rows)), table.rows, fontsize=8)
    if len(table.columns) <= 16:
        _annotate(axes, values, top)
    axes.set_xlabel("layer")
    axes.set_title(f"The winner's parameters ({row.id})", loc="left")
    figure.colorbar(image, ax=axes, shrink=0.9)
    return [_save(figure, folder.path / "weights.png")]


def _annotate(axes: Any, values: Any, top: float) -> None:
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if not np.isnan(value):
                colour = "white" if abs(value) > 0.6 * top else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def markdown_table(result: dict[str, Any]) -> str:
    """The final table as Markdown, for README and docs/runs."""
    header, rows = result_rows(result)
    lines = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1)), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
