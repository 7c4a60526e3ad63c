"""What a group or tag of lm-eval stands for: its single tasks, in the order in which lm-eval itself loads them.

Read from lm-eval's index of names, so that nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# what a group says of itself or of how a member is shown; anything else changes how the member is scored
_SHOWN = {
    "aggregate_metric_list",
    "alias",
    "group",
    "group_alias",
    "metadata",
    "tag",
    "task",
    "task_alias",
}


@dataclass(frozen=True)
class Leaf:
    """A single task. changed: settings that a group sets for it, so that its name alone does not say what is scored.

    found: whether the index has the name; inline: whether it is instead written out within its group.
    """

    name: str
    changed: tuple[str, ...] = ()
    found: bool = True
    inline: bool = False


def leaves(index: Mapping[str, Any], name: str, changed: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """The single tasks of an lm-eval task, group or tag; itself where it is a task. index: `TaskManager.task_index`."""
    entry = index.get(name)
    if entry is None:
        yield Leaf(name, changed, found=False)
    elif entry.kind.name == "TAG":
        yield from (Leaf(task, changed) for task in sorted(entry.tags) if task in index)
    elif entry.kind.name == "GROUP":
        yield from _of_group(index, entry.cfg, changed)
    else:
        yield Leaf(name, changed)


def _of_group(index: Mapping[str, Any], group: Mapping[str, Any], changed: tuple[str, ...]) -> Iterator[Leaf]:
    changed = _added(changed, group)
    members = group.get("task")
    for member in members if isinstance(members, list) else ():
        if isinstance(member, str):
            yield from leaves(index, member, changed)
        elif "group" in member:
            if member["group"] in index:
                yield from leaves(index, member["group"], _added(changed, member))
            else:
                yield from _of_group(index, member, changed)
        elif member["task"] in index:
            yield from leaves(index, member["task"], _added(changed, member))
        else:
            yield Leaf(str(member["task"]), _added(changed, member), found=False, inline=True)


def _added(changed: tuple[str, ...], entry: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*changed, *sorted(set(entry) - _SHOWN)]))
