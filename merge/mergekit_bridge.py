"""The one adapter to mergekit's engine: methods that have no kernel here, and plain mergekit YAML files.

mergekit plans and computes; parents come from our own readers, so adapters and memory-mapped files need no copies.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from shoal.errors import CheckpointError, RecipeError
from shoal.merge.adapter import Adapter
from shoal.merge.checkpoint import INDEX, Parent
from shoal.merge.disk import SHARD_BYTES
from shoal.merge.mergekit_file import line_of, read_config
from shoal.merge.mergekit_models import Loader, with_references
from shoal.merge.mergekit_plain import Plain, plan_plain
from shoal.merge.mergekit_plan import Planned, plan_config, seeded
from shoal.merge.mergekit_yaml import config_of
from shoal.merge.methods import method
from shoal.merge.readahead import folders_in, read_ahead
from shoal.merge.resident import Output
from shoal.merge.runtime import torch_dtype
from shoal.merge.writer import (
    MERGEKIT_CONFIG,
    TOKENIZER_FILES,
    Progress,
    chat_template_text,
    copy_files,
    new_folder,
    write_json,
    write_shards,
)
from shoal.types import MergePlan


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
    if len(set(references)) != len(references):
        twice = next(r for r in references if references.count(r) > 1)
        raise CheckpointError(
            f"mergekit cannot tell two parents apart: both are {twice}; name each model once"
        )
    config = _configuration(config_of(part, references))
    options = MergeOptions(quiet=True)
    cache = LoaderCache()
    cache.setup(options)
    for reference, parent in zip(references, parents, strict=True):
        cache.loaders[reference] = Loader.of(parent)
    first = 0 if plan.base is None else plan.base
    try:
        names = [name for g in part.groups for name in g.tensors]
        planner = MergePlanner(config, _architecture(names), options, references[first].config())
        planner._plan()  # plan_in_memory() of 0.1.5 raises TypeError
        names_of = {id(task): weight.name for weight, task in planner._tensors}
        run = Executor([task for _, task in planner._tensors]).run(quiet=True)
        dtype = torch_dtype(plan.dtype)
        for task, value in seeded(run, plan.seed, canonical):
            yield names_of[id(task)], value.to(dtype) if value.is_floating_point() else value
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"mergekit cannot merge by {method(operator).name!r}: {line_of(error)}"
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


def _reference(parent: Parent) -> Any:
    from mergekit.common import ModelPath, ModelReference

    lora = ModelPath(path=str(parent.adapter)) if isinstance(parent, Adapter) else None
    return ModelReference(model=ModelPath(path=str(parent.path)), lora=lora)


def _configuration(config: dict[str, Any]) -> Any:
    from mergekit.config import MergeConfiguration

    return MergeConfiguration.model_validate(config)


@dataclass(frozen=True)
class Written:
    """What `write_config` wrote. seconds: of the whole call. by_mergekit: why mergekit made tensors, and how many.

    notes: what a user should know, e.g. what is not bit for bit what mergekit would write.
    """

    folder: Path
    tensors: int
    bytes: int
    seconds: float
    by_mergekit: Mapping[str, int]
    notes: tuple[str, ...]

    def words(self) -> str:
        """One line for people."""
        line = f"{self.folder}: {self.tensors} tensors, {self.bytes / 1e9:.2f} GB in {self.seconds:.1f} s"
        if self.by_mergekit:
            why = ", ".join(f"{reason} ({count})" for reason, count in self.by_mergekit.items())
            line += f"; {sum(self.by_mergekit.values())} by mergekit: {why}"
        return "; ".join([line, *self.notes])


def write_config(
    yaml_path: Path,
    out_dir: Path,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Written:
    """Make the model that a mergekit YAML describes, disk to disk, in bounded memory.

    A plain YAML (`mergekit_plain`) needs nothing of mergekit. Else it plans; tensors are made by our kernels where they
    can, the others by mergekit; configuration, tokenizer, model card and mergekit_config.yml are what mergekit writes, generation_config.json and other tokenizer files of the donor come
    along. seed: of random masks. CheckpointError, in one line, for everything that is wrong; then `out_dir` is as
    it was.
    """
    started = time.perf_counter()
    yaml_path, out_dir = Path(yaml_path), Path(out_dir)
    text, data = read_config(yaml_path)
    read_ahead(list(dict.fromkeys(folders_in(data))))  # while mergekit is imported, which takes seconds
    with new_folder(out_dir) as folder, _quiet():
        planned: Plain | Planned | None = plan_plain(data, seed)
        if planned is None:
            planned = plan_config(data, str(yaml_path), seed)
            if planned.config.chat_template is not None:
                chat_template_text(planned.config.chat_template, ())
        outputs = planned.outputs()
        try:
            index = write_shards(
                folder, outputs, lambda into: planned.fill(into, seed), max_shard_bytes, progress
            )
        except RecipeError as error:  # of our kernels, which do not know the file
            raise CheckpointError(f"{yaml_path}: {error}") from error
        except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, KeyError) as error:
            raise CheckpointError(f"{yaml_path}: mergekit cannot merge it: {line_of(error)}") from error
        if isinstance(planned, Plain):
            notes = [*planned.notes, *planned.write_files(folder, text, out_dir.name)]
        else:
            notes = [*planned.notes, *_write_files(folder, planned, outputs, data, text, out_dir.name)]
        if index is not None:
            write_json(folder / INDEX, index)
    return Written(
        out_dir,
        len(outputs),
        sum(o.nbytes for o in outputs),
        time.perf_counter() - started,
        planned.by_mergekit,
        tuple(notes),
    )


def _write_files(
    folder: Path, planned: Planned, outputs: Sequence[Output], data: Mapping[str, Any], text: str, name: str
) -> list[str]:
    """Everything but the weights, by mergekit's own functions; what could not be written, in words."""
    from mergekit.card import generate_card
    from mergekit.config import MergeConfiguration
    from mergekit.merge import _copy_tagalong_files, _copy_tokenizer, _set_chat_template
    from mergekit.options import MergeOptions

    options = MergeOptions(quiet=True)
    donor = Path(planned.donor.model.path)
    notes = []
    dtypes = {o.dtype for o in outputs if o.dtype.is_floating_point}
    if planned.config.dtype is None and planned.config.out_dtype is None and len(dtypes) == 1:
        # mergekit leaves the donor's, and whoever loads by it would round the weights
        planned.out_config.dtype = dtypes.pop()
    planned.out_config.save_pretrained(folder)
    (folder / MERGEKIT_CONFIG).write_text(text, encoding="utf-8")
    if planned.tokenizer is not None:
        tokenizer = planned.tokenizer.tokenizer
        _set_chat_template(tokenizer, planned.files)
        tokenizer.save_pretrained(folder)
    else:
        try:
            _copy_tokenizer(planned.files, str(folder), options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            notes.append(f"no tokenizer could be copied from {donor}: {line_of(error)}")
        if planned.config.chat_template is None:
            copy_files(donor, folder, TOKENIZER_FILES)
    copy_files(donor, folder, ("generation_config.json",))
    _copy_tagalong_files(planned.files, str(folder), planned.architecture.tagalong_files or [], options)
    # for a folder that could be a Hub id, the card would ask the Hub
    card = with_references(MergeConfiguration.model_validate(data), _absolute)
    (folder / "README.md").write_text(generate_card(card, text, name), encoding="utf-8")
    return notes


def _absolute(reference: Any) -> Any:
    def path(part: Any) -> Any:
        return (
            part.model_copy(update={"path": str(Path(part.path).resolve())})
            if Path(part.path).exists()
            else part
        )

    lora = None if reference.lora is None else path(reference.lora)
    return reference.model_copy(update={"model": path(reference.model), "lora": lora})


def merge_mergekit_config(yaml_path: Path, out_dir: Path) -> None:
    """The same by mergekit alone, as `mergekit-yaml` does it: slower, for comparison.

    CheckpointError, in one line, for everything that mergekit objects to.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text, data = read_config(Path(yaml_path))
    with new_folder(out_dir) as folder, _quiet():
        cache = folder / ".lora"
        options = MergeOptions(quiet=True, lora_merge_cache=str(cache), lora_merge_dtype="float32")
        try:
            run_merge(MergeConfiguration.model_validate(data), str(folder), options, config_source=text)
        except Exception as error:  # mergekit raises whatever its parts raise; to a user it is one refusal
            raise CheckpointError(f"{yaml_path}: mergekit refuses it: {line_of(error)}") from error
        finally:
            shutil.rmtree(cache, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """mergekit's warnings off the terminal; it logs to the root logger."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
