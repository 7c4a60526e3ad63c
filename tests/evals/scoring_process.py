"""A scorer in another process: takes weights by the update protocol and scores with lm-eval's `hf` class.

    python scoring_process.py MODEL_FOLDER

reads messages from stdin and answers each on stdout: one line of JSON, then as many bytes as it says. Tensors come as
the bytes of a safetensors file. Only config and tokenizer are read from the folder, never weights.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from shoal.errors import ShoalError
from shoal.evals.quiet import quiet_libraries
from shoal.evals.updates import ModuleWeights

PREFIX = 3


class PrefixLM(HFLM):  # type: ignore[misc]
    """As HFLM, a request at a time, and remembers keys, values and logits of the first tokens of every row."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        with quiet_libraries():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.prefixes: dict[tuple[int, ...], tuple[torch.Tensor, Any]] = {}

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        with torch.inference_mode():
            if inps.shape[1] <= PREFIX:
                return self.model(inps).logits
            key = tuple(inps[0, :PREFIX].tolist())
            if key not in self.prefixes:
                done = self.model(inps[:, :PREFIX], use_cache=True)
                self.prefixes[key] = done.logits, done.past_key_values
            logits, held = self.prefixes[key]
            rest = self.model(inps[:, PREFIX:], past_key_values=copy.deepcopy(held), use_cache=True).logits
            return torch.cat([logits, rest], dim=1)

    def score(self, requests: Sequence[Sequence[str]]) -> list[tuple[float, bool]]:
        instances = [
            Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)
            for context, continuation in requests
        ]
        with quiet_libraries():
            return [
                (float(ll), bool(greedy)) for ll, greedy in self.loglikelihood(instances, disable_tqdm=True)
            ]


def serve(folder: Path, read: Any, write: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    lm = PrefixLM(model, AutoTokenizer.from_pretrained(folder))
    sink = ModuleWeights(model, lm.prefixes.clear, complete=False)

    def score(message: dict[str, Any], payload: bytes) -> Any:
        sink.require_complete()
        return lm.score(message["requests"])

    calls: dict[str, Callable[[dict[str, Any], bytes], Any]] = {
        "begin_update": lambda message, payload: sink.begin_update(),
        "update": lambda message, payload: sink.update(list(safetensors.torch.load(payload).items())),
        "finish_update": lambda message, payload: sink.finish_update(),
        "abort_update": lambda message, payload: sink.abort_update(),
        "score": score,
    }
    for line in read:
        message = json.loads(line)
        payload = read.read(message["bytes"])
        try:
            answer: dict[str, Any] = {"answer": calls[message["call"]](message, payload)}
        except ShoalError as error:
            answer = {"error": str(error)}
        write.write(json.dumps(answer).encode() + b"\n")
        write.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(Path(sys.argv[1]), sys.stdin.buffer, answers)
