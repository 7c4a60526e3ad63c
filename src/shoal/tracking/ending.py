"""What is sent of a finished run, from its result: verdict, table with intervals, shrinkage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.report import markdown_table, result_rows, result_words

Entry = Mapping[str, str | float | None]


@dataclass(frozen=True)
class Ending:
    """The result of a run. step: item evaluations of the whole run.

    words: as printed at the end of a run. cells: the table as printed there, header first; table: the same in Markdown.
    entries: the same as numbers, by name of parent, uniform merge and winner: scores are on test items, the 95% interval of
    the winner's lead is from low to high. numbers: what is one number, such as the shrinkage, search score minus test score.
    """

    step: int
    verdict: str
    words: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    table: str
    entries: Mapping[str, Entry]
    numbers: Mapping[str, float]


def ending_of(result: dict[str, Any], step: int, clean: Callable[[str], str]) -> Ending:
    """result: content of result.json. clean: what every text goes through."""
    winner, cost = result["winner"], result["cost"]
    header, rows = result_rows(result)
    numbers = {
        "result/score": winner["score"],
        "result/search_score": winner["search_score"],
        "result/select_score": winner["select_score"],
        "result/shrinkage": winner["shrinkage"],
        "result/candidates": cost["candidates"],
        "result/failed": cost["failed"],
        "result/item_evaluations": cost["item_evaluations"],
        "result/seconds": cost["seconds"]["total"],
        "result/test_items": result["test_items"],
        "result/test_openings": result["test_openings"],
    }
    return Ending(
        step=step,
        verdict=result["verdict"],
        words=tuple(clean(line) for line in result_words(result)),
        cells=tuple(tuple(clean(cell) for cell in row) for row in (header, *rows)),
        table=clean(markdown_table(result)),
        entries={clean(name): entry for name, entry in _entries(result)},
        numbers=numbers,
    )


def _entries(result: dict[str, Any]) -> list[tuple[str, Entry]]:
    leads = {c["against"]: c for c in result["comparisons"] if "task" not in c}
    found: list[tuple[str, Entry]] = []
    for entry in result["baselines"]:
        lead = leads[entry["name"]]
        shown = {key: entry[key] for key in ("kind", "score", "search_score")}
        shown |= {"lead": lead["difference"], "low": lead["low"], "high": lead["high"]}
        found.append((entry["name"], shown | entry["tasks"]))
    winner = result["winner"]
    shown = {"kind": winner["id"], "score": winner["score"], "search_score": winner["search_score"]}
    return [*found, ("winner", shown | winner["tasks"])]
