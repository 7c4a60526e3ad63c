"""The commands that reach the Hub: publish, download, reproduce, hub list."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli_options import QuietOption, terminal
from shoal.endpoint import without_bars
from shoal.errors import PublishError

if TYPE_CHECKING:
    from shoal.hub.described import Publication
    from shoal.hub.reproduce import Reproduction

hub_app = typer.Typer(no_args_is_help=True, help="What is published on the Hub.")

RepoArgument = Annotated[
    str, typer.Argument(help="Repository of the Hub: org/name, or org/name@revision.", show_default=False)
]


def publish(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[str, typer.Argument(help="Repository of the Hub to publish to: org/name.")],
    weights: Annotated[
        bool,
        typer.Option(
            "--weights/--recipe-only", help="With the merged model, or what it is rebuilt from alone."
        ),
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Only you and your organization see it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    license: Annotated[
        str | None, typer.Option("--license", help="Licence of parents that name none, as an id of the Hub.")
    ] = None,
    include_item_text: Annotated[
        bool,
        typer.Option("--include-item-text", help="Publish prompts and targets of your own tasks, too."),
    ] = False,
    dry_run: Annotated[
        Path | None,
        typer.Option("--dry-run", help="Write what would be published to this folder; send nothing."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Publish a run to the Hub, as one commit: shows exactly what, asks, uploads."""
    from shoal.hub import publish as room
    from shoal.hub.described import describe

    if dry_run is None and not yes and not sys.stdin.isatty():
        raise PublishError(
            "publishing asks first, and there is no terminal to ask on; look at what would be published by --dry-run DIR,"
            " then say --yes"
        )
    say = _say(quiet)
    if dry_run is not None:
        found = room.dry_run(
            run,
            repo,
            dry_run,
            weights=weights,
            license=license,
            include_item_text=include_item_text,
            say=say,
        )
        typer.echo(describe(found))
        typer.echo(f"written to {dry_run}; nothing was sent")
        return

    def confirm(found: Publication) -> bool:
        typer.echo(describe(found))
        where = "private" if private else "public"
        return yes or typer.confirm(f"publish this as {repo} ({where})?", default=False)

    published = room.publish(
        run,
        repo,
        weights=weights,
        private=private,
        license=license,
        include_item_text=include_item_text,
        confirm=confirm,
        say=say,
    )
    if published is None:
        typer.echo("nothing was published")
        raise typer.Exit(1)
    typer.echo(f"published: {published.url} (commit {published.commit[:12]})")


def download(
    repo: RepoArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder to write to; must not exist. Default: the repository's name."
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Download a published merge as a model folder, every hash checked; a recipe is rebuilt from its parents."""
    from shoal.hub.download import download as fetch

    with without_bars(quiet):
        found = fetch(repo, out, say=_say(quiet))
    how = "rebuilt from its parents" if found.rebuilt else "downloaded"
    typer.echo(f"{found.folder}: {how}, weights_sha256 {found.weights_sha256[:16]} as in the lock")


def reproduce(
    source: Annotated[
        str,
        typer.Argument(
            metavar="REPO|LOCK", help="org/name[@revision], a published lock.yaml, or its folder."
        ),
    ],
    score: Annotated[
        bool, typer.Option("--score", help="Measure the winner's items again, and compare them one by one.")
    ] = False,
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path",
            "--include_path",
            help="Folder with the tasks that are not lm-eval's own; else their published items are used.",
        ),
    ] = None,
    trust_tasks: Annotated[
        bool,
        typer.Option(
            "--trust-tasks", help="Use task YAML of the repository: it can run code on this machine."
        ),
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    quiet: QuietOption = False,
) -> None:
    """Rebuild a published winner and compare it with what was published; exit code 0 only if all agrees, 1 if not."""
    from shoal.hub.reproduce import reproduce as again

    with without_bars(quiet):
        found = again(
            source,
            score=score,
            include_path=include_path,
            trust_tasks=trust_tasks,
            device=device,
            say=_say(quiet),
        )
    _print(found, score)
    if not found.agrees:
        raise typer.Exit(1)


def _print(found: Reproduction, scored: bool) -> None:
    from rich.table import Table

    console = terminal()
    table = Table("", "published", "here", "agrees", title=found.where, title_justify="left")
    for check in found.checks:
        table.add_row(check.what, check.expected, check.found, "yes" if check.agrees else "NO")
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    wrong = [check.what for check in found.checks if not check.agrees]
    scores = "log-likelihoods" if found.unjudged else "scores"
    if wrong:
        words = f"not reproduced: {', '.join(wrong)}"
    elif found.rebuilt:
        words = f"reproduced: weights and {scores} agree" if scored else "reproduced: the weights agree"
    else:
        words = "the published weights are those of the lock"
        words += f" and their {scores} agree; they were not rebuilt" if scored else "; they were not rebuilt"
    if not wrong and found.unjudged:
        words += f"; correctness of {', '.join(found.unjudged)} was not compared"
    console.print(words, markup=False, highlight=False, soft_wrap=True)
    if not wrong and not scored:
        console.print("its scores: --score", markup=False, highlight=False)


def list_(
    author: Annotated[str | None, typer.Option(help="Only of this user or organization.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 100,
    quiet: QuietOption = False,
) -> None:
    """List published recipes and merges, newest first."""
    from rich.table import Table

    from shoal.hub.listing import list_published

    found = list_published(author, limit, _say(quiet))
    table = Table("repository", "kind", "from", "licence", "updated", "downloads")
    for one in found:
        name = f"{one.repo} (private)" if one.private else one.repo
        table.add_row(
            name,
            one.kind,
            ", ".join(one.base_models),
            one.license or "",
            one.updated or "",
            str(one.downloads),
        )
    terminal().print(table)
    if not found:
        typer.echo("none was found")


def _say(quiet: bool) -> Any:
    return (lambda text: None) if quiet else (lambda text: typer.echo(text, err=True))
