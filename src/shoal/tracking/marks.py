"""RUN/tracking.json: which run of each tracker this run is, and up to which step it was sent."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from shoal.lock import write_text

FILE = "tracking.json"


@dataclass(frozen=True)
class Mark:
    """id: of the tracker's run. place: what it belongs to, such as a project. step: the last one sent, -1 for none."""

    id: str
    place: str = ""
    step: int = -1


class Marks:
    """The marks of a run by tracker. A file that cannot be read counts as none: then all is sent to new runs."""

    def __init__(self, run: Path) -> None:
        self._path = run / FILE
        self._marks: dict[str, Mark] = {}
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            self._marks = {
                str(name): Mark(str(of["id"]), str(of["place"]), int(of["step"]))
                for name, of in content.items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass

    def get(self, tracker: str) -> Mark | None:
        return self._marks.get(tracker)

    def put(self, tracker: str, mark: Mark) -> None:
        """Durable on return."""
        self._marks[tracker] = mark
        content = {name: asdict(one) for name, one in self._marks.items()}
        write_text(self._path, json.dumps(content, indent=1) + "\n")

    def sent(self, tracker: str, step: int) -> None:
        self.put(tracker, replace(self._marks[tracker], step=step))
