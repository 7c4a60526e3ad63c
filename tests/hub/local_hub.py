"""A small Hugging Face Hub on this machine, for the real huggingface_hub client (HF_HUB_DISABLE_XET=1).

Two HTTP servers share one store: the Hub itself, and the storage of large files that it redirects to, which stands for
the S3 and CDN hosts of the real one (another origin: the client must not send it the token). The routes are those that
huggingface_hub 2.4.0 asks for; what they answer is in `repositories` and `transfers`, faults on demand are in `faults`.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import hub.repositories
import hub.transfers  # noqa: F401 - both say what is answered
from hub.faults import Fault, Faults, Kind
from hub.routing import Answer, Call, answer, refusal
from hub.store import Blob, Refused, Repo, Store, User, is_large


@dataclass(frozen=True)
class Seen:
    """A request as it came in. authorized: it carried a token. range: of bytes asked for."""

    method: str
    path: str
    place: str  # hub or storage
    authorized: bool
    range: str | None = None


@dataclass
class LocalHub:
    """Started by `with LocalHub() as hub`.

    part_size: large files above it are uploaded in parts. page: entries of one page of a listing. broken: requests
    that this server itself failed on.
    """

    store: Store = field(default_factory=Store)
    faults: Faults = field(default_factory=Faults)
    seen: list[Seen] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    part_size: int = 50_000_000
    page: int = 1000
    uploads: dict[str, Any] = field(default_factory=dict)
    _servers: list[ThreadingHTTPServer] = field(default_factory=list)

    def __enter__(self) -> Self:
        for place in ("hub", "storage"):
            server = _Server(self, place)
            self._servers.append(server)
            # polled often, for otherwise every test waits half a second at its end
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables by which another process uses this Hub, with everything that it keeps in `home`."""
        found = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return found | ({"HF_TOKEN": token} if token else {})

    # --- what a test puts in and looks at

    def add_user(self, name: str, token: str, role: str = "write", expired: bool = False) -> None:
        self.store.users[token] = User(name, role, expired)

    def add_repo(
        self,
        name: str,
        files: Mapping[str, bytes] | None = None,
        *,
        folder: Path | None = None,
        private: bool = False,
        gated: str | bool = False,
    ) -> Repo:
        """A repository with one commit of these files (or of all files in a folder)."""
        found = dict(files or {})
        if folder is not None:
            found |= {
                str(path.relative_to(folder)): path.read_bytes()
                for path in folder.rglob("*")
                if path.is_file()
            }
        repo = self.store.repos[name] = Repo(name, private, gated)
        blobs = {path: Blob(data, is_large(path, len(data), data[:512])) for path, data in found.items()}
        self.store.objects |= {blob.sha256: blob.data for blob in blobs.values() if blob.lfs}
        repo.add("add files", repo.owner, blobs)
        return repo

    def fault(self, kind: Kind, pattern: str, **more: Any) -> None:
        """See `Fault`."""
        self.faults.add(Fault(kind, pattern, **more))

    def foreign_commit(self, repo: str, path: str = "note.txt") -> None:
        """What somebody else does in between."""
        with self.store.lock:
            self.store.repos[repo].add("somebody else", "other", {path: Blob(b"theirs\n", False)})

    def count(self, method: str, part: str) -> int:
        return sum(1 for request in self.seen if request.method == method and part in request.path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: LocalHub, place: str) -> None:
        self.hub, self.place = hub, place
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is printed."""
        import sys

        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # head and body are two writes: without it, the second one waits 40 ms for the first one's acknowledgement
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        hub, place = self.server.hub, self.server.place
        split = urlsplit(self.path)
        request = f"{self.command} {split.path}"
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub.seen.append(Seen(self.command, split.path, place, token is not None, self.headers.get("Range")))
        fault = hub.faults.pick(request)
        kind = fault.kind if fault else None
        if kind == "cut-request":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self._cut()
            return
        body = self._body()
        if fault is not None and kind == "status":
            text = b'{"error":"on demand"}'
            self._send(Answer(fault.status, text, dict(fault.headers) | {"Content-Type": "application/json"}))
            return
        if fault is not None and kind == "first":
            fault.action()
        call = Call(self.command, split.path, parse_qs(split.query), dict(self.headers.items()), body, token)
        try:
            with hub.store.lock:
                found = answer(hub, place, call)
        except Refused as error:
            found = refusal(error)
        except Exception as error:  # noqa: BLE001 - a test must see it, not a thread
            hub.broken.append(f"{request}: {error!r}")
            found = refusal(Refused(400, None, "the local Hub itself is broken"))
        if kind == "lose-response":
            self._cut()
            return
        self._send(found, kind)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = bytearray()
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(found)

    def _send(self, found: Answer, kind: Kind | None = None) -> None:
        body = found.body
        if kind == "corrupt" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.send_response(found.status)
        for name, value in found.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in found.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if kind == "cut-response" else body)
        self.wfile.flush()
        if kind == "cut-response":
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve
