"""Fills the template: one HTML file with its style, its script, Plotly and the figures in it.

Plotly is most of the page, so it stands there compressed, and the page's script unpacks it.

Names, tasks and texts are other people's: Jinja escapes all of them, figures stand in the page as data, and a content
security policy by hash lets no other script run and nothing be loaded, whatever a text holds.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from shoal.lock import write_text
from shoal.page import words
from shoal.page.data import Decode, Page, gather
from shoal.page.figures import figures, pairs
from shoal.report import result_rows, result_words
from shoal.sanity import PROMPTS

NAME = "report.html"
_HERE = Path(__file__).parent


def write_page(
    run: Path,
    out: Path | None = None,
    *,
    item_text: bool = True,
    running: bool | None = None,
    reason: str = "",
    decode: Decode | None = None,
) -> Path:
    """Write the report of a run to `out` (default RUN/report.html), whole or not at all; returns where.

    A run without result has one too. item_text: look up the texts of the items that were gained and lost, which loads
    the run's tasks; without it the page has ids only. running, reason, decode: see `gather`.

    Raises:
        RunError: no run, or a journal that cannot be read. OSError: `out` cannot be written.
    """
    page = gather(run, item_text=item_text, running=running, reason=reason, decode=decode)
    out = out or run / NAME
    write_text(out, render(page))
    return out


def render(page: Page) -> str:
    """The page as HTML."""
    style, script, plotly = _asset("page.css"), _asset("page.js"), _plotly()
    drawn = figures(page)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(plotly)} {_hash(script)}",
            "style-src 'unsafe-inline'",  # Plotly sets styles itself
            "img-src data: blob:",  # a plot that is saved as picture
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    html: str = _template().render(
        page=page,
        result=page.result,
        rows=result_rows(dict(page.result)) if page.result is not None else None,
        said=result_words(dict(page.result))[1:] if page.result is not None else [],
        banner=words.banner(page),
        alt=words.plot_words(page),
        figures=drawn,
        pairs=pairs(page.front) if page.front is not None else [],
        recipe=page.recipe.to_yaml(),
        prompts=PROMPTS,
        words=words,
        policy=policy,
        style=style,
        script=script,
        plotly=_packed(plotly) if drawn else "",
    )
    return html


@lru_cache(maxsize=1)
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@lru_cache(maxsize=1)
def _packed(script: str) -> str:
    """gzip as base64: 2 MB instead of 5, by what every browser can unpack; the same bytes each time."""
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()


@lru_cache(maxsize=4)
def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@lru_cache(maxsize=4)
def _hash(script: str) -> str:
    """Of a script between its tags, as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@lru_cache(maxsize=1)
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}"
    return environment.get_template("page.html")
