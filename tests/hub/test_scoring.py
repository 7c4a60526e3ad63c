"""Rules by which a metric is computed as data: the numbers of lm-eval's own tasks, or the reason why there is no rule."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from shoal.evals.catalogue import Catalogue, TaskSource
from shoal.hub.scoring import DataTask, Ruled, Scoring
from shoal.types import ROLES

CHOICE = {"output_type": "multiple_choice", "doc_to_choice": "{{options}}", "doc_to_target": "gold"}
WRITE: dict[str, Any] = {"output_type": "generate_until", "doc_to_target": "{{answer}}"}
NEXT = {"output_type": "loglikelihood", "doc_to_target": "{{answer}}"}
OPTIONS = ["A cat!", "Ünï", "c", "a cat 12"]


def metrics(*names: str, **options: Any) -> list[dict[str, Any]]:
    return [{"metric": n, "aggregation": "mean", "higher_is_better": True, **options} for n in names]


def source(folder: Path, **config: Any) -> TaskSource:
    """A task of its own on ten items."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(3)
    rows = [
        {
            "word": f"w{i}",
            "options": rng.sample(OPTIONS, 4),
            "gold": i % 4,
            "golds": [i % 4, (i + 1) % 4],
            "beyond": 3 + i % 3,
            "answer": rng.choice(OPTIONS),
            "answers": rng.sample(OPTIONS, 2),
            "number": i,
        }
        for i in range(10)
    ]
    for row in rows:
        row["named"] = row["options"][row["gold"]] if row["number"] % 3 else "none of them"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{word}}:",
        **config,
    }
    text = json.dumps(whole, indent=1).replace('"!function own.f"', "!function own.f")
    (folder / "own.yaml").write_text(text)
    (folder / "own.py").write_text("def f(doc, results=None):\n    return {'acc': 1.0}\n")
    return Catalogue(folder).load("own")


RULED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"{name} {gold}": (CHOICE | {"doc_to_target": gold, "metric_list": metrics(name)}, rule)
        for name, rule in (
            ("acc", "acc"),
            ("acc_norm", "acc_norm"),
            ("acc_bytes", "acc_bytes"),
            ("exact_match", "option"),
        )
        for gold in ("gold", "golds", "named", "beyond")
    },
    "greedy": (NEXT | {"metric_list": metrics("acc")}, "greedy"),
    "text": (WRITE | {"metric_list": metrics("exact_match")}, "exact_match"),
    "texts": (WRITE | {"doc_to_target": "answers", "metric_list": metrics("exact_match")}, "exact_match"),
    "a number": (WRITE | {"doc_to_target": "number", "metric_list": metrics("exact_match")}, "exact_match"),
    "an option": (
        CHOICE | WRITE | {"doc_to_target": "gold", "metric_list": metrics("exact_match")},
        "exact_match",
    ),
    "any case": (
        WRITE | {"metric_list": metrics("exact_match", ignore_case=True, ignore_punctuation=True)},
        "exact_match",
    ),
    "no digits": (WRITE | {"metric_list": metrics("exact_match", ignore_numbers=True)}, "exact_match"),
    "a filter that takes the first": (
        WRITE
        | {
            "metric_list": metrics("exact_match"),
            "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
        },
        "exact_match",
    ),
}


@pytest.mark.parametrize("case", list(RULED))
def test_a_rule_gives_what_lm_eval_gives(tmp_path: Path, case: str) -> None:
    config, rule = RULED[case]
    found = source(tmp_path / "own", **config)
    metric = found.metric(None).key
    ruled = Ruled(found, metric)
    assert (ruled.rule, ruled.why) == (rule, "")
    scoring = Scoring(rule=ruled.rule, ignore=ruled.ignore, answers=dict.fromkeys(ROLES, "0" * 64))
    task = DataTask("own", Scoring.model_validate_json(scoring.model_dump_json()), metric)
    assert [ensemble.name for ensemble in task._filters] == [metric.partition(",")[2]]
    rng, values = random.Random(5), set()
    for doc in found.docs("test"):
        answer = ruled.answer(doc)
        assert answer is not None
        answer = json.loads(json.dumps(answer))
        for _ in range(20):
            responses: list[Any] = [(-rng.random() * 9, rng.random() < 0.4) for _ in OPTIONS]
            if found.output_type == "loglikelihood":
                responses = responses[:1]
            if found.output_type == "generate_until":
                texts = [
                    *OPTIONS,
                    "A CAT",
                    "a cat",
                    str(doc["number"]),
                    *doc["answers"],
                    doc["answer"].upper(),
                ]
                responses = [rng.choice(texts)]
            expected = float(found.task.process_results(doc, responses)[metric.partition(",")[0]])
            assert task.process_results(answer, responses) == {metric.partition(",")[0]: expected}
            values.add(expected)
    assert values == {0.0, 1.0}


UNRULED: dict[str, tuple[dict[str, Any], str]] = {
    "code": (
        CHOICE | {"metric_list": metrics("acc"), "process_results": "!function own.f"},
        "code of its own",
    ),
    "a filter": (
        WRITE
        | {
            "metric_list": metrics("exact_match"),
            "filter_list": [
                {
                    "name": "digits",
                    "filter": [{"function": "regex", "regex_pattern": "(a)"}, {"function": "take_first"}],
                }
            ],
        },
        "filter picks answers",
    ),
    "patterns": (WRITE | {"metric_list": metrics("exact_match", regexes_to_ignore=["a+"])}, "patterns"),
    "samples": (WRITE | {"metric_list": metrics("exact_match"), "repeats": 2}, "several samples"),
    "mutual information": (CHOICE | {"metric_list": metrics("acc", "acc_mutual_info")}, "no continuations"),
    "a metric of pairs": (CHOICE | {"metric_list": metrics("brier_score")}, "has no rule"),
    "perplexity": (NEXT | {"metric_list": metrics("perplexity")}, "has no rule"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", list(UNRULED))
def test_where_there_is_no_rule_it_is_said_why(tmp_path: Path, case: str) -> None:
    config, why = UNRULED[case]
    found = source(tmp_path / "own", **config)
    ruled = Ruled(found, found.metric(None).key)
    assert ruled.rule is None and why in ruled.why
    assert ruled.answer(found.docs("test")[0]) is None


def test_an_item_that_lm_eval_would_score_oddly_has_no_answer(tmp_path: Path) -> None:
    """A negative index counts from the end where a greedy option is looked up, and nowhere else."""
    found = source(tmp_path / "own", **CHOICE, metric_list=metrics("exact_match"))
    ruled = Ruled(found, "exact_match,none")
    doc = found.docs("test")[0]
    assert ruled.answer(doc) is not None and ruled.answer(doc | {"gold": -1}) is None
