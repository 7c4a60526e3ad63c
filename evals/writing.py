"""What a model writes to prompts of ours: greedily, to its end token, all prompts in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoal.errors import EvaluationError
from shoal.evals.quiet import quiet_libraries
from shoal.types import Generated


class Writer:
    """Writes by `lm` (a ResidentLM) with the weights of the moment.

    chat: prompts are user messages in the tokenizer's chat template; system: an instruction before each prompt.
    able: whether the model is one that generates.
    """

    def __init__(self, lm: Any, chat: bool = False, system: str | None = None) -> None:
        self._lm, self._chat, self._system = lm, chat, system
        can_generate = getattr(lm.model, "can_generate", None)
        self.able = lm.backend == "causal" and can_generate is not None and bool(can_generate())

    def write(self, prompts: Sequence[str], most: int) -> tuple[Generated, ...]:
        """One text per prompt, of at most `most` tokens.

        In a short context a text gets half of it at most, and a prompt that does not fit loses its beginning. A
        repetition penalty of the model's own generation config counts, as it does where tasks generate.

        Raises:
            EvaluationError: the model is none that generates, or memory runs out at the smallest batch.
        """
        if not prompts:
            return ()
        if not self.able:
            raise EvaluationError(
                f"{type(self._lm.model).__name__} cannot generate, so it writes to no prompts"
            )
        most = max(1, min(most, self._lm.max_length // 2))
        room = self._lm.max_length - most
        with quiet_libraries():
            tokens = [self._lm.tokens_of("prompt", self._rendered(p), "")[0][-room:] for p in prompts]
            made = self._lm.greedy(tokens, most)
            if made is None:
                made = [self._by_transformers(prompt, most) for prompt in tokens]
        return tuple(self._text(one) for one in made)

    def _rendered(self, prompt: str) -> str:
        if not self._chat:
            return f"{self._system}\n\n{prompt}" if self._system else prompt
        lead = [{"role": "system", "content": self._system}] if self._system else []
        return str(self._lm.apply_chat_template([*lead, {"role": "user", "content": prompt}]))

    def _by_transformers(self, prompt: Sequence[int], most: int) -> list[int]:
        ids = torch.tensor([list(prompt)], device=self._lm.device)
        with torch.inference_mode(), self._lm.precision():
            made = self._lm.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=sorted(self._lm.ends),
                pad_token_id=self._lm.tokenizer.pad_token_id,
            )
        return [int(token) for token in made[0, len(prompt) :]]

    def _text(self, tokens: Sequence[int]) -> Generated:
        ended = bool(tokens) and tokens[-1] in self._lm.ends
        kept = tuple(tokens[:-1] if ended else tokens)
        return Generated(self._lm.tok_decode(list(kept)), kept, ended)
