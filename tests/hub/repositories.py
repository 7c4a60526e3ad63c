"""What a local Hub answers of users and repositories."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

from hub.routing import Answer, Call, as_json, route
from hub.store import TIME, Commit, Refused, Repo, User

if TYPE_CHECKING:
    from hub.local_hub import LocalHub


@route("hub", "GET", "/api/whoami-v2")
def whoami(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    if user is None:
        raise Refused(401, None, "Invalid username or password.")
    token = {"displayName": "test", "role": user.role}
    return as_json(
        {
            "type": "user",
            "name": user.name,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


@route("hub", "POST", "/api/repos/create")
def create(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    wanted = call.json()
    owner = wanted.get("organization") or (user.name if user else "")
    name = f"{owner}/{wanted['name']}"
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    found = {"url": f"{hub.endpoint}/{name}", "name": name, "id": "0"}
    try:
        hub.store.create(name, private, user)
    except Refused as error:
        if error.status != 409:
            raise
        return as_json(found | {"error": error.message}, 409, {"X-Error-Message": error.message})
    return as_json(found)


@route("hub", "GET", "/api/models/{repo}/auth-check(?:/write)?")
def auth_check(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    find = hub.store.writable if call.path.endswith("/write") else hub.store.readable
    find(names["repo"], user)
    return as_json({})


@route("hub", "GET", "/api/models")
def list_models(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    wanted = set(call.query.get("filter", []))
    author, search = call.query.get("author", [None])[0], call.query.get("search", [""])[0]
    found = [
        repo
        for name, repo in sorted(hub.store.repos.items())
        if wanted <= set(repo.labels())
        and author in (None, repo.owner)
        and search in name
        and (not repo.private or (user is not None and user.name == repo.owner))
    ]
    keys = {"_id", "id", *call.query.get("expand", [])}
    if len(keys) == 2:
        keys |= {
            "modelId",
            "private",
            "downloads",
            "likes",
            "tags",
            "createdAt",
            "library_name",
            "pipeline_tag",
        }
        keys |= {"siblings", "sha", "lastModified", "author", "gated"} if call.flag("full") else set()
        keys |= {"cardData"} if call.flag("cardData") else set()
    rows = [
        {key: value for key, value in _info(repo, repo.commit(), False).items() if key in keys}
        for repo in found
    ]
    return _page(hub, call, rows)


@route("hub", "GET", "/api/models/{repo}/revision/{revision}")
@route("hub", "GET", "/api/models/{repo}")
def model_info(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    repo = hub.store.repo(names["repo"], user)
    return as_json(_info(repo, repo.commit(names.get("revision", "main")), call.flag("blobs")))


def _info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for path, blob in sorted(commit.files.items()):
        row: dict[str, Any] = {"rfilename": path}
        if blobs:
            row |= {"size": len(blob.data), "blobId": blob.oid}
        if blobs and blob.lfs:
            row["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        siblings.append(row)
    card = repo.card(commit.oid)
    found = {
        "_id": "0",
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.owner,
        "sha": commit.oid,
        "lastModified": TIME,
        "createdAt": TIME,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": repo.labels(commit.oid),
        "cardData": card,
        "siblings": siblings,
    }
    found |= {key: card[key] for key in ("library_name", "pipeline_tag") if card.get(key)}
    counted = _parameters(commit)
    return found | (
        {"safetensors": {"parameters": counted, "total": sum(counted.values())}} if counted else {}
    )


def _parameters(commit: Commit) -> dict[str, int]:
    """dtype -> elements, from the headers of safetensors files."""
    found: dict[str, int] = {}
    for path, blob in commit.files.items():
        if not path.endswith(".safetensors") or len(blob.data) < 8:
            continue
        (length,) = struct.unpack("<Q", blob.data[:8])
        try:
            header = json.loads(blob.data[8 : 8 + length])
        except ValueError:
            continue
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for extent in tensor["shape"]:
                    size *= extent
                found[tensor["dtype"]] = found.get(tensor["dtype"], 0) + size
    return found


@route("hub", "GET", "/api/models/{repo}/refs")
def refs(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    repo = hub.store.repo(names["repo"], user)
    rows = {
        kind: [
            {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in found.items()
        ]
        for kind, folder, found in (("branches", "heads", repo.refs), ("tags", "tags", repo.tags))
    }
    return as_json(rows | {"converts": []})


@route("hub", "GET", "/api/models/{repo}/commits/{revision}")
def commits(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    repo = hub.store.repo(names["repo"], user)
    rows = [
        {"id": c.oid, "title": c.title, "message": "", "date": TIME, "authors": [{"user": c.author}]}
        for c in repo.history(names["revision"])
    ]
    return _page(hub, call, rows)


@route("hub", "GET", "/api/models/{repo}/tree/{revision}(?:/(?P<folder>[^/]+))?")
def tree(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    repo = hub.store.repo(names["repo"], user)
    found = repo.commit(names["revision"])
    return _page(hub, call, _entries(found, call.flag("recursive")))


@route("hub", "POST", "/api/models/{repo}/paths-info/{revision}")
def paths_info(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    found = hub.store.repo(names["repo"], user).commit(names["revision"])
    wanted = parse_qs(call.body.decode()).get("paths", [])
    return as_json([row for row in _entries(found, True) if row["path"] in wanted])


def _entries(commit: Commit, recursive: bool) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(commit.files.items()):
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if recursive or depth == 1:
                rows.setdefault(folder, {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
        if recursive or len(parts) == 1:
            rows[path] = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
            if blob.lfs:
                rows[path]["lfs"] = {
                    "oid": blob.sha256,
                    "size": len(blob.data),
                    "pointerSize": len(blob.pointer),
                }
    return list(rows.values())


def _page(hub: LocalHub, call: Call, rows: list[dict[str, Any]]) -> Answer:
    """One page of a listing, with a link to the next one."""
    start = int(call.query.get("cursor", ["0"])[0])
    size = min(hub.page, int(call.query.get("limit", [str(hub.page)])[0]))
    end = start + size
    query = [(key, value) for key, values in call.query.items() for value in values if key != "cursor"]
    link = f'<{hub.endpoint}{call.path}?{urlencode([*query, ("cursor", str(end))])}>; rel="next"'
    return as_json(rows[start:end], headers={"Link": link} if end < len(rows) else {})
