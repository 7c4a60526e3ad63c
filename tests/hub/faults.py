"""Faults on demand: what a local Hub does wrong, to which requests, and how often."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["cut-request", "cut-response", "lose-response", "status", "corrupt", "first"]


@dataclass
class Fault:
    """kind:

    cut-request: the connection ends when half of the request's body has arrived
    cut-response: the connection ends when half of the response's body was sent
    lose-response: the request is carried out, its response never sent
    status: the request is answered by `status` with `headers`, and not carried out
    corrupt: one byte of the response's body is another
    first: `action` is called before the request is carried out

    pattern: regular expression that "METHOD /path" must contain. times: how often (None: always). after: matching
    requests to leave alone first.
    """

    kind: Kind
    pattern: str
    times: int | None = 1
    after: int = 0
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    action: Callable[[], object] = lambda: None


class Faults:
    """Faults that wait for their request, and those that happened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Fault] = []
        self.happened: list[tuple[Kind, str]] = []

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._waiting.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()

    def pick(self, request: str) -> Fault | None:
        """The first waiting fault that this request meets."""
        with self._lock:
            for fault in self._waiting:
                if not re.search(fault.pattern, request):
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times == 0:
                        self._waiting.remove(fault)
                self.happened.append((fault.kind, request))
                return fault
        return None
