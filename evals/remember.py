"""What an lm-eval task says of an item, asked once: its templates are compiled and rendered anew at every call otherwise.

`process_results` asks for text, target and choices of each item of each candidate, which takes longer than the forward
pass of a short item. They depend on the item alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_ASKED = ("doc_to_text", "doc_to_target", "doc_to_choice")


def remember(task: Any) -> None:
    """Let `task` (lm-eval's) remember what it says of items, for as long as both live."""
    for name in _ASKED:
        found = getattr(task, name, None)
        if found is not None and not isinstance(found, _Remembered):
            setattr(task, name, _Remembered(found))


@contextmanager
def compiled_once() -> Iterator[None]:
    """Within this block lm-eval compiles every template once, and not again for each item: most of what prompts cost.

    It changes lm-eval's environment for the block: not for several threads at once.
    """
    from lm_eval.utils import env

    compiled: Any = env.from_string
    env.from_string = cache(compiled)
    try:
        yield
    finally:
        env.from_string = compiled


class _Remembered:
    """A method of one item, by the item's identity: it is kept beside the answer, so that no other can take its place."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self._known: dict[int, tuple[Any, Any]] = {}

    def __call__(self, doc: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self._method(doc, *args, **kwargs)
        found = self._known.get(id(doc))
        if found is None:
            found = self._known[id(doc)] = (doc, self._method(doc))
        answer = found[1]
        return list(answer) if isinstance(answer, list) else answer
