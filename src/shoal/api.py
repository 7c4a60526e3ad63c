"""The public functions behind `import shoal`: what the command line does, callable from Python and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.endpoint import Say
from shoal.errors import RecipeError, RunError
from shoal.finished import Run, load_run
from shoal.folder import RunFolder
from shoal.hub import download as download_room
from shoal.hub import publish as publish_room
from shoal.hub import reproduce as reproduce_room
from shoal.hub.described import Publication
from shoal.hub.download import Downloaded
from shoal.hub.fetch import DEFAULT_LIMITS, Limits
from shoal.hub.lineage import openings_before
from shoal.hub.reproduce import Reproduction
from shoal.hub.roots import merges_of
from shoal.hub.start import followed, published_parent, published_start
from shoal.hub.upload import Published
from shoal.merge_run import write_candidate
from shoal.notebook import telling, watching
from shoal.page import Live
from shoal.recipe import Recipe, load_recipe
from shoal.report import write_plots
from shoal.run import evolve as evolve_run
from shoal.score import score_model as score
from shoal.stages.observer import Observer, Warned
from shoal.tracking import Tracking, chosen

__all__ = [
    "Downloaded",
    "Publication",
    "Published",
    "Reproduction",
    "Run",
    "download",
    "dry_run",
    "evolve",
    "load_recipe",
    "load_run",
    "merge",
    "publish",
    "reproduce",
    "score",
]


def merge(
    source: str | Path,
    out: str | Path,
    *,
    candidate: str | None = None,
    seed: int = 0,
    max_shard_bytes: int = 10**9,
) -> Path:
    """Write a complete model folder to `out`, and return it.

    source: the folder of a finished run (its winner, or `candidate` by its id), or a mergekit YAML. seed: of random
    masks, and max_shard_bytes: of the largest file, for a mergekit YAML.

    Raises:
        ShoalError: nothing to merge there, or `out` exists; nothing half-written is left.
    """
    source, out = Path(source), Path(out)
    if source.is_dir():
        write_candidate(source, out, candidate)
        return out
    if candidate is not None or not source.is_file():
        raise RunError(f"{source}: expected the folder of a run{'' if candidate else ' or a mergekit YAML'}")
    from shoal.merge.mergekit_bridge import write_config

    write_config(source, out, seed=seed, max_shard_bytes=max_shard_bytes)
    return out


def evolve(
    recipe: Recipe | str | Path | None,
    run: str | Path | None = None,
    *,
    start_from: str | None = None,
    parent_from: str | None = None,
    device: str = "auto",
    memory: str = "auto",
    memory_limit: int | None = None,
    reopen_test: bool = False,
    save_weights: bool = False,
    track: str | Sequence[str] | None = None,
    quiet: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Start or continue the run of a recipe; returns the content of RUN/result.json, plots are in RUN.

    RUN/report.html is written while the run goes on and at its end.

    recipe: a file, or a loaded recipe (its relative paths are then relative to the working directory).
    start_from: a published repository (`org/name`, `org/name@revision`) whose winner the search starts from.
    parent_from: one whose winner becomes one more parent, rebuilt from its roots in float32 (`merge:org/name` in a
    recipe). With either, recipe may be None for the published one.
    run: the run's folder, default `runs/NAME`. device: auto, cpu, cuda or cuda:N.
    memory: where the parents are kept: device, host (streamed to the device), disk, or auto (by size).
    memory_limit: bytes of device memory to stay under.
    reopen_test: allow a larger budget after the test items were opened; the claim says how often they were.
    track: where the run is sent as well: tensorboard, trackio or wandb, one or several, instead of what the recipe says;
    `none` or () for nowhere. What an earlier call did not send there is sent now.
    observer: what hears of the run's progress; by default bars in a notebook, unless `quiet`, and nothing elsewhere.

    Raises:
        ShoalError: one clear message; everything that was finished is kept in the run folder.
    """
    folder = Path(recipe).parent if isinstance(recipe, (str, Path)) else Path()
    given = load_recipe(recipe) if isinstance(recipe, (str, Path)) else recipe
    # a published recipe does not say where those who go on from it send their runs
    trackers = chosen(track, () if given is None else given.track)
    with watching(observer, quiet) as watched:
        named = run if run is not None or given is None else Path("runs") / given.name
        place = None if named is None else Path(named)
        for follow, repo in ((published_start, start_from), (published_parent, parent_from)):
            if repo is not None:
                given = followed(follow, repo, given, place, watched.say)
        if given is None:
            raise RecipeError("no recipe: name a recipe file, or a published repository to go on from")
        loaded = given
        where = place or Path("runs") / loaded.name
        merges = {} if RunFolder(where).started else merges_of(loaded, folder, watched.say)
        warn = watched.warn if isinstance(watched, Warned) else None
        with Live(where, watched) as live, Tracking(where, trackers, live, warn) as seen:
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
                merges=merges,
                openings=openings_before,
            )
    write_plots(where)
    return result


