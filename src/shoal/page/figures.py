"""The page's plots, as Plotly figures in JSON. Colours are names of the page's own (`var(--winner)`), which its script
replaces by those of the reader's scheme, so that a plot is readable in light, in dark and in print.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from shoal.front import scale_of
from shoal.page.data import Page
from shoal.page.weights import WeightMap
from shoal.page.words import factor, unit
from shoal.pareto import BASELINES, Entry, Front

INK, MUTED, GRID = "var(--ink)", "var(--muted)", "var(--grid)"
WINNER, PARENT, UNIFORM, CANDIDATE = "var(--winner)", "var(--parent)", "var(--uniform)", "var(--candidate)"
MOST_PAIRS = 21  # of tasks, for trade-offs: seven tasks


def figures(page: Page) -> dict[str, str]:
    """Name -> figure as JSON that may stand in an HTML script element."""
    return {name: embedded(figure) for name, figure in _figures(page)}


def _figures(page: Page) -> Iterator[tuple[str, Any]]:
    if page.course.points:
        yield "search", search(page)
    if page.result is not None:
        overall = [c for c in page.result["comparisons"] if "task" not in c]
        yield "differences", differences(overall, page.result["baselines"], page.result["margin"])
        if len(page.lock.tasks) > 1:
            yield "tasks", by_task(page.result, [task.task for task in page.lock.tasks])
    if page.front is not None:
        winner = "" if page.result is None else str(page.result["winner"]["id"])
        for first, second in pairs(page.front):
            yield f"front-{first}-{second}", front(page.front, first, second, winner)
    top = {
        name: max((abs(v) for m in page.weights if m.parameter == name for v in _values(m)), default=1.0)
        for name in {m.parameter for m in page.weights}
    }
    for index, shown in enumerate(page.weights):
        if shown.constant is None and shown.layers:
            yield f"weights{index}", heat_map(shown, top[shown.parameter] or 1.0)


def pairs(front: Front) -> list[tuple[int, int]]:
    """Pairs of tasks that are drawn, by position."""
    return list(combinations(range(len(front.tasks)), 2))[:MOST_PAIRS]


def embedded(figure: Any) -> str:
    """JSON without a character that ends a script element or begins a comment in one."""
    text = json.dumps(json.loads(figure.to_json()), ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def label(text: str) -> str:
    """A name as Plotly shows it literally: it reads some HTML in texts."""
    return html.escape(text, quote=False)


def _new(height: int, **layout: Any) -> Any:
    import plotly.graph_objects as go

    # an empty template: Plotly's own is 7 kB of colours that are not ours
    figure = go.Figure(layout={"template": {}, "height": height})
    axis = {
        "gridcolor": GRID,
        "zerolinecolor": GRID,
        "linecolor": MUTED,
        "tickcolor": MUTED,
        "automargin": True,
        "fixedrange": False,
    }
    figure.update_layout(
        font={"color": INK, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        hoverlabel={"bgcolor": "var(--card)", "bordercolor": MUTED, "font": {"color": INK}},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "font": {"color": INK}},
        **layout,
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def search(page: Page) -> Any:
    """Fitness of every candidate, mean of its generation and best so far over item evaluations."""
    course, scale = page.course, factor(page)
    figure = _new(380)
    figure.add_scatter(
        x=[p.cost for p in course.points],
        y=[scale * p.fitness for p in course.points],
        customdata=[[label(p.candidate), p.generation] for p in course.points],
        hovertemplate="%{customdata[0]}: %{y:+.1f} after %{x:,} item evaluations<extra></extra>",
        mode="markers",
        name="candidates",
        marker={"color": CANDIDATE, "size": 6, "opacity": 0.75},
    )
    figure.add_scatter(
        x=[cost for cost, _ in course.means],
        y=[scale * value for _, value in course.means],
        hovertemplate="generation mean: %{y:+.1f}<extra></extra>",
        mode="lines",
        name="mean of a generation",
        line={"color": MUTED, "width": 2, "dash": "dot"},
    )
    figure.add_scatter(
        x=[cost for cost, _ in course.best],
        y=[scale * value for _, value in course.best],
        hovertemplate="best so far: %{y:+.1f}<extra></extra>",
        mode="lines",
        name="best so far",
        line={"color": WINNER, "width": 3, "shape": "hv"},
    )
    figure.add_hline(y=0, line={"color": INK, "width": 1.5, "dash": "dash"})
    for change in course.changes:
        figure.add_vline(x=change.cost, line={"color": MUTED, "width": 1, "dash": "dash"})
    figure.update_xaxes(title_text="item evaluations", tickformat="~s", rangemode="tozero")
    figure.update_yaxes(title_text=f"gain over the best anchor, {unit(page)}", range=_without_tail(page))
    return figure


def _without_tail(page: Page) -> list[float]:
    """A few hopeless candidates must not flatten the rest of the plot; zooming out shows them."""
    values = sorted(factor(page) * p.fitness for p in page.course.points)
    low, high = min(values[len(values) // 20], 0.0), max(values[-1], 0.0)
    pad = 0.08 * (high - low or 1.0)
    return [low - pad, high + pad]


def differences(
    comparisons: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]], margin: float
) -> Any:
    """The winner's paired lead over each baseline in points, with intervals; the band is the margin of a tie."""
    kinds = {b["name"]: b["kind"] for b in baselines}
    figure = _new(120 + 44 * len(comparisons), showlegend=False)
    figure.add_vrect(
        x0=-100 * margin, x1=100 * margin, fillcolor=GRID, opacity=0.7, line_width=0, layer="below"
    )
    figure.add_vline(x=0, line={"color": INK, "width": 1.5})
    for c in comparisons:
        _whisker(figure, c, f"{c['against']}", PARENT if kinds.get(c["against"]) == "parent" else UNIFORM)
    figure.update_xaxes(title_text="winner's lead, points (95% interval)", zeroline=False)
    figure.update_yaxes(range=[len(comparisons) - 0.5, -0.5], type="category")
    return figure


