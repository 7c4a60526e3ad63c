"""YAML from elsewhere: plain data only, of bounded size and depth, without aliases, tags or a key written twice."""

from __future__ import annotations

from typing import Any

import yaml

from shoal.errors import PublishError

MAX_BYTES = 64 << 20
MAX_DEPTH = 32
# written out they say no more than what a plain text is taken for anyway
_TAGS = (
    "!",
    *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")),
)


def read_yaml(text: str, where: str, limit: int = MAX_BYTES) -> Any:
    """The data of a YAML text.

    Raises:
        PublishError: not YAML, larger than `limit` bytes, nested too deep, or with aliases or tags (a file of some
            lines can stand for gigabytes by aliases, and tags name Python objects).
    """
    size = len(text.encode("utf-8", "replace"))
    if size > limit:
        raise PublishError(f"{where}: {size} bytes, expected at most {limit}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check(text, where, loader)
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise PublishError(f"{where}: not valid YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # a date that is none, a number that is too long
        raise PublishError(f"{where}: not valid YAML: {error}") from None


def _check(text: str, where: str, loader: Any) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            raise PublishError(f"{where}{_line(event)}: aliases are not allowed")
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _TAGS:
            raise PublishError(f"{where}{_line(event)}: tag {tag!r} is not allowed")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise PublishError(f"{where}{_line(event)}: nested deeper than {MAX_DEPTH}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _line(event: yaml.Event) -> str:
    return f":{event.start_mark.line + 1}" if event.start_mark is not None else ""
