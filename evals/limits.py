"""How much memory a forward pass needs, what fits under a limit, and what to do when memory runs out all the same.

Nobody can limit torch's memory on a CPU, so a limit is kept by batches that are small enough from the start.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from shoal.errors import EvaluationError

T = TypeVar("T")

_MIB = 1 << 20
_KEPT = 1.4  # measured 1.0 to 1.8: what an allocator holds, for every byte in use
# what allocators, libraries and the scheduler of threads say when there is no more; all lower case
_EXHAUSTED = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "alloc_failed",
    "could not create a memory object",
)


@dataclass(frozen=True)
class MemoryLimit:
    """What this process may use in all, in bytes; None: no limit."""

    bytes: int | None = None

    def left(self) -> int | None:
        """Bytes that are left now, at least 0. Ask once models are loaded and before the first batch.

        Pages of mapped files are not counted: the system takes them back when it needs them. Memory that an allocator
        keeps from earlier batches is, although the next batch may use it again.
        """
        if self.bytes is None:
            return None
        import psutil

        info = psutil.Process().memory_info()
        return max(0, self.bytes - (info.rss - getattr(info, "shared", 0)))

    def tokens(
        self,
        config: Any,
        dtype: torch.dtype,
        targets_share: float,
        most: int,
        scores: int = 0,
        logit_bytes: int = 8,
    ) -> int:
        """Tokens of a batch that fit into what is left, at most `most`; the other arguments are of tokens_that_fit.

        Raises:
            EvaluationError: not even one token fits.
        """
        left = self.left()
        if left is None or self.bytes is None:
            return most
        fit = tokens_that_fit(config, dtype, left, targets_share, scores, logit_bytes)
        if not fit:
            need = forward_bytes(config, dtype, 1, 1, scores, logit_bytes)
            raise EvaluationError(
                f"memory limit of {_size(self.bytes)}: {_size(left)} are left beside the models, and a forward pass of"
                f" one token needs {_size(need)}; raise the limit"
            )
        return min(most, fit)


def forward_bytes(
    config: Any, dtype: torch.dtype, tokens: int, targets: int, scores: int = 0, logit_bytes: int = 8
) -> int:
    """Estimate of the most bytes that a forward pass without gradients holds beside the weights.

    config: of a causal LM of transformers. tokens: in the batch, padding included. targets: positions whose logits are
    computed. scores: keys per token where attention writes its scores down (eager attention, soft caps); 0 for fused
    kernels, which do not. logit_bytes: 8 where all logits and their log-softmax are there in float32 at once; the size of
    a logit where they are normalised in pieces.

    The most of: one layer's attention, its MLP, the logits. Within a factor of 2 of the peaks measured with Llamas on a
    CPU.
    """
    shape = _Shape.of(config)
    size = dtype.itemsize
    # held throughout: the embeddings, the layer's input, the residual stream and its normed copy
    stream = 4 * shape.hidden * size
    # queries and keys before and after their rotation, values, output; keys and values repeated for grouped heads
    attention = (4 * shape.queries + 3 * shape.keys_values) * size
    # scores before and after their softmax in float32, to which others are copied first
    attention += shape.heads * scores * (8 if size == 4 else 8 + size)
    mlp = 3 * shape.inner * size
    layer = int(_KEPT * tokens * (stream + max(attention, mlp)))
    logits = targets * shape.vocabulary * logit_bytes
    return max(layer, 2 * tokens * shape.hidden * size + logits)


def tokens_that_fit(
    config: Any,
    dtype: torch.dtype,
    limit_bytes: int,
    targets_share: float,
    scores: int = 0,
    logit_bytes: int = 8,
) -> int:
    """The most tokens of a forward pass that `forward_bytes` puts within limit_bytes; 0: not even one.

    targets_share: targets per token, in [0, 1]; at least one target is counted.
    """

    def fits(tokens: int) -> bool:
        targets = max(1, math.ceil(tokens * targets_share))
        return forward_bytes(config, dtype, tokens, targets, scores, logit_bytes) <= limit_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def run_halving(run: Callable[[], T], shrink: Callable[[], int], told: Callable[[str], None]) -> T:
    """run(), again with smaller batches whenever memory runs out.

    shrink: makes the batches of `run` smaller and says their size, 0 when that cannot be. told: hears of every halving.

    Raises:
        EvaluationError: memory runs out at the smallest batch as well.
    """
    while True:
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            size = shrink()
            if not size:
                raise EvaluationError(
                    "out of memory at the smallest batch; free memory, or use a smaller dtype"
                ) from error
        # outside of the handler: the exception holds the frames of the failed pass, and those its tensors
        _release()
        told(f"out of memory: batch halved to {size}")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _EXHAUSTED)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Shape:
    """Widths of a decoder layer, in elements per token. queries: of all heads; inner: of the MLP, or of active experts."""

    hidden: int
    heads: int
    queries: int
    keys_values: int
    inner: int
    vocabulary: int

    @staticmethod
    def of(config: Any) -> _Shape:
        config = config.get_text_config()
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        head = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        inner = next((n for name in _INNER if isinstance(n := getattr(config, name, None), int)), 4 * hidden)
        expert = getattr(config, "moe_intermediate_size", None) or inner
        active = getattr(config, "num_experts_per_tok", None)
        if isinstance(active, int) and isinstance(expert, int):
            inner = max(inner, active * expert)
        return _Shape(hidden, heads, heads * head, 2 * kv_heads * head, inner, int(config.vocab_size))


_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


def _size(count: int) -> str:
    return f"{count / _MIB:,.1f} MiB"
