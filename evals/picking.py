"""Log-probability of chosen tokens, and whether each is the most likely one, from logits that are read as seldom as can be.

Logits of many positions are larger than any cache, so what counts is how often they are looked through.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20  # elements of rows that stay in a CPU's cache between two looks


def picked(logits: Tensor, index: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Of `token` [N] in row `index` [N] of `logits` [rows, vocabulary]: log-probability, float32, and whether greedy decoding
    would choose it, which takes the first of equal logits.
    """
    if not len(index):
        return logits.new_zeros(0, dtype=torch.float32), torch.zeros(
            0, dtype=torch.bool, device=logits.device
        )
    on_cpu = logits.device.type == "cpu"
    step = max(1, CHUNK // logits.shape[1]) if on_cpu else len(logits)
    values = logits.new_empty(len(index), dtype=torch.float32)
    tops = []
    order = torch.argsort(index)
    ends = torch.bincount(index // step, minlength=-(-len(logits) // step)).cumsum(0).tolist()
    begin = 0
    for number, end in enumerate(ends):
        low = number * step
        part = logits[low : low + step].float()
        tops.append(part.amax(dim=-1))
        mine = order[begin:end]
        # one fused kernel, as `hf` does it
        values[mine] = torch.log_softmax(part, dim=-1)[index[mine] - low, token[mine]]
        begin = end
    top = torch.cat(tops)
    best = logits[index, token].float() == top[index]
    if not on_cpu:
        likeliest = logits.argmax(dim=-1)
        return values, best & (likeliest[index] == token)
    for place in best.nonzero()[:, 0].tolist():
        row, column = int(index[place]), int(token[place])
        # a copy of the row, or its argmax, takes several times as long as the largest of what comes before
        best[place] = column == 0 or bool(logits[row, :column].amax() < top[row])
    return values, best
