"""Which function of a local Hub answers a request."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from hub.store import Refused, User

if TYPE_CHECKING:
    from hub.local_hub import LocalHub


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    token: str | None

    def json(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def refusal(error: Refused) -> Answer:
    headers = {"X-Error-Message": error.message, "X-Request-Id": "local"}
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    return as_json({"error": error.message}, error.status, headers)


Route = Callable[["LocalHub", Call, User | None, dict[str, str]], Answer]
_ROUTES: list[tuple[str, str, re.Pattern[str], Route]] = []


def route(place: str, methods: str, pattern: str) -> Callable[[Route], Route]:
    """pattern: of the raw path; {repo} is org/name or a name, {x} a part without slash, {x*} the rest."""
    pattern = pattern.replace("{repo}", "(?P<repo>[^/]+(?:/[^/]+)?)")
    pattern = re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", pattern)
    compiled = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern))

    def register(function: Route) -> Route:
        _ROUTES.append((place, methods, compiled, function))
        return function

    return register


def answer(hub: LocalHub, place: str, call: Call) -> Answer:
    for where, methods, pattern, function in _ROUTES:
        match = pattern.fullmatch(call.path)
        if where == place and call.method in methods.split() and match:
            user = hub.store.user(call.token) if place == "hub" else None
            return function(
                hub, call, user, {name: unquote(text) for name, text in match.groupdict().items() if text}
            )
    raise Refused(404, None, f"Sorry, we can't find the page you are looking for: {call.method} {call.path}")
