"""One tensor by its terms, in chunks: the canonical way to merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.merge import chunks
from shoal.merge.keeps import keep_or_base
from shoal.merge.terms import Terms, combine, program_of, row_of


def merge_tensor(
    terms: Terms, base: Tensor | None, sources: Sequence[Tensor], out: Tensor, dtype: torch.dtype
) -> None:
    """Write the merge of flat tensors into flat `out`, rounded to `dtype`, then to out's dtype.

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
        out[part] = combine(program, root, tiles, row).to(dtype)

    for keep in keeps:
        if keep is not None:
            keep.prepare()
    chunks.each(out.numel(), work, out.device)
