"""lm-eval's results: as rows of a table, and as lm-eval's own files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import EvaluationError


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task or group, as lm-eval aggregates it.

    metric: lm-eval's `metric,filter`. stderr: lm-eval's, None where it gives none. higher_is_better: None where a
    group's tasks disagree. depth: 0, or how deep the task lies in the groups named above it.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    items: int
    higher_is_better: bool | None
    depth: int = 0


def table_rows(results: Mapping[str, Any]) -> tuple[TaskResult, ...]:
    """Every metric of lm-eval's results in the order of its tasks, a group above its own.

    Groups without metrics of their own have no row.
    """
    above = {child: group for group, children in results["group_subtasks"].items() for child in children}
    roots: dict[str, None] = {}
    for name in results["results"]:
        while name in above:
            name = above[name]
        roots[name] = None
    return tuple(row for name in roots for row in _rows(results, name, 0))


def _rows(results: Mapping[str, Any], name: str, depth: int) -> Iterator[TaskResult]:
    found = results["results"].get(name, {})
    better = results["higher_is_better"].get(name, {})
    own = 0
    for key, value in found.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = found.get(f"{metric}_stderr,{filter_name}")
        error = float(error) if isinstance(error, (int, float)) else None
        items = found.get("sample_count", {}).get(key, found["sample_len"])
        yield TaskResult(name, key, float(value), error, items, better.get(metric), depth)
        own = 1
    for child in results["group_subtasks"].get(name, ()):
        yield from _rows(results, child, depth + own)


def writable(out: Path) -> None:
    """Make the folder that lm-eval's files are to lie in: a run of hours must not end with nowhere to write.

    Raises:
        EvaluationError: it cannot be made.
    """
    folder = out.parent if out.suffix == ".json" else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"{folder}: cannot be written to: {error.strerror}") from None


def save(
    tracker: Any, results: dict[str, Any], samples: Mapping[str, Sequence[Any]] | None
) -> tuple[Path, ...]:
    """Write results and samples with lm-eval's own EvaluationTracker, under its output_path; the files' paths.

    Raises:
        EvaluationError: a file could not be written (lm-eval itself only logs that).
    """
    from shoal.evals.quiet import quiet_libraries

    out = Path(tracker.output_path)
    with quiet_libraries():
        tracker.save_results_aggregated(results=results, samples=samples)
        date = getattr(tracker, "date_id", None)
        for task, rows in (samples or {}).items() if date else ():
            tracker.save_results_samples(task_name=task, samples=rows)
    if out.suffix == ".json":
        folder, main = out.parent, f"{out.stem}_{date}.json"
    else:
        folder = out / str(tracker.general_config_tracker.model_name_sanitized)
        main = f"results_{date}.json"
    files = tuple(
        folder / name for name in (main, *(f"samples_{task}_{date}.jsonl" for task in samples or ()))
    )
    for path in files:
        if not path.is_file():
            raise EvaluationError(
                f"{path if date else out}: could not be written; is there space, and the right to?"
            )
    return files