def publish(
    run: str | Path,
    repo: str,
    *,
    weights: bool = False,
    private: bool = False,
    license: str | None = None,
    include_item_text: bool = False,
    confirm: Callable[[Publication], bool] = lambda publication: True,
    quiet: bool = False,
    say: Say | None = None,
) -> Published | None:
    """Build the publication of a finished run and upload it as one commit; None where `confirm` says no.

    weights: with the merged model; without them others rebuild it from its parents. license: of parents for which none
    is found. include_item_text: rendered requests of custom tasks. confirm: is shown the publication before anything is
    sent. say: what is told each step; by default bars in a notebook, unless `quiet`, and nothing elsewhere. A call that
    was interrupted goes on at the next file when it is repeated.

    Raises:
        ShoalError: it may not be published, or cannot be uploaded; nothing half-published is visible.
    """
    with telling(f"publish {repo}", say, quiet) as told:
        return publish_room.publish(
            run,
            repo,
            weights=weights,
            private=private,
            license=license,
            include_item_text=include_item_text,
            confirm=confirm,
            say=told,
        )


def dry_run(
    run: str | Path,
    repo: str,
    out: str | Path,
    *,
    weights: bool = False,
    license: str | None = None,
    include_item_text: bool = False,
    quiet: bool = False,
    say: Say | None = None,
) -> Publication:
    """Write to the folder `out` what `publish` would send, and send nothing.

    Raises:
        ShoalError: as `publish`.
    """
    with telling(f"dry run of {repo}", say, quiet) as told:
        return publish_room.dry_run(
            run, repo, out, weights=weights, license=license, include_item_text=include_item_text, say=told
        )


def download(
    repo: str,
    out: str | Path | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
    quiet: bool = False,
    say: Say | None = None,
) -> Downloaded:
    """Fetch a published merge (`org/name`, or `org/name@revision`) as a model folder with its publication beside it.

    Every hash is checked; a recipe without weights is made from its parents. out: must not exist, or be empty; default:
    the repository's name in the working directory. say, quiet: as in `publish`.

    Raises:
        ShoalError: it cannot be fetched, is no publication of shoal, or anything in it has another hash than it says;
            then `out` is not there.
    """
    with telling(f"download {repo}", say, quiet) as told:
        return download_room.download(repo, out, limits=limits, say=told)


def reproduce(
    source: str | Path,
    *,
    score: bool = False,
    include_path: str | Path | None = None,
    trust_tasks: bool = False,
    device: str = "auto",
    limits: Limits = DEFAULT_LIMITS,
    quiet: bool = False,
    say: Say | None = None,
) -> Reproduction:
    """Rebuild a published winner from its lock and compare; with `score` measure its items again, too.

    source: a repository (`org/name`, `org/name@revision`), a published lock.yaml, or a folder with one. include_path:
    folder with the tasks that are not lm-eval's own. trust_tasks: use task YAML that the repository holds, which can
    run code on this machine. say, quiet: as in `publish`.

    Raises:
        ShoalError: it cannot be fetched or rebuilt, or a task is not supplied. What merely differs is no error but a
            check that does not agree.
    """
    with telling(f"reproduce {source}", say, quiet) as told:
        return reproduce_room.reproduce(
            source,
            score=score,
            include_path=include_path,
            trust_tasks=trust_tasks,
            device=device,
            limits=limits,
            say=told,
        )
