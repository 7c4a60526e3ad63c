"""Weights & Biases: project, entity, server, mode and key are the client's own settings (WANDB_PROJECT, WANDB_MODE, ...).

What its client collects of the machine by itself is switched off as far as it can be: code, git, console, host name,
hardware, packages.
"""

from __future__ import annotations

import html
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.tracking.ending import Ending
from shoal.tracking.marks import Mark, Marks
from shoal.tracking.tracker import About, TrackerError, Unsent

OFFLINE = ("offline", "dryrun")
FINISH_SECONDS = 120.0  # to upload what is left at the end, unless the client's own setting says otherwise
_SETTINGS: Mapping[str, Any] = {
    "silent": True,  # what matters of it is said by us, and only once
    "finish_timeout_raises": True,
    "x_transaction_log_flush_interval": 0.1,  # seconds; at 15 a killed process would lose what it marked as sent
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "host": "-",
    "program": "shoal",
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


def check() -> None:
    """Whether runs can be sent; asks nobody, neither the user nor the server.

    Raises:
        ImportError: the package is missing.
        TrackerError: there is no login.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its tracebacks name folders; read at its import
    # a folder wandb/ that its client has left in the working directory can be imported, and holds nothing
    import wandb
    from wandb import Error, init, login, setup  # noqa: F401

    if setup().settings.mode in (*OFFLINE, "disabled") or wandb.run is not None:
        return
    try:
        known = login(prompt=False, verify=False)
    except Error as error:
        raise TrackerError(f"track: wandb: {error}") from None
    if not known:
        raise TrackerError(
            "track: wandb: nobody is logged in; run `wandb login`, or keep everything on this machine by WANDB_MODE=offline"
        )


class WeightsAndBiases:
    """One run there per run here, by an id in RUN/tracking.json; its files are in RUN/wandb."""

    def __init__(self, run: Path, about: About, marks: Marks) -> None:
        import wandb

        base = wandb.setup().settings
        if base.mode == "disabled":
            raise Unsent("it is switched off by its mode, disabled")
        project = base.project or "shoal"
        place = f"{base.entity or ''}/{project}"
        mark = marks.get("wandb")
        if mark is None or mark.place != place:
            mark = Mark(secrets.token_hex(4), place)
            marks.put("wandb", mark)
        known = wandb.Settings.model_fields
        settings = wandb.Settings(
            finish_timeout=base.finish_timeout or FINISH_SECONDS,
            **{name: value for name, value in _SETTINGS.items() if name in known},
        )
        self._run: Any = wandb.init(
            dir=str(run),
            project=project,
            id=mark.id,
            name=about.name,
            config=dict(about.config),
            resume="allow",
            reinit="create_new",  # a run that the user's own code has open stays as it is
            allow_val_change=True,
            settings=settings,
        )
        if self._run.settings.mode in OFFLINE:
            self.last, self.words = mark.step, f"offline; wandb sync {run}/wandb/offline-run-* sends it"
        else:
            # the server says what it has, since what was sent may not have arrived
            self.last, self.words = int(self._run.starting_step) - 1, str(self._run.url)

    def point(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step, commit=True)

    def end(self, ending: Ending) -> None:
        import wandb

        # no wandb.Table: it is kept outside of RUN until it is sent
        table = wandb.Html(_html(ending.cells), inject=False)
        self._run.log({"result/table": table, **ending.numbers}, step=ending.step, commit=True)
        entries = {name: dict(entry) for name, entry in ending.entries.items()}
        self._run.summary.update(
            {"verdict": ending.verdict, "words": "\n".join(ending.words), "scores": entries}
        )

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _html(cells: Sequence[Sequence[str]]) -> str:
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in cells)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
