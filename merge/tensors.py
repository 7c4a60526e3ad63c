"""One tensor by its terms, in chunks: the canonical way to merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.merge import chunks
from shoal.merge.keeps import keep_or_base
from shoal.merge.terms import Terms, combine, program_of, row_of


class Target(Protocol):
    """Where a merged tensor goes. Takes its elements in pieces, in any order, from several threads."""

    def put(self, start: int, values: Tensor) -> None:
        """Flat `values`, cast to the target's dtype, become the elements from `start` on."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A target that is a contiguous tensor."""

    tensor: Tensor

    def put(self, start: int, values: Tensor) -> None:
        self.tensor.view(-1)[start : start + values.numel()] = values


def merge_tensor(
    terms: Terms, base: Tensor | None, sources: Sequence[Tensor], out: Target, dtype: torch.dtype
) -> None:
    """Write the merge of flat tensors on the CPU to `out`, rounded to `dtype`.

    Works in chunks, whose size does not change the result.
    """
    program = program_of([terms])
    row = row_of(terms, program)
    keeps = terms.keeps or (None,) * len(sources)

    def work(part: slice) -> None:
        root = None if base is None else base[part]
        tiles = []
        for source, keep in zip(sources, keeps, strict=True):
            if keep is None:
                tiles.append(source[part])
            else:
                assert root is not None
                tiles.append(keep_or_base(keep, part.start, source[part], root))
        out.put(part.start, combine(program, root, tiles, row).to(dtype))

    for keep in keeps:
        if keep is not None:
            keep.prepare()
    chunks.each(sources[0].numel(), work, sources[0].device)
