"""A publication whose parents nobody else has: its weights are all that can be checked, and scored, as they are."""

from __future__ import annotations

from pathlib import Path

from shoal.errors import PublishError
from shoal.hub.opened import Opened
from shoal.lock import Lock, ModelLock
from shoal.preflight import groups_of
from shoal.search.plans import parent_plan
from shoal.types import MergePlan


def weights_alone(opened: Opened, include_path: Path | None) -> tuple[Lock, MergePlan]:
    """The run's lock with the published weights as its only model, and the plan that takes them as they are.

    Raises:
        PublishError: the folder holds something that a library would load beside them. CheckpointError: no weights.
    """
    if (opened.folder / "adapter_config.json").exists():
        raise PublishError(
            f"{opened.where}: holds adapter_config.json, which is no part of a publication and would be loaded with it"
        )
    run, name = opened.lock.run, opened.lock.winner.id
    model = ModelLock(name=name, ref="./published", folder=str(opened.folder.absolute()), origin={}, files={})
    lock = run.model_copy(
        update={
            "models": (model,),
            "base": None,
            "sources": (0,),
            "tokenizer": 0,
            "include_path": None if include_path is None else str(include_path),
        }
    )
    return lock, parent_plan(groups_of(lock.models), [name], 0, run.dtype)
