"""How a scorer takes the weights of a candidate, wherever its model lives: begin, chunks of tensors, finish.

`push` sends an iterator of weights to any WeightSink; ModuleWeights is the sink of a module in this process. A scorer in
another process, or an inference engine, sits behind the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor, nn

from shoal.errors import EvaluationError, nearest

CHUNK_BYTES = 64 << 20
_Place = tuple[object, ...]


class WeightSink(Protocol):
    """Takes all weights of a model, in this order: begin_update, any number of update, finish_update.

    Every error while an update is under way aborts it. After an aborted update the weights are neither the old ones
    nor the new ones, and the sink refuses to score until a later update is complete.
    """

    def begin_update(self) -> None:
        """Start an update; from here on the sink does not score.

        Raises:
            EvaluationError: an update is under way already (which is then aborted).
        """
        ...

    def update(self, chunk: Sequence[tuple[str, Tensor]]) -> None:
        """Take some of the tensors, (checkpoint name, tensor in the checkpoint's shape); each once per update.

        The sink rounds to its own dtype and keeps no reference to the tensors.

        Raises:
            EvaluationError: no update is under way, or a tensor is unknown, of another shape, or came before.
        """
        ...

    def finish_update(self) -> None:
        """End the update: every prefix cache of earlier weights is dropped, and the sink scores again.

        Raises:
            EvaluationError: no update is under way, or tensors are missing.
        """
        ...

    def abort_update(self) -> None:
        """Give up the update under way, if any: whoever sends the weights cannot go on."""
        ...


def push(weights: Iterable[tuple[str, Tensor]], sink: WeightSink, chunk_bytes: int = CHUNK_BYTES) -> None:
    """Send all weights to the sink in chunks of at most chunk_bytes; a larger tensor is a chunk of its own.

    weights: e.g. of `Merger.tensors(plan)`; a tensor must not change until the next chunk is asked for.

    Raises:
        EvaluationError: the sink refuses. Whatever is raised, by the iterator too, the update is aborted.
    """
    sink.begin_update()
    try:
        for chunk in _chunks(weights, chunk_bytes):
            sink.update(chunk)
        sink.finish_update()
    except BaseException:
        with suppress(Exception):  # a sink that is gone: the first error is the one to tell
            sink.abort_update()
        raise


def _chunks(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
    held = 0
    for name, tensor in weights:
        if chunk and held + tensor.nbytes > limit:
            yield chunk
            chunk, held = [], 0
        chunk.append((name, tensor))
        held += tensor.nbytes
    if chunk:
        yield chunk


class ModuleWeights:
    """The WeightSink of a module in this process: tensors are copied into its parameters, in place.

    on_finish: called when all tensors are there, before the module may be scored again; drops every prefix cache.
    targets: checkpoint name -> tensor to be written, for checkpoints that do not use the module's own names (views of
    fused experts, say: `merge.runtime_map`); None: the module's own parameters and stored buffers. Of names that lead
    to one tensor (tied weights) one is enough; where several come, they must agree.
    complete: whether the module holds weights that may be scored before any update.
    """

    def __init__(
        self,
        model: nn.Module,
        on_finish: Callable[[], None],
        targets: Mapping[str, Tensor] | None = None,
        complete: bool = True,
    ) -> None:
        self._model = model
        self._on_finish = on_finish
        self._given = targets
        self._targets: Mapping[str, Tensor] = {}
        self._names: set[str] = set()
        self._written: dict[_Place, str] = {}
        self._under_way = False
        self._reason = "" if complete else "the model has no weights yet"

    def begin_update(self) -> None:
        if self._under_way:
            self.abort_update()
            raise EvaluationError(
                "weight update: begin_update while another update is under way, now aborted"
            )
        # asked for each time: the module may have moved to other memory since the last update
        self._targets = self._model.state_dict(keep_vars=True) if self._given is None else self._given
        self._names, self._written = set(), {}
        self._under_way, self._reason = True, "a weight update is under way"

    def update(self, chunk: Sequence[tuple[str, Tensor]]) -> None:
        if not self._under_way:
            raise EvaluationError("weight update: update without begin_update")
        with self._aborted_by_errors():
            for name, tensor in chunk:
                self._take(name, tensor)

    def finish_update(self) -> None:
        if not self._under_way:
            raise EvaluationError("weight update: finish_update without begin_update")
        with self._aborted_by_errors():
            missing = [name for name, target in self._targets.items() if _place(target) not in self._written]
            if missing:
                raise EvaluationError(
                    f"weight update: finish_update, but {len(missing)} tensors did not come, first {missing[0]!r}"
                )
            self._on_finish()
        self._under_way, self._reason = False, ""

    def abort_update(self) -> None:
        if self._under_way:
            self._under_way, self._reason = False, "the last weight update was aborted"

    def require_complete(self) -> None:
        """Asked by a scorer before it scores.

        Raises:
            EvaluationError: the weights are not those of one complete update.
        """
        if self._reason:
            raise EvaluationError(f"not scored: {self._reason}; a complete weight update must come first")

    def _take(self, name: str, tensor: Tensor) -> None:
        target = self._targets.get(name)
        if target is None:
            raise EvaluationError(f"weight update: unknown tensor {name!r}; {nearest(name, self._targets)}")
        if tensor.shape != target.shape:
            raise EvaluationError(
                f"weight update: {name!r}: expected shape {tuple(target.shape)}, found {tuple(tensor.shape)}"
            )
        if name in self._names:
            raise EvaluationError(f"weight update: {name!r} came twice")
        self._names.add(name)
        twin = self._written.setdefault(_place(target), name)
        with torch.no_grad():
            if twin == name:
                target.copy_(tensor)
            elif not _same(target, tensor.to(target.device, target.dtype)):
                raise EvaluationError(
                    f"weight update: {name!r} and {twin!r} are one tensor in the model, but came with other values"
                )

    @contextmanager
    def _aborted_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort_update()
            raise


def _place(tensor: Tensor) -> _Place:
    """Equal for tensors that are the same memory; an empty one has none and is only itself."""
    if not tensor.numel():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(torch.isclose(one, other, rtol=0.0, atol=0.0, equal_nan=True).all())
