"""lm-eval's index of its own tasks, kept on disk: it reads some 14,000 files for it, at every start, for ten seconds.

The kept index is used as long as none of those files was added, removed or changed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shoal.cache import cache_folder
from shoal.lock import write_bytes

FORMAT = 1  # of the kept file


@contextmanager
def kept_index() -> Iterator[None]:
    """Within this block lm-eval's `TaskManager` takes the index of lm-eval's own folder from the cache, if it is there.

    It changes lm-eval's class for the block: not for several threads at once.
    """
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    own, build = Path(lm_eval.tasks.__file__).parent, TaskIndex.build
    patched: Any = TaskIndex

    def kept(paths: Iterable[Path], **options: Any) -> Any:
        roots = list(paths)
        if options or roots[:1] != [own]:
            return build(roots, **options)
        # as lm-eval does it: what later folders name replaces what earlier ones do
        return _own(own, build) | build(roots[1:])

    patched.build = staticmethod(kept)
    try:
        yield
    finally:
        patched.build = staticmethod(build)


def _own(folder: Path, build: Any) -> dict[str, Any]:
    state = _state(folder)
    file = cache_folder() / "lm-eval" / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json.gz"
    # none there, or a broken one: built anew
    with suppress(OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError):
        found = json.loads(gzip.decompress(file.read_bytes()))
        if found["format"] == FORMAT and found["state"] == state:
            return {name: _entry(name, *fields) for name, fields in found["entries"].items()}
    index: dict[str, Any] = build([folder])
    entries = {
        name: [entry.kind.name, entry.yaml_path and str(entry.yaml_path), entry.cfg, sorted(entry.tags)]
        for name, entry in index.items()
    }
    with suppress(OSError, ValueError, TypeError):  # a cache that cannot be written costs time only
        text = json.dumps({"format": FORMAT, "state": state, "entries": entries})
        if json.loads(text)["entries"] == entries:  # nothing in it that JSON has no word for
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, gzip.compress(text.encode(), 5))
    return index


def _entry(name: str, kind: str, path: str | None, config: Mapping[str, Any] | None, tags: list[str]) -> Any:
    from lm_eval.tasks._index import Entry, Kind

    return Entry(name, Kind[kind], path and Path(path), config, set(tags))


def _state(folder: Path) -> str:
    """A digest of name, size and time of every task file, those that others include among them."""
    files = []
    for place, _, _ in os.walk(folder):
        with os.scandir(place) as found:
            for file in found:
                if file.name.endswith("yaml"):  # `_default_template_yaml` and its like are included
                    status = file.stat()
                    files.append((file.path, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()
