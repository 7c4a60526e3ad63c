"""A folder becomes one commit of a repository: large files first and one by one, then everything visible at once.

`upload_folder` and `upload_large_folder` of huggingface_hub commit in batches, so that others see half of it; here each
large file goes up by `preupload_lfs_files` and nothing refers to it until the one `create_commit`, which names the
commit that it was made on: if somebody else committed in between, the Hub refuses it. A repeated command sends only what
the Hub does not have: it knows objects by their sha256, committed or not.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.availability import size_words
from shoal.endpoint import (
    NO_BAR,
    Say,
    client_errors,
    open_api,
    origin,
    page,
    reason,
    retried,
    scrub,
    speaking,
    status,
    temporary,
    without_bars,
)
from shoal.errors import PublishError
from shoal.hub.files import KEPT, WITHOUT_MARK, differing, remote_files

MARK = "lock.yaml"  # a repository that has it was published by us
CHANGED = (409, 412)


@dataclass(frozen=True)
class Published:
    """repo: org/name. commit: its SHA on main. url: of the repository's page."""

    repo: str
    commit: str
    url: str


def upload(folder: Path, repo: str, *, private: bool, message: str, say: Say) -> Published:
    """Publish every file of `folder` as one commit on main of `repo`, which is created if it does not exist.

    Files of an earlier publication that are not in `folder` are removed by the same commit. Nothing is committed where
    main holds the same files already. say: one line per step, for people.

    Raises:
        PublishError: not logged in, no permission, metadata that the Hub does not accept, a public repository where a
            private one is asked for, files of others in it, a commit by somebody else in between, or a connection that
            does not come back. The message has one line and no token.
    """
    files = _files(folder)
    _check_name(repo)
    api = open_api()
    note = folder.with_name(f".{folder.name}.upload.json")
    with speaking(say):
        try:
            _check_token(retried(api.whoami, say))
            _check_card(files, say)
            parent = _open(api, repo, private, say)
            commit = _earlier(api, note, repo, parent, files)
            if commit is None:
                operations = [*_removals(api, repo, parent, files, say), *_send(api, repo, files, say)]
                commit = _commit(api, repo, operations, files, message, parent, say)
                _check_landed(api, repo, commit, files)
        except client_errors() as error:
            raise PublishError(_failed(error, repo)) from None
    note.unlink(missing_ok=True)
    return Published(repo, commit, page(repo))


# --- before anything is sent


