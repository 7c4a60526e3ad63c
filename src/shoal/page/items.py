"""Which test items the winner gained and lost against the best parent; their texts come from the task, if it is there.

The journal holds ids and scores only, so nothing here leaves this machine unless a page with texts does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.journal import Journal
from shoal.lock import Lock, TaskLock
from shoal.preflight import open_catalogue
from shoal.types import ItemScore

SHOWN = 100  # items per task and direction
LONGEST = 2000  # characters of a text


@dataclass(frozen=True)
class ItemText:
    """What an item asks, without few-shot examples and chat template. options: of multiple choice; target: the answer."""

    prompt: str
    options: tuple[str, ...]
    target: str


@dataclass(frozen=True)
class Change:
    """One item that the two models did differently on. item: data-set index in its split.

    winner, parent: the metric's values. chosen: index of the option that winner and parent found likeliest, where the
    metric is about that.
    """

    item: int
    hash: str
    winner: float
    parent: float
    chosen: tuple[int, int] | None
    text: ItemText | None = None


@dataclass(frozen=True)
class TaskChanges:
    """gained, lost: the largest differences first, at most SHOWN of each; won, gone: how many there are.

    same_right, same_wrong: items with equal values; of a metric that is not 0 or 1, all are under same_right. reason:
    why nothing is here, or why there are no texts.
    """

    task: str
    split: str
    metric: str
    binary: bool
    won: int = 0
    gone: int = 0
    same_right: int = 0
    same_wrong: int = 0
    gained: tuple[Change, ...] = ()
    lost: tuple[Change, ...] = ()
    reason: str = ""


def changes(lock: Lock, journal: Journal, winner: str, parent: str, texts: bool) -> tuple[TaskChanges, ...]:
    """Per task the test items that `winner` did better or worse on than `parent`. texts: whether to look them up."""
    ours, theirs = (_by_task(journal, name) for name in (winner, parent))
    return tuple(
        _changes(lock, task, ours.get(task.task, {}), theirs.get(task.task, {}), texts) for task in lock.tasks
    )


def _by_task(journal: Journal, candidate: str) -> dict[str, dict[int, ItemScore]]:
    found: dict[str, dict[int, ItemScore]] = {}
    for score in journal.scores(candidate, "test"):
        found.setdefault(score.task, {})[score.item] = score
    return found


def _changes(
    lock: Lock, task: TaskLock, ours: Mapping[int, ItemScore], theirs: Mapping[int, ItemScore], texts: bool
) -> TaskChanges:
    role = task.roles["test"]
    both = sorted(set(ours) & set(theirs))
    values = {
        i: (_number(ours[i].metrics.get(task.metric)), _number(theirs[i].metrics.get(task.metric)))
        for i in both
    }
    known = {i: (a, b) for i, (a, b) in values.items() if a is not None and b is not None}
    if len(known) < len(values):
        return TaskChanges(
            task.task, role.split, task.metric, False, reason="its metric is no number per item"
        )
    sign = 1 if task.higher_is_better else -1
    hashes = dict(zip(role.items, role.hashes, strict=True))
    better = _ranked({i: sign * (a - b) for i, (a, b) in known.items()})
    worse = _ranked({i: sign * (b - a) for i, (a, b) in known.items()})
    shown = [*better[:SHOWN], *worse[:SHOWN]]
    found, reason = _texts(lock, task, shown) if texts and shown else ({}, "")

    def row(item: int) -> Change:
        text = found.get(item)
        chosen = _chosen(task, ours[item], theirs[item], text)
        return Change(item, hashes.get(item, ""), *known[item], chosen, text)

    binary = all(v in (0, 1) for pair in known.values() for v in pair)
    same = [a for a, b in known.values() if a == b]
    right = sum(a == (1 if task.higher_is_better else 0) for a in same) if binary else len(same)
    return TaskChanges(
        task=task.task,
        split=role.split,
        metric=task.metric,
        binary=binary,
        won=len(better),
        gone=len(worse),
        same_right=right,
        same_wrong=len(same) - right,
        gained=tuple(map(row, better[:SHOWN])),
        lost=tuple(map(row, worse[:SHOWN])),
        reason=reason,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _ranked(gains: Mapping[int, float]) -> list[int]:
    """Items with a gain, the largest first."""
    return sorted((i for i, gain in gains.items() if gain > 0), key=lambda i: (-gains[i], i))


def _chosen(
    task: TaskLock, ours: ItemScore, theirs: ItemScore, text: ItemText | None
) -> tuple[int, int] | None:
    """`acc` of multiple choice is about the likeliest option, without normalising by length."""
    if task.output_type != "multiple_choice" or task.metric.partition(",")[0] != "acc" or text is None:
        return None
    counts = {len(ours.logliks), len(theirs.logliks), len(text.options)}
    if len(counts) > 1 or 0 in counts:
        return None
    first, second = (max(range(len(s.logliks)), key=s.logliks.__getitem__) for s in (ours, theirs))
    return first, second


def _texts(lock: Lock, task: TaskLock, items: Collection[int]) -> tuple[dict[int, ItemText], str]:
    """Texts of test items, as far as the task is here and says what the lock says; and why not, where it is not."""
    from shoal.evals.catalogue import doc_hash

    role = task.roles["test"]
    expected = dict(zip(role.items, role.hashes, strict=True))
    include = None if lock.include_path is None else Path(lock.include_path)
    try:
        source = open_catalogue(include).load(role.task)
        docs = source.docs(role.split)
        if any(item >= len(docs) or doc_hash(docs[item]) != expected[item] for item in items):
            return {}, "the data set on this machine is another one than the run's, so texts are left out"
        return {item: item_text(source.task, docs[item]) for item in items}, ""
    except ShoalError as error:
        return {}, f"texts are left out: {error}"
    except Exception as error:  # noqa: BLE001 (whatever a task's own code raises, ids are shown)
        return {}, f"texts are left out: the task cannot render them ({type(error).__name__}: {error})"


def item_text(task: Any, doc: Any) -> ItemText:
    """An item as lm-eval's task renders it: `doc_to_text`, `doc_to_choice`, `doc_to_target`."""
    prompt: Any = task.doc_to_text(doc)
    target: Any = task.doc_to_target(doc)
    options: list[Any] = []
    if getattr(task, "OUTPUT_TYPE", "") == "multiple_choice":
        listed = doc.get("choices") if isinstance(doc, dict) else None  # of tasks that are Python code
        options = list(task.doc_to_choice(doc) if hasattr(task, "doc_to_choice") else listed or [])
    if isinstance(prompt, int):  # contexts are the options, and the text says which one is right
        prompt, target = f"… {target}", str(options[prompt] if prompt < len(options) else prompt)
    elif isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(options):
        target = options[target]
    elif isinstance(target, list):
        target = " | ".join(str(options[t] if isinstance(t, int) and t < len(options) else t) for t in target)
    return ItemText(_cut(str(prompt)), tuple(_cut(str(option)) for option in options), _cut(str(target)))


def _cut(text: str) -> str:
    """The end of a long text stands next to the answer, so the middle is what goes."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"
