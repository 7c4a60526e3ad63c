"""lm-eval's `hf` model class on a model that stays in memory while its weights change.

Differences to the stock class, none of which changes a number beyond rounding (tests compare them): requests are
tokenised once and remembered, logits are computed at target positions only (rows are padded on the left, so that
those are the last ones), and the log-softmax is taken in float32.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from shoal.errors import EvaluationError

Encoded = tuple[list[int], list[int]]


class ResidentLM(HFLM):  # type: ignore[misc]
    """As HFLM, for a model object. max_rows: rows per batch; halved by `shrink` when memory runs out."""

    def __init__(self, model: Any, tokenizer: Any, max_rows: int, **kwargs: Any) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=max_rows, **kwargs)
        accepted = inspect.signature(model.forward).parameters
        self._sparse_logits = self.backend == "causal" and {"logits_to_keep", "position_ids"} <= set(accepted)
        self._encoded: dict[tuple[str, str], Encoded] = {}

    def shrink(self) -> int:
        """Halve the batch; 0 when it cannot be made smaller."""
        if self.batch_size_per_gpu <= 1:
            return 0
        self.batch_size_per_gpu //= 2
        return int(self.batch_size_per_gpu)

    def encode(self, context: str, continuation: str) -> Encoded:
        """Token ids of context and continuation exactly as lm-eval splits them, remembered."""
        key = (context, continuation)
        if key not in self._encoded:
            if context == "":
                tokens = self.tok_encode(continuation, add_special_tokens=False)
                start = self.prefix_token_id
                self._encoded[key] = ([start], tokens) if tokens[0] != start else (tokens[:1], tokens[1:])
            else:
                self._encoded[key] = self._encode_pair(context, continuation)
        return self._encoded[key]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise EvaluationError(
                "enable_thinking: true works with generation tasks only, not with log-likelihoods"
            )
        encoded = [(request.args, *self.encode(*request.args[:2])) for request in requests]
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not self._sparse_logits:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)  # type: ignore[no-any-return]
        # requests that differ in their last token only share one row
        rows: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
            rows[tuple(tokens), len(continuation)].append(index)
        ordered = sorted(rows, key=lambda row: (-len(row[0]), row))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        size = int(override_bs or self.batch_size)
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            logprobs = self._last_logprobs([row[0] for row in batch], max(row[1] for row in batch))
            for row, values in zip(batch, logprobs, strict=True):
                length = row[1]
                picked = values[-length:]
                greedy = picked.argmax(dim=-1).tolist()
                for index in rows[row]:
                    target = requests[index][2]
                    chosen = picked.gather(1, torch.tensor(target, device=picked.device).unsqueeze(1))
                    results[index] = (float(chosen.sum()), greedy == target)
        return results

    def _last_logprobs(self, rows: list[tuple[int, ...]], keep: int) -> torch.Tensor:
        """Log-probabilities at the last `keep` positions of each row: float32 [rows, keep, vocabulary]."""
        width = max(len(row) for row in rows)
        keep = min(keep, width)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        even = bool(mask.all())
        with torch.inference_mode():
            logits = self.model(
                input_ids=ids.to(self.device),
                attention_mask=None if even else mask.to(self.device),
                position_ids=positions.to(self.device),
                logits_to_keep=keep,
                use_cache=False,
            ).logits
            return torch.log_softmax(logits.float(), dim=-1)