def _whisker(figure: Any, c: Mapping[str, Any], name: str, colour: str, **place: Any) -> None:
    known = c["low"] is not None and c["high"] is not None
    middle = 100 * c["difference"]
    hover = f"{label(name)}: %{{x:+.1f}} points"
    hover += f" ({100 * c['low']:+.1f} to {100 * c['high']:+.1f})" if known else " (interval unknown)"
    figure.add_scatter(
        x=[middle],
        y=[label(name)],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [100 * c["high"] - middle if known else 0],
            "arrayminus": [middle - 100 * c["low"] if known else 0],
            "color": colour,
            "thickness": 2.5,
            "width": 6,
        },
        hovertemplate=f"{hover}<extra></extra>",
        mode="markers",
        name=label(name),
        marker={"color": colour, "size": 10, "symbol": "diamond" if colour == UNIFORM else "circle"},
        **place,
    )


def by_task(result: Mapping[str, Any], tasks: Sequence[str]) -> Any:
    """The same for each task, one panel above the other."""
    from plotly.subplots import make_subplots

    kinds = {b["name"]: b["kind"] for b in result["baselines"]}
    found = [[c for c in result["comparisons"] if c.get("task") == task] for task in tasks]
    figure = make_subplots(
        rows=len(tasks),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=min(0.09, 0.3 / len(tasks)),
        subplot_titles=[label(task) for task in tasks],
    )
    shell = _new(70 + len(tasks) * (48 + 30 * len(kinds)), showlegend=False).layout
    figure.update_layout(shell)
    figure.update_layout(margin={"t": 34})
    for row, comparisons in enumerate(found, start=1):
        for c in comparisons:
            colour = PARENT if kinds.get(c["against"]) == "parent" else UNIFORM
            _whisker(figure, c, c["against"], colour, row=row, col=1)
        figure.add_vline(x=0, line={"color": INK, "width": 1.5}, row=row, col=1)
    axis = {"gridcolor": GRID, "zeroline": False, "automargin": True, "linecolor": MUTED, "tickcolor": MUTED}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis, range=[len(kinds) - 0.5, -0.5], type="category")
    figure.update_xaxes(title_text="winner's lead, points (95% interval)", row=len(tasks), col=1)
    # titles of panels stand at the left, where names are read
    figure.update_annotations(x=0, xanchor="left", font={"color": INK, "size": 14})
    return figure


