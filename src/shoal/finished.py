"""A finished run, for those who look inside: its weights, candidates, scores and items, read from its folder.

Nothing is scored. What it hands out is what the report shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import RunError, nearest
from shoal.folder import RunFolder
from shoal.journal import Journal
from shoal.lock import Lock
from shoal.output import read_plan
from shoal.page.items import TaskChanges, changes
from shoal.page.weights import WeightMap, weight_maps
from shoal.pareto import Front, pareto
from shoal.recipe import Recipe
from shoal.report import load_result
from shoal.types import ROLES, ItemScore, MergePlan


@dataclass(frozen=True)
class Run:
    """A finished run. result: content of result.json; winner: the chosen merge."""

    folder: Path
    recipe: Recipe
    lock: Lock
    result: dict[str, Any]
    winner: MergePlan

    @property
    def winner_id(self) -> str:
        """The winner's name in the journal, as in `scores` and `front`; a parent's where nothing was better."""
        return str(self.result["winner"]["id"])

    @property
    def best_parent(self) -> str:
        """The parent with the best overall score on the test items."""
        parents = [entry for entry in self.result["baselines"] if entry["kind"] == "parent"]
        return str(max(parents, key=lambda entry: entry["score"])["name"])

    @property
    def weights(self) -> tuple[WeightMap, ...]:
        """The winner's parameters by tensor type and layer, one map per parameter and parent; none of a winner that is a
        parent."""
        if any(b["name"] == self.winner_id and b["kind"] == "parent" for b in self.result["baselines"]):
            return ()
        return weight_maps(self.winner)

    def scores(self, candidate: str | None = None, role: str = "test") -> tuple[ItemScore, ...]:
        """What one candidate (default: the winner) did on each item of a role, ordered by task, then item.

        role: `test` (winner, parents, uniform merge), `select` (finalists, and parents near the best) or `search`
        (everyone, each on the items of its generation).

        Raises:
            RunError: no such role or candidate, or it was not scored there.
        """
        chosen = next((known for known in ROLES if known == role), None)
        if chosen is None:
            raise RunError(f"no role {role!r}; {nearest(role, ROLES)}")
        name = self.winner_id if candidate is None else candidate
        journal = self._journal()
        try:
            found = tuple(journal.scores(name, chosen))
            if found:
                return found
            scored = [e.candidate for e in journal.evaluations() if e.role == role and e.status == "done"]
        finally:
            journal.close()
        raise RunError(f"{self.folder}: {name!r} was not scored on {role} items; {nearest(name, scored)}")

    def front(self, *tasks: str, role: str = "search") -> Front:
        """All candidates by two or more tasks (default: all of the run), with intervals, and which of them no other beats.

        role: as in `scores`.

        Raises:
            RunError: fewer than two tasks, or no such task or role.
            EvaluationError: the task of a metric that is no mean over items cannot be loaded.
        """
        return pareto(self.folder, tasks or [task.task for task in self.lock.tasks], role)

    def changes(self, parent: str | None = None, *, texts: bool = True) -> tuple[TaskChanges, ...]:
        """Per task the test items that the winner gained and lost against a parent (default: the best one).

        parent: or the uniform merge. texts: look up what the items ask, which loads the run's tasks; where that cannot
        be done, `reason` says why.

        Raises:
            RunError: no such parent.
        """
        known = [str(entry["name"]) for entry in self.result["baselines"]]
        name = self.best_parent if parent is None else parent
        if name not in known:
            raise RunError(f"{self.folder}: no parent {name!r}; {nearest(name, known)}")
        journal = self._journal()
        try:
            return changes(self.lock, journal, self.winner_id, name, texts)
        finally:
            journal.close()

    def _journal(self) -> Journal:
        path = RunFolder(self.folder).journal
        if not path.is_file():
            raise RunError(f"{path}: not there; it holds the run's scores")
        return Journal(path)


def load_run(run: str | Path) -> Run:
    """What a finished run found.

    Raises:
        RunError: no run, or not finished.
    """
    folder = RunFolder(Path(run))
    recipe, lock = folder.open()
    return Run(folder.path, recipe, lock, load_result(folder.path), read_plan(folder.best))
