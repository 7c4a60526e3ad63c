"""How responses become a task's claimed metric, as data: a rule of ours and what counts as right, item by item.

A task's YAML is code, so a publication cannot carry it. For the metrics that lm-eval computes by itself from responses and
a right answer, a name of the rule and the answer are enough. Where a task has code of its own, filters or another metric,
there is no rule, and why is said: then log-likelihoods can be compared, correctness cannot.

| rule | of | right, where |
| --- | --- | --- |
| greedy | loglikelihood, `acc` | the continuation is the greedy answer |
| acc, acc_norm, acc_bytes | multiple_choice | the best option is a right one (per character, per UTF-8 byte) |
| option | multiple_choice, `exact_match` | a right option is the greedy answer |
| exact_match | generate_until | the text is a right one; `ignore` as lm-eval's options of the same names |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from shoal.lock import Sha256
from shoal.recipe import Strict

if TYPE_CHECKING:
    from shoal.evals.catalogue import TaskSource

Rule = Literal["greedy", "acc", "acc_norm", "acc_bytes", "option", "exact_match"]
CHOICES = ("acc", "acc_norm", "acc_bytes", "option")
_CHOICE_RULES: Mapping[str, Rule] = {
    "acc": "acc",
    "acc_norm": "acc_norm",
    "acc_bytes": "acc_bytes",
    "exact_match": "option",
}
Ignored = Literal["case", "punctuation", "numbers"]


class Scoring(Strict):
    """How responses become the claimed metric of a task whose items are published.

    rule: see `shoal.hub.scoring`; None where only the task's own code can say, and `why`. answers: sha256, per role, over
    [item, its content hash, what counts as right] as compact JSON lines.
    """

    rule: Rule | None
    ignore: Annotated[tuple[Ignored, ...], Field(strict=False)] = ()
    why: str = ""
    answers: dict[Literal["search", "select", "test"], Sha256]


class Ruled:
    """How a metric of a task is computed, as far as it can be said as data. why: where it cannot, else empty."""

    def __init__(self, source: TaskSource, metric: str) -> None:
        self.rule: Rule | None = None
        self.ignore: tuple[Ignored, ...] = ()
        self._task = source.task
        self.why = self._settle(source, *metric.split(",", 1))

    def _settle(self, source: TaskSource, name: str, filter_name: str = "none") -> str:
        from lm_eval.api.task import ConfigurableTask

        task = self._task
        if type(task) is not ConfigurableTask or task.config.process_results is not None:
            return "the task computes it with code of its own"
        if not _plain_filter(task.config.filter_list, filter_name):
            return "its filter picks answers out of texts"
        if (task.config.repeats or 1) != 1:
            return "it is of several samples an item"
        metrics: Mapping[str, Any] = task._metric_fn_list
        if source.output_type == "loglikelihood" and name == "acc":
            self.rule = "greedy"
        elif source.output_type == "multiple_choice" and name in _CHOICE_RULES:
            if task.multiple_input or "acc_mutual_info" in metrics:
                return "its options are no continuations of one prompt"
            self.rule = _CHOICE_RULES[name]
        elif source.output_type == "generate_until" and name == "exact_match":
            return self._exact_match(metrics, task._metric_fn_kwargs.get(name) or {})
        return "" if self.rule else f"{name} of {source.output_type} has no rule"

    def _exact_match(self, metrics: Mapping[str, Any], options: Mapping[str, Any]) -> str:
        from lm_eval.api.registry import get_metric

        names: Mapping[str, Ignored] = {
            "ignore_case": "case",
            "ignore_punctuation": "punctuation",
            "ignore_numbers": "numbers",
        }
        if metrics["exact_match"] is not get_metric("exact_match") or "bypass" in metrics:
            return "its exact_match is not lm-eval's own"
        if any(key not in names and value is not None for key, value in options.items()):
            return "its exact_match ignores what patterns say"
        self.rule = "exact_match"
        self.ignore = tuple(short for key, short in names.items() if options.get(key))
        return ""

    def answer(self, doc: Any) -> dict[str, Any] | None:
        """What counts as right for an item: choices and indices of right ones (`gold`), or right texts; None without a rule
        or for an item that lm-eval itself would score oddly."""
        task = self._task
        if self.rule is None or self.rule == "greedy":
            return None if self.rule is None else {}
        gold = task.doc_to_target(doc)
        if self.rule == "exact_match":
            if task.config.doc_to_choice is not None:
                gold = task.doc_to_choice(doc)[gold]
            elif task.multiple_target:
                return {"gold": gold} if _texts(gold) else None
            return {"gold": [str(gold)]} if not isinstance(gold, list) else None
        choices = task.doc_to_choice(doc)
        if not _texts(choices) or bool(task.multiple_target) != isinstance(gold, list):
            return None
        found = [_index(one, choices) for one in (gold if isinstance(gold, list) else [gold])]
        if any(one is None for one in found):
            return None
        return {"choices": choices, "gold": [i for i in found if i is not None and i < len(choices)]}


def _plain_filter(filters: Sequence[Mapping[str, Any]] | None, name: str) -> bool:
    """Whether a filter takes the first response as it is."""
    if filters is None:
        return name == "none"
    steps = next((one["filter"] for one in filters if one["name"] == name), None)
    return steps is not None and all(dict(step) == {"function": "take_first"} for step in steps)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _index(gold: Any, choices: Sequence[str]) -> int | None:
    """Index of a right option, beyond the last where it is none of them (lm-eval then counts every answer as wrong)."""
    if isinstance(gold, str):
        return choices.index(gold) if gold in choices else len(choices)
    return gold if isinstance(gold, int) and gold >= 0 else None


def answers_digest(rows: Sequence[tuple[int, str, str]]) -> str:
    """rows: (item, its content hash, what counts as right as JSON), in item order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


