"""What table and words say follows from the verdict, and says no more than the intervals do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import recipe

from shoal.claim import claim_words
from shoal.report import markdown_table, result_rows, result_words
from shoal.run import evolve
from shoal.search import Comparison, Guard


def comparison(against: str, low: float, high: float) -> Comparison:
    return Comparison(against, (low + high) / 2, low, high, 400, None, "bca", error=(high - low) / 3.92)


class NoSplits:
    tasks = ()


def words(
    found: str, comparisons: list[Comparison], guards: list[Guard] | None = None, openings: int = 1
) -> str:
    overall = {c.against: c for c in comparisons}
    return claim_words(found, "mean@9", overall, 0.01, 400, guards or [], openings, NoSplits())  # type: ignore[arg-type]


AHEAD = [comparison("base", 0.05, 0.09), comparison("expert", 0.01, 0.03)]
HOLDS = Guard("safety", 0.02, "base", 0.0, -0.01, True, False)
OPEN = Guard("safety", 0.02, "base", -0.005, -0.031, False, False)
BROKEN = Guard("safety", 0.02, "base", -0.09, -0.12, False, True)


def test_the_words_of_each_verdict() -> None:
    assert words("beats", AHEAD).startswith("better than every parent and the uniform merge on 400 held-out")
    assert "at least +1.0 points over expert" in words("beats", AHEAD)
    worse = words("worse", [comparison("base", -0.09, -0.05), *AHEAD[1:]])
    assert worse.startswith("worse than base") and "-9.0 to -5.0" in worse
    assert "no difference larger than 1.0 points" in words("ties", [comparison("base", -0.01, 0.01)])
    short = words("underpowered", [comparison("base", -0.02, 0.04)])
    # 2.8 standard errors of 0.06 / 3.92
    assert "no improvement shown over base" in short and "400 test items show 4.3 points" in short
    assert "opened 2 times" in words("ties", [comparison("base", -0.01, 0.01)], openings=2)


def test_a_guard_is_named_whether_it_holds_or_not() -> None:
    assert words("beats", AHEAD, [HOLDS]).endswith(
        "guard safety: +0.0 points to base, a loss above 2.0 points is excluded"
    )
    not_shown = words("underpowered", AHEAD, [HOLDS, OPEN])
    assert not_shown.startswith("guard safety: -0.5 points to base, a loss above 2.0 points is not excluded")
    assert "it may be 3.1 points" in not_shown and "so not a better model" in not_shown
    lost = words("worse", AHEAD, [OPEN, BROKEN])
    assert lost.startswith("guard safety: -9.0 points to base, more than the 2.0 points that it may lose")
    assert "better than every parent" not in not_shown + lost


def result(verdict: str, **changes: Any) -> dict[str, Any]:
    def baseline(name: str, kind: str, score: float, searched: float | None) -> dict[str, Any]:
        tasks = {"sums": score, "words": score}
        return {"name": name, "kind": kind, "score": score, "search_score": searched, "tasks": tasks}

    def compared(against: str, difference: float, **rest: Any) -> dict[str, Any]:
        low, high = difference - 0.02, difference + 0.02
        return {"against": against, "difference": difference, "low": low, "high": high, "n": 200} | rest

    return {
        "name": "demo",
        "verdict": verdict,
        "claim": "what was found",
        "winner": {
            "id": "mean@9",
            "score": 0.70,
            "search_score": 0.75,
            "select_score": 0.73,
            "tasks": {"sums": 0.8, "words": 0.6},
        },
        "baselines": [
            baseline("base", "parent", 0.60, 0.59),
            baseline("uniform merge", "uniform", 0.66, 0.67),
        ],
        "comparisons": [
            compared("base", 0.10, method="bca"),
            compared("base", 0.20, task="sums", wins=50, losses=10, p=1e-7, test="mcnemar"),
            compared("uniform merge", 0.04, method="bca"),
            compared("uniform merge", 0.14, task="sums", wins=40, losses=12, p=0.0123, test="mcnemar"),
            compared("uniform merge", -0.06, task="words", wins=1.0, losses=2.0, p=0.5, test="sign flip"),
        ],
        "task_claims": [
            {"task": "sums", "against": "uniform merge", "difference": 0.14, "low": 0.0, "high": 0.2}
            | {"better": True, "worse": False},
            {"task": "words", "against": "uniform merge", "difference": -0.06, "low": -0.1, "high": 0.0}
            | {"better": False, "worse": True},
        ],
        "cost": {"candidates": 9, "item_evaluations": 99}
        | {"seconds": {"total": 3.0, "merge": 1.0, "score": 1.0, "rest": 1.0}},
    } | changes


def test_search_and_test_score_stand_side_by_side() -> None:
    header, rows = result_rows(result("beats"))
    assert header == ["", "sums", "words", "overall", "on search items", "winner's lead", "95% interval"]
    assert rows[0] == ["base (parent)", "60.0", "60.0", "60.0", "59.0", "+10.0", "+8.0 to +12.0"]
    assert rows[-1][3:5] == ["70.0", "75.0"]
    (line,) = [w for w in result_words(result("beats")) if w.startswith("search score")]
    assert line == (
        "search score 75.0, selection 73.0, test 70.0; lead over the best baseline +8.0 on search items, +4.0 on"
        " test items"
    )
    bare = result("beats")
    bare["baselines"][0]["search_score"] = None
    assert result_rows(bare)[1][0][4] == ""
    assert "search score 75.0, selection 73.0, test 70.0" in result_words(bare)


def test_a_task_is_called_better_beside_a_beats_only() -> None:
    def line(verdict: str) -> str:
        (found,) = [w for w in result_words(result(verdict)) if w.startswith("by task")]
        return found

    assert "sums +14.0 (+0.0 to +20.0) to uniform merge: better" in line("beats")
    assert "better" not in line("underpowered") and "words -6.0" in line("underpowered")
    assert line("underpowered").endswith("uniform merge: worse")
    assert not [w for w in result_words(result("ties", task_claims=[])) if w.startswith("by task")]


def test_mcnemar_stands_beside_metrics_that_are_0_or_1() -> None:
    (line,) = [w for w in result_words(result("beats")) if "McNemar" in w]
    assert line.endswith("closest baseline: sums 40 won, 12 lost to uniform merge, p = 0.012")


def test_who_was_disqualified_is_said_with_the_reason() -> None:
    def lines(**guard: Any) -> list[str]:
        sanity = {"written": {}, "disqualified": {}, "unchecked": {}} | guard
        return [
            w for w in result_words(result("ties", sanity=sanity)) if "disqualified" in w or "sanity" in w
        ]

    assert lines() == []
    assert lines(disqualified={"mean@9": "ends 0 of 16 texts, parents 16"}) == [
        "disqualified by what it writes to fixed prompts: mean@9: ends 0 of 16 texts, parents 16"
    ]
    unchecked = {"mean@9": "the worker cannot generate", "base": "the worker cannot generate"}
    assert lines(unchecked=unchecked) == [
        "sanity guard: mean@9, base were not asked to write: the worker cannot generate"
    ]
    text = claim_words(
        "ties",
        "base",
        {c.against: c for c in [comparison("base", 0.0, 0.0), AHEAD[1]]},
        0.01,
        400,
        [],
        1,
        NoSplits(),  # type: ignore[arg-type]
        ["mean@9"],
    )
    assert text.endswith(
        "no merge among the finalists that could be chosen did better there (disqualified: mean@9)"
    )


def test_an_end_that_is_not_known_is_said_to_be_unknown() -> None:
    unknown = result("underpowered")
    unknown["comparisons"][0] |= {"low": None, "high": None, "method": "none"}
    assert result_rows(unknown)[1][0][-1] == "unknown"
    assert "unknown" in markdown_table(unknown)


@pytest.mark.parametrize("max_drop", [0.0001, 1.5])
def test_a_guard_of_the_recipe_is_tested_at_the_end(pico: Any, tmp_path: Path, max_drop: float) -> None:
    """Nothing can show a loss under 0.01 points on pico's few items, and no accuracy falls by more than 1."""
    tasks = [dict(task) for task in pico.recipe()["tasks"]]
    tasks[0]["max_drop"] = max_drop
    found = evolve(recipe(pico, tasks=tasks), tmp_path / "run", device="cpu")
    if found["winner"]["id"] in {b["name"] for b in found["baselines"] if b["kind"] == "parent"}:
        assert found["guards"] == []
        return
    (guard,) = found["guards"]
    assert guard["task"] == tasks[0]["task"] and guard["max_drop"] == max_drop
    assert guard["low"] <= guard["difference"]
    per_task = [c for c in found["comparisons"] if c.get("task") == guard["task"]]
    assert guard["difference"] in {c["difference"] for c in per_task}
    assert guard["holds"] == (guard["low"] > -max_drop)
    if max_drop > 1:
        assert guard["holds"]
    elif not guard["holds"]:
        assert found["verdict"] != "beats"
