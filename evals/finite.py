"""Where the numbers of a broken merge first stop being finite: a name to look at instead of a NaN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FINITE = "nothing: it is finite on this input"


def first_broken(model: nn.Module, token_ids: Sequence[int]) -> str:
    """The first module of a causal LM whose output is not finite on this row of tokens, and why; or FINITE.

    E.g. `layer 3 (mlp.down_proj: weights are not finite)`, `head (lm_head: ...)`. Layers count from 0. One forward pass,
    which waits for the device after every module.
    """
    watch = _Watch(model)
    handles: list[Any] = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(watch.entered, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.left))
        ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
        with torch.inference_mode():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if watch.broken is None or _finite(logits):  # a router may hold an infinity that nothing after it sees
        return FINITE
    return _Place.of(model, watch.broken, watch.after_layers).told()


class _Watch:
    """Hooks that note the first module that turns finite input into output that is not."""

    def __init__(self, model: nn.Module) -> None:
        layers = decoder_layers(model)
        self._last = layers[-1] if layers else None
        # from the outermost inwards, each with whether its input is finite
        self._running: list[tuple[nn.Module, bool]] = []
        self.broken: nn.Module | None = None
        self.after_layers = False

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.broken is None:
            # a mask may be -inf by right
            inputs = [*args, *(value for name, value in kwargs.items() if "mask" not in name)]
            self._running.append((module, _finite(inputs)))

    def left(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.broken is not None:
            return
        if not _finite(output):
            # input that is not finite, of finite outputs: it broke between modules, in the code of the enclosing one
            self.broken = next((m for m, finite in reversed(self._running) if finite), module)
            return
        self._running.pop()
        self.after_layers |= module is self._last


@dataclass(frozen=True)
class _Place:
    """A module in words. where: `layer 3`, `embeddings`, ...; name: within the layer, or within the model."""

    where: str
    name: str
    module: nn.Module

    @staticmethod
    def of(model: Any, module: nn.Module, after_layers: bool) -> _Place:
        names = {m: name for name, m in model.named_modules()}
        name = names[module]
        for index, layer in enumerate(decoder_layers(model)):
            if module is layer:
                return _Place(f"layer {index}", "", module)
            if name.startswith(f"{names[layer]}."):
                return _Place(f"layer {index}", name.removeprefix(f"{names[layer]}."), module)
        if module is model.get_output_embeddings():
            return _Place("head", name, module)
        if isinstance(module, nn.Embedding) or module is model.get_input_embeddings():
            return _Place("embeddings", name, module)
        if after_layers and "norm" in type(module).__name__.lower():
            return _Place("final norm", name, module)
        return _Place("after the layers" if after_layers else "before the layers", name, module)

    def told(self) -> str:
        bad = next((name for name, p in self.module.named_parameters() if not _finite(p)), None)
        why = (
            "output overflows from finite weights and finite input"
            if bad is None
            else "weights are not finite"
        )
        name = ".".join(part for part in (self.name, (bad or "").rpartition(".")[0]) if part)
        return f"{self.where} ({name}: {why})" if name else f"{self.where} ({why})"


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a causal LM in order: its longest list of modules that is not inside another list (experts are)."""
    best: list[nn.Module] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in inside):
            inside.append(name)
            if len(module) > len(best):
                best = list(module)
    return best


def _finite(value: Any) -> bool:
    """Whether all floating-point tensors in nested outputs are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(_finite(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return all(_finite(part) for part in value)
    return True