class DataTask:
    """A task as the scorer asks one, from a rule and answers: nothing of it is a template or code.

    name, metric (`name,filter`): as in the lock. Items are what `Ruled.answer` gave.
    """

    multiple_input = 0

    def __init__(self, name: str, scoring: Scoring, metric: str) -> None:
        from lm_eval.filters import build_filter_ensemble

        self.name, self._rule, self._ignore = name, scoring.rule, scoring.ignore
        self._metric, _, filter_name = metric.partition(",")
        self.OUTPUT_TYPE = "multiple_choice" if scoring.rule in CHOICES else "loglikelihood"
        self._filters = [build_filter_ensemble(filter_name, [("take_first", None)])] if scoring.rule else []

    def doc_to_choice(self, doc: Mapping[str, Any]) -> list[str]:
        return list(doc["choices"])

    def doc_to_target(self, doc: Mapping[str, Any]) -> list[Any]:
        return list(doc["gold"])

    def process_results(self, doc: Mapping[str, Any], responses: Sequence[Any]) -> dict[str, float]:
        """The claimed metric of one item, as lm-eval's task computes it. responses: (log-likelihood, greedy), or texts."""
        return {self._metric: float(self._right(doc, responses))}

    def _right(self, doc: Mapping[str, Any], responses: Sequence[Any]) -> bool:
        import numpy as np

        if self._rule == "greedy":
            return bool(responses[0][1])
        if self._rule == "exact_match":
            return self._matches(responses[0], doc["gold"])
        if self._rule == "option":
            return any(responses[i][1] for i in doc["gold"])
        logliks = np.array([response[0] for response in responses])
        if self._rule == "acc_norm":
            logliks = logliks / np.array([float(len(c)) for c in doc["choices"]])
        elif self._rule == "acc_bytes":
            logliks = logliks / np.array([float(len(c.encode())) for c in doc["choices"]])
        return int(np.argmax(logliks)) in doc["gold"]

    def _matches(self, text: str, right: Sequence[str]) -> bool:
        from lm_eval.api.registry import get_metric

        options = {f"ignore_{what}": True for what in self._ignore}
        found = get_metric("exact_match")(predictions=[text] * len(right), references=list(right), **options)
        return bool(found["exact_match"] > 0)
