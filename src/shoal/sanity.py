"""Is a finalist still a language model? What it writes to 16 fixed prompts, compared with what its parents write.

A merge can win multiple-choice items and yet repeat itself, never end, or write garbage, which no log-likelihood
shows. The guard compares with the parents only: what a parent does too is no reason to turn a merge away.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import EvaluationError

MAX_TOKENS = 128  # to generate per prompt, greedily
GRAM = 4

# margins beyond the parents' range, wide enough that an odd text among 16 decides nothing
ENDED_MARGIN = 0.25  # share of texts: 4 of 16
ENDED_NONE = 0.125  # none ends: too few, where every parent ends this share or more
DISTINCT_MARGIN = 0.2
LENGTH_FACTOR = 4.0
BROKEN_MARGIN = 0.125  # share of texts: 2 of 16
BROKEN_CHARACTERS = 0.05  # of a text, above which it counts as broken

# half are requests, half are beginnings: base models and instruction-tuned ones both have something to go on
PROMPTS: tuple[str, ...] = (
    "Write two sentences about what you can see from a train window.",
    "Explain to a child why the sky gets dark at night.",
    "List five things to pack for a weekend at the sea.",
    "How do I make a simple tomato soup?",
    "Write a short thank-you note to a neighbour who watered the plants.",
    "What is the difference between a lake and a river?",
    "Give three tips for falling asleep more easily.",
    "Translate into plain words: the meeting has been adjourned until further notice.",
    "The old bakery on the corner opened before sunrise, and",
    "Yesterday my sister called to tell me that",
    "To repair a flat bicycle tyre, first",
    "Water boils when it is heated because",
    "Dear Sir or Madam,\n\nI am writing to ask about",
    "The three most common colours of cars are",
    "Once the rain had stopped, the children",
    "Question: How many days does a week have?\nAnswer:",
)


@dataclass(frozen=True)
class Generated:
    """One text written to a prompt, without the prompt.

    tokens: ids of what was generated, an end token not among them. ended: the model itself ended it, by an end token
    before MAX_TOKENS.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool


@dataclass(frozen=True)
class Sanity:
    """What `measure` found over all prompts.

    ended: share of texts that ended properly. distinct: distinct 4-grams of tokens per 4-gram, over all texts (Li et
    al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", distinct-n with n = 4);
    1 where no text has four tokens. length: mean number of tokens. broken: share of texts that are none.
    """

    texts: int
    ended: float
    distinct: float
    length: float
    broken: float


def measure(generated: Sequence[Generated]) -> Sanity:
    """Raises EvaluationError without texts."""
    if not generated:
        raise EvaluationError("sanity guard: expected the texts of at least one prompt, found none")
    n = len(generated)
    grams = [g.tokens[i : i + GRAM] for g in generated for i in range(len(g.tokens) - GRAM + 1)]
    return Sanity(
        texts=n,
        ended=sum(g.ended for g in generated) / n,
        distinct=len(set(grams)) / len(grams) if grams else 1.0,
        length=sum(len(g.tokens) for g in generated) / n,
        broken=sum(is_broken(g) for g in generated) / n,
    )


def is_broken(generated: Generated) -> bool:
    """Nothing readable (no letter and no digit), or more than 5% of characters that are none.

    Those are replacement characters, control characters but for white space, lone surrogates, private and unassigned
    code points. A replacement character at the end of a text that was cut off is half a character, not a broken one.
    """
    text = generated.text if generated.ended else generated.text.rstrip("\ufffd")
    if not any(c.isalnum() for c in text):
        return True
    bad = sum(c == "\ufffd" or (unicodedata.category(c) in _BAD and c not in "\n\r\t\f\v") for c in text)
    return bad > BROKEN_CHARACTERS * len(text)


_BAD = frozenset({"Cc", "Cs", "Co", "Cn"})


def degenerate(finalist: Sanity, parents: Sequence[Sanity]) -> str | None:
    """Why a finalist is no usable model next to its parents, in one line; None where it is no worse than they are.

    Each statistic is compared with the parents' range, with a margin: it ends over 4 in 16 texts fewer than the worst
    parent (or none, where every parent ends 2), distinct-4 lies over 0.2 under the lowest, its texts are on average
    under a quarter of the shortest parent's or over four times the longest's, or 2 in 16 more are broken than of the
    worst.

    Raises EvaluationError without parents, or where the numbers of texts differ.
    """
    if not parents or any(p.texts != finalist.texts for p in parents):
        raise EvaluationError(
            f"sanity guard: expected parents with {finalist.texts} texts each, found {[p.texts for p in parents]}"
        )
    n, slack = finalist.texts, 1e-9
    reasons = []
    ends = [p.ended for p in parents]
    if finalist.ended < min(ends) - ENDED_MARGIN - slack or (finalist.ended == 0 and min(ends) >= ENDED_NONE):
        reasons.append(f"ends {_of(finalist.ended, n)} texts, parents {_span(ends, n)}")
    distinct = [p.distinct for p in parents]
    if finalist.distinct < min(distinct) - DISTINCT_MARGIN - slack:
        reasons.append(
            f"repeats itself: {finalist.distinct:.2f} of its 4-grams are distinct, of the parents'"
            f" {min(distinct):.2f} to {max(distinct):.2f}"
        )
    lengths = [p.length for p in parents]
    if finalist.length * LENGTH_FACTOR < min(lengths) or finalist.length > max(lengths) * LENGTH_FACTOR:
        reasons.append(
            f"writes {finalist.length:.0f} tokens a text, parents {min(lengths):.0f} to {max(lengths):.0f}"
        )
    broken = [p.broken for p in parents]
    if finalist.broken > max(broken) + BROKEN_MARGIN - slack:
        reasons.append(f"{_of(finalist.broken, n)} texts are broken, parents {_span(broken, n)}")
    return "; ".join(reasons) or None


def _of(share: float, n: int) -> str:
    return f"{round(share * n)} of {n}"


def _span(shares: Sequence[float], n: int) -> str:
    low, high = round(min(shares) * n), round(max(shares) * n)
    return f"{low}" if low == high else f"{low} to {high}"
