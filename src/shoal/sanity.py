"""Is a finalist still a language model? What it writes to 16 fixed prompts, compared with what its parents write.

A merge can win multiple-choice items and yet repeat itself, never end, or write garbage, which no log-likelihood
shows. The guard compares with the parents only: what a parent does too is no reason to turn a merge away.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.errors import EvaluationError
from shoal.types import Generated

MAX_TOKENS = 128  # to generate per prompt, greedily
GRAM = 4

# margins beyond the parents' range, wide enough that an odd text among 16 decides nothing
ENDED_MARGIN = 0.25  # share of texts: 4 of 16
ENDED_NONE = 0.125  # none ends: too few, where every parent ends this share or more
DISTINCT_MARGIN = 0.2
LENGTH_FACTOR = 4.0
LENGTH_FINE = 32.0  # mean tokens a text, up to which nothing is too long, however little the parents write
BROKEN_MARGIN = 0.125  # share of texts: 2 of 16, and half as many again as of the worst parent
BROKEN_CHARACTERS = 0.05  # of a text, above which it counts as broken

# half are requests, half are beginnings: base models and instruction-tuned ones both have something to go on; a request
# ends in a cue, without which a model that is asked outside its chat template has nothing to add
PROMPTS: tuple[str, ...] = (
    "Task: Write two sentences about what you can see from a train window.\nAnswer:",
    "Task: Explain to a child why the sky gets dark at night.\nAnswer:",
    "Task: List five things to pack for a weekend at the sea.\nAnswer:",
    "Question: How do I make a simple tomato soup?\nAnswer:",
    "Task: Write a short thank-you note to a neighbour who watered the plants.\nAnswer:",
    "Question: What is the difference between a lake and a river?\nAnswer:",
    "Task: Give three tips for falling asleep more easily.\nAnswer:",
    "Task: Translate into plain words: the meeting has been adjourned until further notice.\nAnswer:",
    "The old bakery on the corner opened before sunrise, and",
    "Yesterday my sister called to tell me that",
    "To repair a flat bicycle tyre, first",
    "Water boils when it is heated because",
    "Dear Sir or Madam,\n\nI am writing to ask about",
    "The three most common colours of cars are",
    "Once the rain had stopped, the children",
    "Question: How many days does a week have?\nAnswer:",
)
# texts to other prompts, or of another length, are no texts to compare with
PROMPTS_SHA256 = hashlib.sha256(json.dumps([PROMPTS, MAX_TOKENS]).encode()).hexdigest()


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


@dataclass(frozen=True)
class Written:
    """What one candidate wrote to PROMPTS, as it is journalled.

    texts, ended: in their order, without the prompts. sanity: None where it wrote nothing, for the reason `error`.
    Texts answer prompts of our own and hold no item of any task, so they may be published with a run.
    """

    candidate: str
    texts: tuple[str, ...]
    ended: tuple[bool, ...]
    sanity: Sanity | None
    error: str | None = None

    def event(self) -> dict[str, Any]:
        """As JSON can hold it; texts keyed by the prompt's number."""
        return {
            "candidate": self.candidate,
            "prompts": PROMPTS_SHA256,
            "texts": {str(number): text for number, text in enumerate(self.texts)},
            "ended": list(self.ended),
            "sanity": None if self.sanity is None else asdict(self.sanity),
            "error": self.error,
        }


def written(candidate: str, generated: Sequence[Generated]) -> Written:
    """Raises EvaluationError without texts."""
    return Written(
        candidate,
        tuple(g.text for g in generated),
        tuple(g.ended for g in generated),
        measure(generated),
    )


def read_written(events: Iterable[Mapping[str, Any]]) -> dict[str, Written]:
    """Candidate -> what it wrote, from the journal's events; those of other prompts are left out."""
    found = {}
    for event in events:
        if event["prompts"] == PROMPTS_SHA256:
            found[event["candidate"]] = Written(
                event["candidate"],
                tuple(event["texts"][str(number)] for number in range(len(event["texts"]))),
                tuple(event["ended"]),
                None if event["sanity"] is None else Sanity(**event["sanity"]),
                event["error"],
            )
    return found


def disqualified(finalists: Iterable[Written], parents: Iterable[Written]) -> dict[str, str]:
    """Candidate -> why it must not be chosen: it is degenerate next to the parents, or could not write at all.

    Raises:
        EvaluationError: a parent without texts, or no parent.
    """
    beside = list(parents)
    mute = next((parent for parent in beside if parent.sanity is None), None)
    if mute is not None:
        raise EvaluationError(f"sanity guard: {mute.candidate} wrote nothing to compare with: {mute.error}")
    found = [parent.sanity for parent in beside if parent.sanity is not None]
    reasons = {}
    for one in finalists:
        reason = f"could not write: {one.error}" if one.sanity is None else degenerate(one.sanity, found)
        if reason is not None:
            reasons[one.candidate] = reason
    return reasons


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
    under a quarter of the shortest parent's or over four times the longest's and 32 tokens, or 2 in 16 and half as
    many again are broken than of the worst. Parents that write under four tokens a text have no repetition to compare
    with.

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
    distinct = [p.distinct for p in parents if p.length >= GRAM]
    if distinct and finalist.distinct < min(distinct) - DISTINCT_MARGIN - slack:
        reasons.append(
            f"repeats itself: {finalist.distinct:.2f} of its 4-grams are distinct, of the parents'"
            f" {min(distinct):.2f} to {max(distinct):.2f}"
        )
    lengths = [p.length for p in parents]
    most = max(LENGTH_FINE, max(lengths) * LENGTH_FACTOR)
    if finalist.length * LENGTH_FACTOR < min(lengths) or finalist.length > most:
        reasons.append(
            f"writes {finalist.length:.0f} tokens a text, parents {min(lengths):.0f} to {max(lengths):.0f}"
        )
    broken = [p.broken for p in parents]
    if finalist.broken > max(broken) + max(BROKEN_MARGIN, max(broken) / 2) - slack:
        reasons.append(f"{_of(finalist.broken, n)} texts are broken, parents {_span(broken, n)}")
    return "; ".join(reasons) or None


def _of(share: float, n: int) -> str:
    return f"{round(share * n)} of {n}"


def _span(shares: Sequence[float], n: int) -> str:
    low, high = round(min(shares) * n), round(max(shares) * n)
    return f"{low}" if low == high else f"{low} to {high}"
