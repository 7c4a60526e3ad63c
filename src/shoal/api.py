"""The public functions behind `import shoal`: what the command line does, callable from Python and notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.page import Live
from shoal.recipe import Recipe, load_recipe
from shoal.report import write_plots
from shoal.run import evolve as evolve_run
from shoal.stages.observer import Observer, Silent


def evolve(
    recipe: Recipe | str | Path,
    run: str | Path | None = None,
    *,
    device: str = "auto",
    memory: str = "auto",
    memory_limit: int | None = None,
    reopen_test: bool = False,
    save_weights: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Start or continue the run of a recipe; returns the content of RUN/result.json, plots are in RUN.

    RUN/report.html is written while the run goes on and at its end.

    recipe: a file, or a loaded recipe (its relative paths are then relative to the working directory).
    run: the run's folder, default `runs/NAME`. device: auto, cpu, cuda or cuda:N.
    memory: where the parents are kept: device, host (streamed to the device), disk, or auto (by size).
    memory_limit: bytes of device memory to stay under.
    reopen_test: allow a larger budget after the test items were opened; the claim says how often they were.

    Raises:
        ShoalError: one clear message; everything that was finished is kept in the run folder.
    """
    folder = Path() if isinstance(recipe, Recipe) else Path(recipe).parent
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    where = Path("runs") / loaded.name if run is None else Path(run)
    with Live(where, observer or Silent()) as seen:
        result = evolve_run(
            loaded,
            where,
            base_folder=folder,
            device=device,
            memory=memory,
            memory_limit=memory_limit,
            reopen_test=reopen_test,
            save_weights=save_weights,
            observer=seen,
        )
    write_plots(where)
    return result
