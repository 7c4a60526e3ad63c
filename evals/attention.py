"""Attention over a token tree, as an attention function of transformers.

The model's other layers see one stream of tokens [1, T]; here queries, keys and values are taken apart into the rows of
a batch (see `tree`), every row attends to itself, and what hangs on trunks attends to those too. Parts are joined by
their log-sum-exp: with o_i and l_i of the parts, the whole is sum(exp(l_i) o_i) / sum(exp(l_i)) (Milakov and
Gimelshein 2018, arXiv:1805.02867, section 3).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.errors import EvaluationError
from shoal.evals.tree import Batch, Link

NAME = "shoal_tree"
# what a model may hand to its attention function without changing what is computed here
_IGNORED = (
    "dropout",
    "position_ids",
    "cache_position",
    "use_cache",
    "past_key_values",
    "past_key_value",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "is_causal",
    "position_embeddings",
    "layer_idx",
)
_SCORES = 1 << 26  # elements of explicit scores at once
SHORT = 64  # rows that are better attended in float32 on a CPU
_BLOCK = 64  # queries of a block, where later keys are left out
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Unsupported(EvaluationError):
    """The model attends in a way that is unknown here; plain batches do."""


@dataclass(frozen=True)
class Options:
    """How a layer attends. window: a token sees itself and window - 1 tokens before; cap: soft cap of the scores."""

    scale: float
    window: int | None = None
    cap: float | None = None


class Attends(Protocol):
    """One forward pass. layer: how many layers have attended."""

    layer: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """query [1, heads, T, dim], key and value [1, kv heads, T, dim] -> [1, T, heads, dim]."""
        ...


_STATE = threading.local()  # attends: who attends for the model in this thread


@contextmanager
def implementing(model: Any) -> Iterator[None]:
    """Within this block the model's attention, in all threads, is what `attending` says."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def attending(model: Any, current: Attends) -> Iterator[None]:
    """Within this block, which is within one of `implementing`, the model attends by `current` in this thread.

    Raises:
        Unsupported: the model's attention does not go through transformers' attention functions.
    """
    _STATE.attends = current
    current.layer = 0
    try:
        yield
        if current.layer == 0:
            raise Unsupported(f"{type(model).__name__} has attention of its own")
    finally:
        del _STATE.attends


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    unknown = [name for name, value in others.items() if value is not None and name not in _IGNORED]
    if unknown or attention_mask is not None:
        raise Unsupported(f"attention with {unknown[0] if unknown else 'a mask of its own'} is unknown here")
    current: Attends = _STATE.attends
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = current.layer
    current.layer += 1
    return current.attend(layer, query, key, value, Options(scale, sliding_window, softcap)), None


@dataclass(frozen=True)
class Part:
    """Rows of one length on the device. index: [rows * length] into the stream; mask: additive [rows, 1, length, length].

    straight: where the stream's own order is the rows' order, their place in it.
    """

    rows: int
    length: int
    index: Tensor
    mask: Tensor | None
    positions: Tensor
    straight: tuple[int, int] | None

    def take(self, values: Tensor) -> Tensor:
        """[T, heads, dim] -> [rows, heads, length, dim]."""
        if self.straight is not None:
            taken = values[self.straight[0] : self.straight[1]]
        else:
            taken = values.index_select(0, self.index)
        return taken.reshape(self.rows, self.length, *values.shape[1:]).transpose(1, 2)


Kept = dict[tuple[int, int], tuple[Tensor, Tensor]]


