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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Form:
    """How the objective of an item follows from the log-likelihoods of its requests, in the scorer's order of them.

    first: index of the first request that counts. lengths: of those that count, tokens (rolling: bytes). gold: indices
    of the right options of a multiple choice; None for one answer, whose probability per token it is.
    """

    first: int
    lengths: tuple[int, ...]
    gold: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Tokens (bytes) that count."""
        return sum(self.lengths)

    def value(self, logliks: Sequence[float]) -> float | None:
        """The objective; None where no option is gold. logliks: of all requests of the item, nats."""
        mine = logliks[self.first : self.first + len(self.lengths)]
        if self.gold is None:
            return answer_objective(mine[0], self.lengths[0])
        return choice_objective(mine, self.lengths, self.gold)

    def differentiable(self, logliks: Tensor) -> Tensor | None:
        """The same of a tensor [requests], as a float64 scalar that gradients flow through."""
        import torch

        mine = logliks[self.first : self.first + len(self.lengths)].double()
        lengths = torch.tensor([max(1, n) for n in self.lengths], dtype=torch.float64, device=mine.device)
        if self.gold is None:
            return (mine[0] / lengths[0]).clamp(max=0.0).exp()
        right = [g for g in self.gold if 0 <= g < len(self.lengths)]
        if not right:
            return None
        return torch.softmax(mine / lengths * lengths.mean(), dim=0)[right].sum()


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


def form_of(
    lm: Any, source: Any, doc: dict[str, Any], instances: Sequence[Any], gold: Any | None
) -> Form | None:
    """The form of an item's objective; None where it has none (generation without a gold answer).

    lm: encodes (`ResidentLM.encode`). source: the task (`TaskSource`). instances: the item's requests. gold: its gold
    answer's, teacher-forced, which the scorer puts last; generation requests have no log-likelihood and are not counted.
    """

    def length(instance: Any) -> int:
        return len(lm.encode(*instance.args[:2])[1])

    before = sum(instance.request_type != "generate_until" for instance in instances)
    if gold is not None:
        return Form(before, (length(gold),))
    if not instances or instances[0].request_type == "generate_until":
        return None
    if source.output_type == "multiple_choice":
        count = len(source.task.doc_to_choice(doc))
        lengths = tuple(length(instance) for instance in instances[:count])
        if source.task.multiple_input:  # the options are contexts that share one continuation
            lengths = (1,) * count
        return Form(0, lengths, tuple(gold_options(source.task, doc)))
    if instances[0].request_type == "loglikelihood_rolling":
        return Form(0, (len(str(instances[0].args[0]).encode()),))
    return Form(0, (length(instances[0]),))
