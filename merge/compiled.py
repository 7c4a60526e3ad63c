"""The merge as one compiled kernel per program (torch.compile), or in eager tiles where there is no compiler.

A kernel is built once per (program, dtypes), for any number of rows, and kept on disk for the next process. It is
believed only after it gave the bits of the eager arithmetic on a sample of rows; otherwise, and where no compiler works, the
eager arithmetic is used.
"""

from __future__ import annotations

import os
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from shoal.cache import cache_folder
from shoal.merge import chunks
from shoal.merge.terms import Program, combine

Compile = Literal["auto", "always", "never"]
WORTH = 1 << 25  # output elements from which a compiler pays
SAMPLE = 256  # rows on which a compiled kernel must agree
Kernel = Callable[[Tensor, Tensor | None, tuple[Tensor, ...], Tensor], None]
_Key = tuple[Program, torch.dtype, str, tuple[torch.dtype, ...]]


@dataclass(frozen=True)
class Work:
    """One merge of (rows, block) buffers: `out` from `base` (where the program needs it) and `sources`.

    rounded: the merge is rounded to it, and then to out's dtype. table: (columns, rows, 1) float32, a coefficient per
    column of the program and row.
    """

    program: Program
    rounded: torch.dtype
    out: Tensor
    base: Tensor | None
    sources: tuple[Tensor, ...]
    table: Tensor

    def rows(self, part: slice | Tensor, out: Tensor | None = None) -> Work:
        """The same for some rows; `out`: where to put them, default: the same rows of out."""
        return Work(
            self.program,
            self.rounded,
            self.out[part] if out is None else out,
            None if self.base is None else self.base[part],
            tuple(s[part] for s in self.sources),
            self.table[:, part],
        )

    def key(self) -> _Key:
        """What a kernel is built for."""
        buffers = [self.out, *([] if self.base is None else [self.base]), *self.sources]
        return self.program, self.rounded, self.out.device.type, tuple(b.dtype for b in buffers)


def eager(work: Work) -> None:
    """The merge in tiles that stay in cache."""
    width = work.out.shape[1]

    def merge(part: slice) -> None:
        tile = work.rows(part)
        tile.out.copy_(combine(tile.program, tile.base, tile.sources, tile.table).to(tile.rounded))

    chunks.each(work.out.shape[0], merge, work.out.device, max(1, chunks.step(work.out.device) // width))


@dataclass
class Kernels:
    """The kernels of one Merger. mode: `auto` compiles for models that are large enough. say: told when it compiles.

    notes: what a user should know, e.g. why there is no compiler. seconds: spent on compiling.
    """

    mode: Compile = "auto"
    say: Callable[[str], None] = lambda text: None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    _made: dict[_Key, Kernel | None] = field(default_factory=dict, repr=False)

    def run(self, work: Work, elements: int) -> None:
        """The merge, by a compiled kernel where there is one. elements: of the whole model that `work` is a part of."""
        if self.mode == "never" or (self.mode == "auto" and elements < WORTH) or work.out.shape[0] < 2:
            eager(work)
            return
        key = work.key()
        if key not in self._made:
            self._made[key] = self._compile(work)
            return
        made = self._made[key]
        if made is None:
            eager(work)
        else:
            made(work.out, work.base, work.sources, work.table)

    def _compile(self, work: Work) -> Kernel | None:
        """Build a kernel by running it once; None, with a note, where that fails. Either way the merge is done."""
        start = time.perf_counter()
        what = f"{work.program.kind}, {work.program.operands} models"
        self.say(f"compiling a merge kernel ({what})")
        made: Kernel | None = None
        try:
            with _kernel_cache(), warnings.catch_warnings():
                # torch 2.13 warns of a part of its own that its compiler imports
                warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
                made = torch.compile(
                    _function(work.program, work.rounded),
                    dynamic=True,
                    fullgraph=True,
                    # without it, the compiler leaves out a rounding that another dtype follows
                    options={"emulate_precision_casts": work.rounded != work.out.dtype},
                )
                made(work.out, work.base, work.sources, work.table)
            wrong = _disagreement(work)
        except Exception as error:  # noqa: BLE001 (whatever dynamo, inductor or g++ raise: no compiler here)
            wrong = _reason(error)
        took = time.perf_counter() - start
        self.seconds += took
        if wrong is None:
            self.say(f"compiled in {took:.1f} s")
            return made
        self.notes.append(f"merges run in eager tiles, slower and with the same result: {wrong}")
        self.say(self.notes[-1])
        eager(work)
        return None


def _function(program: Program, rounded: torch.dtype) -> Kernel:
    def tile(out: Tensor, base: Tensor | None, sources: tuple[Tensor, ...], table: Tensor) -> None:
        out.copy_(combine(program, base, sources, table).to(rounded))

    # torch.compile counts recompilations per code object: every kernel needs one of its own
    code = tile.__code__.replace(co_name=f"merge_{program.kind}_{program.operands}")
    return types.FunctionType(code, tile.__globals__, code.co_name, None, tile.__closure__)


def _disagreement(work: Work) -> str | None:
    """Why the compiled result in `out` cannot be believed; None where it can.

    On the CPU a sample of rows must have the bits of the eager arithmetic; on a GPU, within 1 ulp of the rounded dtype.
    """
    out = work.out
    rows = torch.linspace(0, out.shape[0] - 1, min(SAMPLE, out.shape[0]), device=out.device).long()
    found = out[rows]
    expected = torch.empty_like(found)
    eager(work.rows(rows, expected))
    if torch.equal(found, expected):
        return None
    if out.device.type != "cpu":
        step = torch.finfo(work.rounded).eps * torch.maximum(found.abs(), expected.abs()).float()
        if bool(((found.float() - expected.float()).abs() <= step + 1e-30).all()):
            return None
    return "the compiled kernel differs from the canonical arithmetic"


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return f"no working compiler ({text[:200]})"


@contextmanager
def _kernel_cache() -> Iterator[None]:
    """torch.compile keeps its work in our cache folder, unless the user has chosen another."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)  # torch sets it to its default as soon as it is imported
    if before is None or before == default_cache_dir():
        os.environ[name] = str(cache_folder() / "kernels")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
