"""The one adapter to mergekit's engine: methods that have no kernel here, and plain mergekit YAML files.

mergekit plans and computes; parents come from our own readers, so adapters and memory-mapped files need no copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.merge.adapter import Adapter
from shoal.merge.checkpoint import Parent
from shoal.merge.mergekit_yaml import config_of
from shoal.merge.methods import method
from shoal.merge.runtime import torch_dtype
from shoal.types import MergePlan


@dataclass(frozen=True)
class _Index:
    tensor_paths: dict[str, str]


@dataclass(frozen=True)
class _Loader:
    """What mergekit asks of a loader, answered by a Parent."""

    parent: Parent
    index: _Index

    def get_tensor(self, key: str, device: str = "cpu", aliases: Sequence[str] | None = None) -> Tensor:
        # some methods write into what they get; the memory-mapped original must stay as it is
        return self.parent.tensor(key).to(device, copy=True)

    def flush(self) -> None:
        return None


def merge_by_mergekit(
    plan: MergePlan, operator: str, parents: Sequence[Parent], canonical: bool
) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, merged tensor in plan.dtype) for the groups of `plan` that `operator` makes.

    Random methods are seeded with plan.seed. canonical: on one thread, so that sums do not depend on how many there
    are.
    """
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    part = replace(plan, groups=tuple(g for g in plan.groups if g.operator == operator))
    references = [_reference(p) for p in parents]
    config = _configuration(config_of(part, references))
    options = MergeOptions(quiet=True)
    cache = LoaderCache()
    cache.setup(options)
    for reference, parent in zip(references, parents, strict=True):
        cache.loaders[reference] = _Loader(parent, _Index({n: n for n in parent.names}))
    first = 0 if plan.base is None else plan.base
    try:
        names = [name for g in part.groups for name in g.tensors]
        planner = MergePlanner(config, _architecture(names), options, references[first].config())
        planner._plan()  # plan_in_memory() of 0.1.5 raises TypeError
        names_of = {id(task): weight.name for weight, task in planner._tensors}
        run = Executor([task for _, task in planner._tensors]).run(quiet=True)
        dtype = torch_dtype(plan.dtype)
        for task, value in _seeded(run, plan.seed, canonical):
            yield names_of[id(task)], value.to(dtype) if value.is_floating_point() else value
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"mergekit cannot merge by {method(operator).name!r}: {_line(error)}"
        ) from error
    finally:
        for reference in references:
            cache.loaders.pop(reference, None)


def _architecture(names: Sequence[str]) -> Any:
    """The checkpoint's own tensors as an architecture: one flat list.

    mergekit's definitions name tensors as transformers has them at run time; where transformers fuses experts at
    load, those are not the checkpoint's. With this list every architecture is merged tensor by tensor, known or not.
    """
    from mergekit.architecture import ModelArchitecture, ModuleDefinition, WeightInfo
    from mergekit.architecture.json_definitions import (
        JsonLayerTemplates,
        JsonModuleArchDef,
        JsonModuleArchitecture,
    )

    definition = JsonModuleArchDef(
        model_type="shoal",
        architectures=["shoal"],
        pre_weights=[WeightInfo(name=name) for name in names],
        layer_templates=JsonLayerTemplates(weights=[]),
        post_weights=[],
        override_num_layers=0,
    )
    module = ModuleDefinition(architecture=JsonModuleArchitecture(definition=definition))
    return ModelArchitecture(modules={"default": module}, architectures=["shoal"], model_type="shoal")


def _seeded(run: Iterator[Any], seed: int, one_thread: bool) -> Iterator[Any]:
    """Steps of `run` with a random stream of their own: what happens between the steps neither sees nor moves it."""
    state = torch.Generator().manual_seed(seed).get_state()
    while True:
        threads = torch.get_num_threads()
        outer = torch.get_rng_state()
        try:
            if one_thread:
                torch.set_num_threads(1)
            torch.set_rng_state(state)
            step = next(run, None)
            state = torch.get_rng_state()
        finally:
            torch.set_rng_state(outer)
            if one_thread:
                torch.set_num_threads(threads)
        if step is None:
            return
        yield step


def _reference(parent: Parent) -> Any:
    from mergekit.common import ModelPath, ModelReference

    lora = ModelPath(path=str(parent.adapter)) if isinstance(parent, Adapter) else None
    return ModelReference(model=ModelPath(path=str(parent.path)), lora=lora)


def _configuration(config: dict[str, Any]) -> Any:
    from mergekit.config import MergeConfiguration

    return MergeConfiguration.model_validate(config)


def merge_mergekit_config(yaml_path: Path, out_dir: Path) -> None:
    """Run any mergekit YAML with mergekit itself; `out_dir` appears only when all of it is written.

    CheckpointError, in one line, for everything that mergekit objects to.
    """
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from shoal.merge.writer import new_folder

    text = Path(yaml_path).read_text(encoding="utf-8")
    with new_folder(out_dir) as folder, _quiet():
        cache = folder / ".lora"
        options = MergeOptions(quiet=True, lora_merge_cache=str(cache), lora_merge_dtype="float32")
        try:
            config = MergeConfiguration.model_validate(yaml.safe_load(text))
            run_merge(config, str(folder), options, config_source=text)
        except Exception as error:  # mergekit raises whatever its parts raise; to a user it is one refusal
            raise CheckpointError(f"{yaml_path}: mergekit refuses it: {_line(error)}") from error
        finally:
            _remove(cache)


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    logger = logging.getLogger("mergekit")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
