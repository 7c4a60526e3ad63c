"""`shoal publish`: a finished run becomes a repository of the Hub, after somebody has seen what it would be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from shoal.endpoint import Say
from shoal.errors import PublishError
from shoal.hub.publication import Publication, build
from shoal.hub.upload import Published, upload

FOLDER = ".published"  # in the run's folder, until the upload is done


def publish(
    run: str | Path,
    repo: str,
    *,
    weights: bool = False,
    private: bool = False,
    license: str | None = None,
    include_item_text: bool = False,
    confirm: Callable[[Publication], bool] = lambda publication: True,
    say: Say = lambda text: None,
) -> Published | None:
    """Build the publication of a finished run and upload it as one commit; None where `confirm` says no.

    weights: with the merged model; without them others rebuild it from its parents. license: of parents for which none
    is found. include_item_text: rendered requests of custom tasks. confirm: is shown the publication before anything is
    sent. A call that was interrupted goes on at the next file when it is repeated.

    Raises:
        PublishError: it may not be published, or cannot be uploaded; nothing half-published is visible.
        RunError: no finished run. CheckpointError: a parent's files have changed, or the disk is full.
    """
    folder = Path(run) / FOLDER / repo.replace("/", "--")
    shutil.rmtree(folder, ignore_errors=True)
    found = dry_run(
        run,
        repo,
        folder,
        weights=weights,
        license=license,
        include_item_text=include_item_text,
        say=say,
    )
    try:
        if not confirm(found):
            return None
        message = (
            f"Publish {found.lock.name}: {found.lock.verdict} ({'weights' if weights else 'recipe only'})"
        )
        return upload(folder, repo, private=private, message=message, say=say)
    finally:
        # beside it, upload keeps a note of an upload whose end it did not see
        shutil.rmtree(folder, ignore_errors=True)


def dry_run(
    run: str | Path,
    repo: str,
    out: str | Path,
    *,
    weights: bool = False,
    license: str | None = None,
    include_item_text: bool = False,
    say: Say = lambda text: None,
) -> Publication:
    """Write to the folder `out` what `publish` would send, and send nothing.

    Raises:
        PublishError, RunError, CheckpointError: as `publish`.
    """
    if repo.count("/") != 1:
        raise PublishError(f"{repo!r}: expected a repository as user/name or organization/name")
    return build(
        run, repo, weights=weights, include_item_text=include_item_text, license=license, out=out, say=say
    )
