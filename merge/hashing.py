"""weights_sha256: one hash for the numbers of a model, however they are cut into files."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable

import torch
from torch import Tensor


def weights_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of names, dtypes, shapes and values; the order in which the tensors come does not matter.

    The sha256 over the tensors in order of their names, each as the line `name dtype d0,d1,... sha256-of-bytes`,
    where the bytes are the values in row-major order, little-endian. So it can be computed while tensors stream by.
    """
    lines = sorted(
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {','.join(map(str, tensor.shape))} {_digest(tensor)}\n"
        for name, tensor in tensors
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    if (
        sys.byteorder != "little"
    ):  # pragma: no cover - torch has no big-endian wheels; refuse rather than mis-hash
        raise NotImplementedError("weights_sha256 needs a little-endian machine")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
