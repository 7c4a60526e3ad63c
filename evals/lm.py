"""lm-eval's model `shoal`: loads whatever `hf` loads, with the same arguments, and scores as shoal does.

lm_eval.simple_evaluate(model="shoal", model_args={"pretrained": "org/name", "dtype": "bfloat16"}, tasks=[...])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shoal.errors import EvaluationError
from shoal.evals.limits import out_of_memory
from shoal.evals.resident import ResidentLM


class ShoalLM(ResidentLM):
    """A ResidentLM for callers other than a Scorer: it halves its batches by itself when memory runs out."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._within_memory(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._within_memory(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._within_memory(super().generate_until, requests, disable_tqdm)

    def _within_memory(self, run: Callable[..., list[Any]], requests: list[Any], quiet: bool) -> list[Any]:
        """The answers, with the batch halved as often as memory asks for.

        Raises:
            EvaluationError: memory runs out at a batch that cannot be made smaller.
        """
        while True:
            try:
                return run(requests, disable_tqdm=quiet)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if not self.shrink():
                    raise EvaluationError(
                        "out of memory at the smallest batch; free memory, or use a smaller dtype"
                    ) from error
