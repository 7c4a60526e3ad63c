"""The smooth objective of an item: a number in [0, 1] that moves before the metric does, and with it.

Multiple choice: probability of the gold option after a softmax over the options' log-likelihoods per token, times the
options' mean length: lengths are levelled, and options of one length keep their own log-likelihoods (without that factor
the softmax of long options is so flat that a solved task goes on rewarding larger margins). One continuation, or
generation: probability per token (geometric mean) of the gold answer, teacher-forced. Rolling: per byte.

Probabilities, not their logarithms: a mean of logarithms is ruled by items that are answered wrongly with confidence,
and ranks a model that knows nothing above an expert of one task of two. See docs/design.md, "Smooth objective".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def choice_objective(logliks: Sequence[float], tokens: Sequence[int], gold: Sequence[int]) -> float | None:
    """Probability of the gold option(s); None where no option is gold.

    logliks, tokens: per option, nats and number of tokens. gold: indices of right options.
    """
    right = [g for g in gold if 0 <= g < len(logliks)]
    if not right:
        return None
    lengths = [max(1, n) for n in tokens]
    mean = sum(lengths) / len(lengths)
    normalised = [ll / n * mean for ll, n in zip(logliks, lengths, strict=True)]
    top = max(normalised)
    total = math.fsum(math.exp(x - top) for x in normalised)
    return math.fsum(math.exp(normalised[g] - top) for g in right) / total


def answer_objective(loglik: float, length: int) -> float:
    """Probability per token (or byte) of the gold answer: the geometric mean."""
    return math.exp(min(0.0, loglik / max(1, length)))


def gold_options(task: Any, doc: dict[str, Any]) -> list[int]:
    """Indices of the right options of a multiple-choice item, as lm-eval's own scoring finds them."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    values = gold if isinstance(gold, list) else [gold]
    choices: list[str] | None = None
    found = []
    for value in values:
        if isinstance(value, str):
            choices = choices if choices is not None else task.doc_to_choice(doc)
            found += [choices.index(value)] if value in choices else []
        else:
            found.append(int(value))
    return found