def front(found: Front, first: int, second: int, winner: str) -> Any:
    """Every candidate by two tasks, on search items; better is up and to the right whatever the metric."""
    x, y = found.tasks[first], found.tasks[second]
    figure = _new(460)
    others = [e for e in found.entries if e.kind not in BASELINES and e.id != winner]
    groups = (
        ("clearly dominated", [e for e in others if not e.possible], CANDIDATE, "circle", 6, 0.45),
        (
            "could be on the front",
            [e for e in others if e.possible and not e.front],
            CANDIDATE,
            "circle",
            8,
            1.0,
        ),
        ("on the front", [e for e in others if e.front], WINNER, "circle", 9, 1.0),
        ("parents", [e for e in found.entries if e.kind == "parent"], PARENT, "square", 12, 1.0),
        ("uniform merge", [e for e in found.entries if e.kind == "uniform"], UNIFORM, "diamond", 13, 1.0),
        (
            "winner",
            [e for e in found.entries if e.id == winner and e.kind not in BASELINES],
            WINNER,
            "star",
            16,
            1.0,
        ),
    )
    for name, entries, colour, symbol, size, opacity in groups:
        if entries:
            figure.add_scatter(
                x=[_shown(found, e, x) for e in entries],
                y=[_shown(found, e, y) for e in entries],
                customdata=[[label(e.id), _gain(found, e, x), _gain(found, e, y)] for e in entries],
                hovertemplate=f"%{{customdata[0]}}<br>{label(x)}: %{{customdata[1]}}<br>{label(y)}: %{{customdata[2]}}"
                "<extra></extra>",
                mode="markers+text" if name == "parents" else "markers",
                text=[label(e.id) for e in entries] if name == "parents" else None,
                textposition="top center",
                textfont={"size": 12, "color": INK},
                name=name,
                cliponaxis=False,
                marker={
                    "color": colour,
                    "symbol": symbol,
                    "size": size,
                    "opacity": opacity,
                    "line": {"color": "var(--card)", "width": 1},
                },
            )
    for axes, task in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        axes(
            title_text=f"{label(task)} ({label(found.measures[task])}{_percent(found, task)})",
            autorange=True if found.higher[task] else "reversed",
        )
    return figure


def _percent(found: Front, task: str) -> str:
    return ", %" if scale_of(found, task) > 1 else ""


def _shown(found: Front, entry: Entry, task: str) -> float:
    return scale_of(found, task) * entry.places[task].score


def _gain(found: Front, entry: Entry, task: str) -> str:
    place, scale = entry.places[task], scale_of(found, task)
    if entry.id == found.anchor:
        return f"{scale * place.score:.1f} (what gains are measured from)"
    return f"{scale * place.score:.1f} ({scale * place.gain:+.1f}, {scale * place.low:+.1f} to {scale * place.high:+.1f})"


def heat_map(shown: WeightMap, top: float) -> Any:
    """One parameter of one parent: tensor types over layers; colours reach from -top to top."""
    figure = _new(70 + 46 * len(shown.types))
    figure.add_heatmap(
        x=list(shown.layers),
        y=[label(kind) for kind in shown.types],
        z=[list(row) for row in shown.values],
        zmin=-top,
        zmax=top,
        zmid=0,
        xgap=1,
        ygap=1,
        colorscale=[[0, "var(--heat-low)"], [0.5, "var(--heat-mid)"], [1, "var(--heat-high)"]],
        colorbar={
            "thickness": 12,
            "outlinewidth": 0,
            "tickfont": {"color": INK},
            "nticks": 5,
            "len": 1.0,
        },
        hovertemplate=f"layer %{{x}}, %{{y}}: %{{z:.3f}}<extra>{label(shown.model or shown.parameter)}</extra>",
        texttemplate="%{z:.2f}" if len(shown.layers) <= 12 else None,
        textfont={"color": INK, "size": 12},
    )
    figure.update_xaxes(
        title_text="layer",
        showgrid=False,
        zeroline=False,
        dtick=1 if len(shown.layers) <= 12 else None,
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return figure


def _values(shown: WeightMap) -> Iterator[float]:
    yield from (value for row in shown.values for value in row if value is not None)