@dataclass
class Pass:
    """A forward pass over one batch: its tensors on the device.

    kept: (layer, row) -> keys and values [1, kv heads, length, dim] of trunks, across the batches of a layout.
    """

    batch: Batch
    tokens: Tensor  # [1, T]
    positions: Tensor
    parts: tuple[Part, ...]
    back: Tensor | None
    wanted: Tensor
    reads: Tensor
    kept: Kept = field(default_factory=dict)
    layer: int = 0
    _masks: dict[tuple[int | Link, int], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(batch: Batch, dtype: torch.dtype, device: torch.device) -> Pass:
        if device.type == "cpu":
            dtype = torch.float32
        parts = tuple(_part(b.index, b.mask, b.positions, dtype, device) for b in batch.buckets)
        back = torch.from_numpy(batch.back)
        same = sum(p.rows * p.length for p in parts) == len(back) and bool(
            (back == torch.arange(len(back))).all()
        )
        return Pass(
            batch,
            torch.from_numpy(batch.tokens).unsqueeze(0).to(device),
            torch.from_numpy(batch.positions).unsqueeze(0).to(device),
            parts,
            None if same else back.to(device),
            torch.from_numpy(batch.wanted).to(device),
            torch.from_numpy(batch.reads).to(device),
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """Rows to themselves, then links to trunks."""
        dtype = query.dtype
        streams = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T, heads, dim]
        cpu = query.device.type == "cpu"
        total, heads, _ = streams[0].shape
        outs, sums = [], []
        for number, part in enumerate(self.parts):
            mask = self._own_mask(number, options.window, torch.float32 if cpu else dtype)
            q, k, v = (part.take(x) for x in streams)
            # float32 is faster on a CPU for small products
            if cpu and (part.length <= SHORT or mask is not None):
                q, k, v = q.float(), k.float(), v.float()
            out, lse = attention(q, k, v, mask, mask is None, options)
            outs.append(out.transpose(1, 2).reshape(part.rows * part.length, heads, -1).to(dtype))
            sums.append(lse.transpose(1, 2).reshape(part.rows * part.length, heads))
        whole = outs[0] if len(outs) == 1 else torch.cat(outs)
        weight = sums[0] if len(sums) == 1 else torch.cat(sums)
        if self.back is not None:
            whole = whole.index_select(0, self.back)
            weight = weight.index_select(0, self.back) if self.batch.links else weight
        for row, low, high in self.batch.keep:
            self.kept[layer, row] = (key[:, :, low:high].clone(), value[:, :, low:high].clone())
        for link in self.batch.links:
            if link.source is None:
                keys, values = self.kept[layer, link.row]
            else:
                keys, values = (x[:, :, link.source[0] : link.source[1]] for x in (key, value))
            span = slice(link.start, link.stop)
            mask = self._link_mask(link, keys.shape[2], options.window, query.dtype)
            out, lse = attention(query[:, :, span], keys, values, mask, False, options)
            join(whole[span], weight[span], out[0].transpose(0, 1), lse[0].transpose(0, 1))
        return whole.view(1, total, heads, -1)

    def _own_mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """The part's mask, narrowed by a sliding window that reaches less far than its rows. None: causal."""
        part = self.parts[number]
        if window is None or part.length <= window:
            return part.mask
        if (number, window) not in self._masks:
            shut = part.positions[:, :, None] - part.positions[:, None, :] >= window
            column = torch.arange(part.length, device=shut.device)
            if part.mask is None:
                shut = shut | (column[None, :, None] < column[None, None, :])
            # padded queries stand where the last token does, so they see themselves at least
            shut = (shut & (column[:, None] != column[None, :])).unsqueeze(1)
            base = (
                torch.zeros(shut.shape, dtype=dtype, device=shut.device) if part.mask is None else part.mask
            )
            self._masks[number, window] = base.masked_fill(shut, -math.inf)
        return self._masks[number, window]

    def _link_mask(self, link: Link, length: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if window is None:
            return None
        if (link, window) not in self._masks:
            queries = self.positions[0, link.start : link.stop]
            self._masks[link, window] = trunk_mask(queries, link.begin, length, window, dtype)
        return self._masks[link, window]


def _part(index: Any, allowed: Any, positions: Any, dtype: torch.dtype, device: torch.device) -> Part:
    rows, length = index.shape
    flat = torch.from_numpy(index.reshape(-1))
    low, size = int(flat[0]), rows * length
    straight = bool((flat == torch.arange(low, low + size)).all())
    mask = None
    if allowed is not None:
        shut = ~torch.from_numpy(allowed)
        mask = torch.zeros(shut.shape, dtype=dtype).masked_fill_(shut, -math.inf).unsqueeze(1).to(device)
    place = (low, low + size) if straight else None
    return Part(rows, length, flat.to(device), mask, torch.from_numpy(positions).to(device), place)


def trunk_mask(queries: Tensor, begin: int, length: int, window: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [1, 1, queries, length] of tokens at positions `queries` against a trunk that starts at `begin`.

    Finite: a query that sees nothing of the trunk has a finite sum there, whose weight is nothing.
    """
    keys = torch.arange(begin, begin + length, device=queries.device)
    shut = queries[:, None] - keys[None, :] >= window
    mask = torch.zeros(shut.shape, dtype=dtype, device=queries.device)
    return mask.masked_fill_(shut, -6e4 if dtype == torch.float16 else -1e30)[None, None]


def join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Join attention to other keys into `out` [T, heads, dim] and `lse` [T, heads], in place."""
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    if out.dtype == torch.float32:
        out.lerp_(other.float(), share)
    else:
        out.copy_(torch.lerp(out.float(), other.float(), share))
    torch.logaddexp(lse, other_lse, out=lse)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, options: Options
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp: [rows, heads, queries, dim], float32 [rows, heads, queries].

    key, value: [rows, kv heads, keys, dim], heads a multiple of kv heads. mask: additive, broadcast over heads.
    """
    if query.device.type == "cpu" and options.cap is None and query.shape[-1] == value.shape[-1]:
        if query.shape[2] == key.shape[2] >= 2 * _BLOCK and (causal or mask is not None):
            return _by_blocks(query, key, value, mask, options.scale)
        return _flash(query, key, value, 0.0, causal, attn_mask=mask, scale=options.scale)  # type: ignore[no-any-return]
    return _explicit(query, key, value, mask, causal, options)


@lru_cache(maxsize=256)
def _later(low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Additive mask of queries low to high against keys up to high: no later key is seen."""
    return torch.full((high - low, high), -math.inf, dtype=dtype).triu_(low + 1)[None, None]


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """No query sees a later key, so blocks of queries meet the keys up to their end only. mask None: causal."""
    length = query.shape[2]
    count = length // _BLOCK
    outs, sums = [], []
    for number in range(count):
        low, high = number * length // count, (number + 1) * length // count
        if mask is None:
            seen = _later(low, high, query.dtype)
        else:
            seen = mask[:, :, low:high, :high]
        out, lse = _flash(
            query[:, :, low:high],
            key[:, :, :high],
            value[:, :, :high],
            0.0,
            False,
            attn_mask=seen,
            scale=scale,
        )
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, options: Options
) -> tuple[Tensor, Tensor]:
    rows, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, queries, -1)
    step = max(1, _SCORES // (rows * heads * keys))
    outs, sums = [], []
    for low in range(0, queries, step):
        part = grouped[:, :, :, low : low + step]
        scores = (part @ key.unsqueeze(2).transpose(-1, -2)).float() * options.scale
        if options.cap is not None:
            scores = torch.tanh(scores / options.cap) * options.cap
        if causal:
            column = torch.arange(keys, device=query.device)
            scores.masked_fill_(column[None, :] > column[low : low + step, None], -math.inf)
        if mask is not None:
            scores += mask[:, :, low : low + step].unsqueeze(2)
        lse = torch.logsumexp(scores, dim=-1)
        outs.append((scores - lse.unsqueeze(-1)).exp_().to(value.dtype) @ value.unsqueeze(2))
        sums.append(lse)
    out = torch.cat(outs, dim=3).reshape(rows, heads, queries, -1)
    return out, torch.cat(sums, dim=3).reshape(rows, heads, queries)
