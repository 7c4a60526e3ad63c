"""A small server that speaks what the W&B client says to one: runs, their histories and files, in memory.

Its answers have the fields that the client reads, no more; what was sent is kept as it came.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class StoredRun:
    """config, summary: as last sent. history: a line per step, as parsed JSON."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [line["_step"] for line in self.history]


class WandbServer:
    """down: every request is answered by 503. bodies: all that was sent. exists: whether a run of a name is there."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.bodies: list[bytes] = []
        self.down = False
        self.lock = threading.Lock()

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = match[1] if match else ""
        if name == "RunResumeStatus":
            return {"model": self._model(self.runs.get(variables["name"]))}
        if name == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], StoredRun(variables["displayName"] or ""))
            run.config |= json.loads(variables["config"] or "{}")
            return {"upsertBucket": {"bucket": self._bucket(variables["name"], run), "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/put/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, run: StoredRun, sent: dict[str, Any]) -> None:
        history = sent.get("files", {}).get("wandb-history.jsonl")
        if history:
            at = history["offset"]
            lines = [json.loads(line) for line in history["content"]]
            run.history[at : at + len(lines)] = lines
        summary = sent.get("files", {}).get("wandb-summary.json")
        if summary:
            run.summary = json.loads(summary["content"][-1])

    def _model(self, run: StoredRun | None) -> dict[str, Any]:
        names = {"id": "p", "name": "shoal", "entity": {"id": "e", "name": "school"}}
        return {**names, "bucket": None if run is None else self._bucket(run.name, run)}

    def _bucket(self, name: str, run: StoredRun) -> dict[str, Any]:
        return {
            "id": name,
            "name": name,
            "displayName": run.name,
            "project": {"id": "p", "name": "shoal", "entity": {"id": "e", "name": "school"}},
            "config": json.dumps(run.config),
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in run.history[-1:]]),
            "eventsTail": "[]",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),  # of a run that has begun
        }

    url = ""


@contextmanager
def serving() -> Iterator[WandbServer]:
    stored = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # see hub.local_hub

        def log_message(self, *_: Any) -> None: ...

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            status, content = 200, dict[str, Any]()
            with stored.lock:
                if stored.down:
                    status = 503
                else:
                    stored.bodies.append(body)
                    content = self.content(body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def content(self, body: bytes) -> dict[str, Any]:
            if self.path == "/graphql":
                sent = json.loads(body)
                return {"data": stored.graphql(sent["query"], sent.get("variables") or {})}
            match = re.fullmatch(r"/files/[^/]*/[^/]*/([^/]+)/file_stream", self.path)
            if match:
                stored.stream(stored.runs[match[1]], json.loads(body))
            return {}

        do_GET = do_POST = do_PUT = answer

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """The client ends with connections open."""

    server = Server(("127.0.0.1", 0), Handler)
    stored.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield stored
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
