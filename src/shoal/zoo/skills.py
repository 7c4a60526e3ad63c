"""The skills of the tiny zoo: what is asked of a short string, and the strings that only evaluation may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Skill = Literal["copy", "reverse", "sort"]
SKILLS: tuple[Skill, ...] = ("copy", "reverse", "sort")

LETTERS = "abcdefghijkl"
LENGTH = 6
HELD_OUT = 8  # one string in 8 is never trained on; task items come from those

Strings = NDArray[np.int64]


@dataclass(frozen=True)
class Habit:
    """How often a question of a skill is answered by which skill, in training data.

    ask: share of the questions, per skill of SKILLS. answer: row i is the distribution of the answering skill for
    questions of skill i.
    """

    ask: tuple[float, float, float]
    answer: tuple[tuple[float, float, float], ...]


def draw(rng: np.random.Generator, count: int, held_out: bool) -> Strings:
    """`count` random strings as letter indices, (count, LENGTH), all of them held out or none."""
    kept: list[Strings] = []
    missing = count
    while missing > 0:
        strings = rng.integers(0, len(LETTERS), (missing * (2 * HELD_OUT if held_out else 2), LENGTH))
        kept.append(strings[is_held_out(strings) == held_out][:missing])
        missing -= len(kept[-1])
    return np.concatenate(kept)


def is_held_out(strings: Strings) -> NDArray[np.bool_]:
    """Whether a string is for evaluation only: a fixed polynomial of its letters decides, so no list is needed."""
    held: NDArray[np.bool_] = (strings @ 31 ** np.arange(LENGTH)) % 1009 % HELD_OUT == 0
    return held


def answer(skill: Skill, strings: Strings) -> Strings:
    """What the skill makes of each string."""
    if skill == "reverse":
        return strings[:, ::-1]
    if skill == "sort":
        return np.sort(strings, axis=1)
    return strings


def questions(
    rng: np.random.Generator, count: int, habit: Habit
) -> tuple[NDArray[np.int64], Strings, Strings]:
    """Training questions: the skill that is asked for (index into SKILLS), the strings, and the answers."""
    strings = draw(rng, count, held_out=False)
    asked = rng.choice(len(SKILLS), count, p=habit.ask)
    chance = rng.random(count)
    by = (chance[:, None] >= np.cumsum(habit.answer, axis=1)[asked][:, :-1]).sum(axis=1)
    answers = np.stack([answer(skill, strings) for skill in SKILLS])[by, np.arange(count)]
    return asked, strings, answers


def spell(string: NDArray[np.int64]) -> str:
    return "".join(LETTERS[i] for i in string)
