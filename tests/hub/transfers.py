"""What a local Hub answers to uploads, commits and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hub.routing import Answer, Call, as_json, refusal, route
from hub.store import Blob, Refused, User, is_large
from hub.yaml_check import check

if TYPE_CHECKING:
    from hub.local_hub import LocalHub


# --- uploads and commits


@route("hub", "POST", "/api/validate-yaml")
def validate_yaml(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    errors, warnings = check(call.json()["content"])
    found = {"errors": [{"message": x} for x in errors], "warnings": [{"message": x} for x in warnings]}
    return as_json(found, 400 if errors else 200)


@route("hub", "POST", "/api/models/{repo}/preupload/{revision}")
def preupload(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    repo = hub.store.writable(names["repo"], user)
    have = repo.commit(names["revision"]).files
    rows = []
    for file in call.json()["files"]:
        path = file["path"]
        large = is_large(path, file["size"], base64.b64decode(file["sample"]))
        row = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        rows.append(row | ({"oid": have[path].etag} if path in have else {}))
    return as_json({"files": rows})


@dataclass
class Upload:
    """An upload of one object that was allowed: `parts` by number (1 where there is but one)."""

    oid: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)


@route("hub", "POST", r"/{repo}\.git/info/lfs/objects/batch")
def lfs_batch(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    repo = hub.store.writable(names["repo"].removesuffix(".git"), user)
    rows = []
    for wanted in call.json()["objects"]:
        row: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.store.objects:
            key = secrets.token_hex(8)
            hub.uploads[key] = Upload(wanted["oid"], wanted["size"])
            upload: dict[str, Any] = {"href": f"{hub.storage}/upload/{key}/1"}
            if wanted["size"] > hub.part_size:
                count = -(-wanted["size"] // hub.part_size)
                upload = {
                    "href": f"{hub.endpoint}/{repo.id}.git/info/lfs/complete/{key}",
                    "header": {"chunk_size": str(hub.part_size)}
                    | {f"{part:05d}": f"{hub.storage}/upload/{key}/{part}" for part in range(1, count + 1)},
                }
            verify = {"href": f"{hub.endpoint}/{repo.id}.git/info/lfs/verify/{key}"}
            row["actions"] = {"upload": upload, "verify": verify}
        rows.append(row)
    return as_json({"transfer": "basic", "objects": rows})


@route("storage", "PUT", "/upload/{key}/{part}")
def put(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    upload = hub.uploads.get(names["key"])
    if upload is None:
        raise Refused(403, None, "the signature of this address is not valid")
    upload.parts[int(names["part"])] = call.body
    return Answer(200, b"", {"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@route("hub", "POST", r"/{repo}\.git/info/lfs/complete/{key}")
def complete(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    upload: Upload = hub.uploads[names["key"]]
    for part in call.json()["parts"]:
        if part["etag"].strip('"') != hashlib.md5(upload.parts[part["partNumber"]]).hexdigest():
            raise Refused(400, None, f"part {part['partNumber']} is not what was sent")
    return as_json({})


@route("hub", "POST", r"/{repo}\.git/info/lfs/verify/{key}")
def verify(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    hub.store.writable(names["repo"], user)
    upload: Upload = hub.uploads.pop(names["key"])
    data = b"".join(part for _, part in sorted(upload.parts.items()))
    if hashlib.sha256(data).hexdigest() != upload.oid or len(data) != upload.size:
        raise Refused(400, None, "the object that was uploaded has another hash")
    hub.store.put(data)
    return as_json({})


@route("hub", "POST", "/api/models/{repo}/commit/{revision}")
def commit(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    repo = hub.store.writable(names["repo"], user)
    assert user is not None
    lines = [json.loads(line) for line in call.body.splitlines()]
    header = lines[0]["value"]
    head = repo.commit(names["revision"]).oid
    if header.get("parentCommit") not in (None, head):
        raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
    added: dict[str, Blob] = {}
    deleted: list[str] = []
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            added[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.store.objects:
                raise Refused(
                    400, None, f"LFS pointer pointed to a file that does not exist: {value['path']}"
                )
            added[value["path"]] = Blob(hub.store.objects[value["oid"]], True)
        else:
            deleted.append(value["path"])
    if "README.md" in added and (errors := check(added["README.md"].data.decode())[0]):
        raise Refused(400, None, f"Invalid metadata in README.md: {errors[0]}")
    made = repo.add(header["summary"], user.name, added, tuple(deleted), names["revision"])
    return as_json(
        {"success": True, "commitOid": made.oid, "commitUrl": f"{hub.endpoint}/{repo.id}/commit/{made.oid}"}
    )


# --- downloads


@route("hub", "GET HEAD", "/{repo}/resolve/{revision}/{path*}")
def resolve(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    repo = hub.store.readable(names["repo"], user)
    found = repo.commit(names["revision"])
    blob = found.files.get(names["path"])
    headers = {"X-Repo-Commit": found.oid, "Accept-Ranges": "bytes"}
    if blob is None:
        error = refusal(Refused(404, "EntryNotFound", "Entry not found"))
        return Answer(error.status, error.body, {**error.headers, **headers})
    headers |= {
        "ETag": f'"{blob.etag}"',
        "Content-Disposition": f'inline; filename="{names["path"].split("/")[-1]}"',
    }
    if not blob.lfs:
        return _bytes(call, blob.data, headers)
    hub.store.objects[blob.sha256] = blob.data
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
    return Answer(302, b"", headers | {"Location": f"{hub.storage}/object/{blob.sha256}"})


@route("storage", "GET HEAD", "/object/{oid}")
def stored(hub: LocalHub, call: Call, user: User | None, names: dict[str, str]) -> Answer:
    return _bytes(call, hub.store.objects[names["oid"]], {"ETag": f'"{names["oid"]}"'})


def _bytes(call: Call, data: bytes, headers: dict[str, str]) -> Answer:
    """All of it, or the range that is asked for."""
    wanted = next((value for name, value in call.headers.items() if name.lower() == "range"), None)
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if match is None:
        return Answer(200, data, headers)
    start = int(match[1])
    end = min(int(match[2] or len(data) - 1), len(data) - 1)
    if start > end:
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})