def _files(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file, sorted."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise PublishError(f"{path}: a symbolic link cannot be published; put the file itself there")
        if path.is_file():
            found[name] = path
    if not found:
        raise PublishError(f"{folder}: expected files to publish, found none")
    return found


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PublishError(f"{repo!r}: no name for a repository: {scrub(str(error))}") from None
    if "/" not in repo:
        raise PublishError(f"{repo!r}: expected a repository as user/name or organization/name")


def _check_token(account: Mapping[str, Any]) -> None:
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PublishError(
            f"the token of {account.get('name')} may only read; make one that may write at"
            f" {page('settings/tokens')} and log in with `hf auth login`"
        )


def _check_card(files: Mapping[str, Path], say: Say) -> None:
    """The Hub's own check of the card's metadata, before large files travel."""
    if "README.md" not in files:
        return
    import yaml
    from huggingface_hub import RepoCard
    from huggingface_hub.errors import HfHubHTTPError

    try:
        card = RepoCard(files["README.md"].read_text(encoding="utf-8"))
        retried(lambda: card.validate(repo_type="model"), say)
    except yaml.YAMLError as error:
        raise PublishError(f"README.md: its metadata are no YAML: {scrub(str(error))}") from None
    except HfHubHTTPError:
        raise
    except ValueError as error:  # the Hub's answer as text
        raise PublishError(
            f"README.md: the Hub does not accept its metadata: {_complaints(str(error))}"
        ) from None


def _complaints(answer: str) -> str:
    try:
        found = json.loads(answer)["errors"]
        return scrub("; ".join(str(error["message"]) for error in found))
    except (ValueError, KeyError, TypeError):
        return scrub(answer)


def _open(api: Any, repo: str, private: bool, say: Say) -> str:
    """SHA of main, of a repository that is there now."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = retried(lambda: api.model_info(repo), say)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        retried(lambda: api.create_repo(repo, private=private, exist_ok=True), say)
        say(f"created {page(repo)} ({'private' if private else 'public'})")
        info = retried(lambda: api.model_info(repo), say)
    if private and not info.private:
        raise PublishError(
            f"{repo}: exists and is public, but a private publication is asked for; make it private at"
            f" {page(repo)}/settings, or choose another name"
        )
    if info.private and not private:
        say(f"{repo} is private and stays so")
    return str(info.sha)


def _earlier(api: Any, note: Path, repo: str, parent: str, files: Mapping[str, Path]) -> str | None:
    """The commit of an earlier call whose end it did not see. It goes on only from the commit that it began on."""
    place = page(repo)
    began: Any = None
    with suppress(OSError, ValueError):
        began = json.loads(note.read_text())
    if isinstance(began, dict) and began.get("place") == place and began.get("parent") != parent:
        landed = _landed(api, repo, str(began.get("parent")), files)
        note.unlink()
        if landed is None:
            raise PublishError(_changed(repo))
        return landed
    note.write_text(json.dumps({"place": place, "parent": parent}) + "\n")
    return None


# --- sending


def _send(api: Any, repo: str, files: Mapping[str, Path], say: Say) -> list[Any]:
    """Additions whose large files the Hub has; main does not show them yet."""
    from huggingface_hub import CommitOperationAdd

    operations = []
    for index, (name, path) in enumerate(files.items(), start=1):
        operation = CommitOperationAdd(name, str(path))
        say(f"{index}/{len(files)} {name} ({size_words(operation.upload_info.size)})")
        with without_bars(operation.upload_info.size < NO_BAR):
            # the client repeats each of its requests by itself
            api.preupload_lfs_files(repo, [operation], free_memory=False)
        operations.append(operation)
    return operations


def _removals(api: Any, repo: str, parent: str, files: Mapping[str, Path], say: Say) -> list[Any]:
    """Deletions of an earlier publication's files; files of others are not ours to delete."""
    from huggingface_hub import CommitOperationDelete

    there = {file.path for file in remote_files(api, repo, parent)}
    left = sorted(there - set(files) - set(KEPT))
    if MARK not in there:
        foreign = [name for name in left if name not in WITHOUT_MARK]
        if foreign:
            raise PublishError(
                f"{repo}: holds files that shoal did not publish ({_some(foreign)}); choose another name,"
                " or remove them there first"
            )
        return []
    if left:
        say(f"removes what only the earlier publication had: {_some(left)}")
    return [CommitOperationDelete(name, is_folder=False) for name in left]


def _commit(
    api: Any,
    repo: str,
    operations: Sequence[Any],
    files: Mapping[str, Path],
    message: str,
    parent: str,
    say: Say,
) -> str:
    """SHA of the one commit. An answer that got lost is looked for before the commit is tried again."""

    def attempt() -> str:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                made = api.create_commit(repo, operations, commit_message=message, parent_commit=parent)
            except client_errors() as error:
                code = status(error)
                if code is None or code in CHANGED or code >= 500:
                    landed = _looked_for(api, repo, parent, files)
                    if landed is not None:
                        return landed
                if code in CHANGED:
                    raise PublishError(_changed(repo)) from None
                raise
        for warning in told:
            if str(warning.message).startswith("Warnings while validating metadata"):
                say("the Hub remarks on README.md: " + " ".join(str(warning.message).split()[6:]))
        return str(made.oid)

    return retried(attempt, say)


def _looked_for(api: Any, repo: str, parent: str, files: Mapping[str, Path]) -> str | None:
    """The same as `_landed` after a commit whose answer was none; where the Hub does not tell, it is not made again."""
    try:
        return _landed(api, repo, parent, files)
    except client_errors() as error:
        raise PublishError(
            f"{repo}: the commit was sent, but whether it arrived is not known ({reason(error)});"
            " repeat the command, which looks first"
        ) from None


def _landed(api: Any, repo: str, parent: str, files: Mapping[str, Path]) -> str | None:
    """Main's commit if it is ours: made on `parent`, with exactly our files."""
    newest = api.list_repo_commits(repo)[:2]
    if len(newest) < 2 or newest[1].commit_id != parent:
        return None
    commit = str(newest[0].commit_id)
    return None if differing(remote_files(api, repo, commit), files) else commit


def _check_landed(api: Any, repo: str, commit: str, files: Mapping[str, Path]) -> None:
    try:
        wrong = differing(remote_files(api, repo, commit), files)
    except client_errors() as error:
        raise PublishError(
            f"{repo}: published as commit {commit[:12]}, but what the Hub has could not be compared with what was sent"
            f" ({reason(error)}); repeat the command, which compares again"
        ) from None
    if wrong:
        raise PublishError(
            f"{repo}@{commit[:12]}: the Hub has other content than was sent for {_some(wrong)};"
            " repeat the command, and do not use this commit"
        )


# --- words


def _failed(error: BaseException, repo: str) -> str:
    text = f"{repo}: not published: {reason(error, repo)}"
    # RuntimeError: how the Xet path says that it lost the network
    if temporary(error) or isinstance(origin(error), RuntimeError):
        return f"{text}; nothing is visible yet, and the same command goes on where it stopped"
    return text


def _changed(repo: str) -> str:
    return (
        f"{repo}: not published: somebody else committed to it while this upload was under way;"
        f" look at {page(repo)}/commits/main, then repeat the command to publish on top of that"
    )


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
