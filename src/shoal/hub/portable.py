"""Recipe, lock and mergekit YAML of a run as others can read them: no folder of this machine is named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.errors import PublishError
from shoal.hub.privacy import Scrubber
from shoal.lock import Lock, ModelLock
from shoal.models import open_parents
from shoal.recipe import Recipe, parse_model
from shoal.types import (
    AdapterModel,
    HubModel,
    LocalModel,
    MergeModel,
    MergePlan,
    PlainModel,
    ZooModel,
    parts_of,
)


class Names:
    """How each model of a lock is written where folders must not be: Hub ids and zoo names as they are, a folder by its
    own name, `./left`; two folders of one name are told apart by a number."""

    def __init__(self, models: Sequence[ModelLock]) -> None:
        self._folders: dict[Path, str] = {}
        self._models = models

    def reference(self, model: ModelLock, pinned: bool = False) -> str:
        """pinned: Hub ids with the commit that the run used."""
        ref = parse_model(model.ref, Path("/"))
        if isinstance(ref, AdapterModel):
            base = self._plain(ref.base, model.commit, pinned)
            return f"{base}+{self._plain(ref.adapter, model.adapter_commit, pinned)}"
        return self._plain(ref, model.commit, pinned)

    def locked(self, model: ModelLock) -> ModelLock:
        """The model, and its roots where it is a merge of ours, by pinned references and without folders."""
        merge = model.merge
        if merge is not None:
            merge = merge.model_copy(update={"roots": tuple(self.locked(root) for root in merge.roots)})
        adapter = None if model.adapter is None else ""
        changes = {
            "ref": self.reference(model, pinned=True),
            "folder": "",
            "adapter": adapter,
            "merge": merge,
        }
        return model.model_copy(update=changes)

    def _plain(self, ref: PlainModel, commit: str | None, pinned: bool) -> str:
        if isinstance(ref, MergeModel):
            return f"merge:{self._plain(ref.source, commit, pinned)}"
        if isinstance(ref, HubModel):
            return f"{ref.repo}@{commit}" if pinned and commit else str(ref)
        return str(ref) if isinstance(ref, ZooModel) else self._folder(ref.path)

    def _folder(self, path: Path) -> str:
        if path not in self._folders:
            name, number = f"./{path.name or 'model'}", 2
            while name in self._folders.values():
                name, number = f"./{path.name or 'model'}-{number}", number + 1
            self._folders[path] = name
        return self._folders[path]


def names_folder(model: ModelLock) -> bool:
    """Whether a reference names a folder of this machine, which nobody else can follow."""
    parts = parts_of(parse_model(model.ref, Path("/")))
    return any(isinstance(p.source if isinstance(p, MergeModel) else p, LocalModel) for p in parts)


def is_local(model: ModelLock) -> bool:
    """Whether a model, or what it is made of, lies in a folder that only this machine has.

    A merge of ours is rebuilt from what the lock says of it, so that only its roots count.
    """
    parts = parts_of(parse_model(model.ref, Path("/")))
    roots = () if model.merge is None else model.merge.roots
    return any(isinstance(part, LocalModel) for part in parts) or any(is_local(root) for root in roots)


def local_models(lock: Lock) -> list[ModelLock]:
    return [model for model in lock.models if is_local(model)]


def recipe_here(recipe: Recipe, lock: Lock, scrubber: Scrubber) -> tuple[Recipe, list[str]]:
    """The recipe without folders, and what was changed in it, in words. As it is where it names none."""
    names, notes = Names(lock.models), []
    texts = ([recipe.base_model] if recipe.base_model else []) + list(recipe.models)
    written = {
        text: names.reference(model) if names_folder(model) else text
        for text, model in zip(texts, lock.models, strict=True)
    }
    if written != {text: text for text in texts}:
        notes.append("recipe.yaml: folders of models are named by their last part only")
    changes: dict[str, Any] = {
        "models": tuple(written[text] for text in recipe.models),
        "base_model": None if recipe.base_model is None else written[recipe.base_model],
        "track": (),  # where others send their runs is theirs to say
    }
    output, evaluation, search = recipe.output, recipe.evaluation, recipe.search
    source = output.tokenizer_source
    if source in written:
        changes["output"] = output.model_copy(update={"tokenizer_source": written[source]})
    include = evaluation.include_path
    if include is not None and not include.startswith("zoo:"):
        changes["evaluation"] = evaluation.model_copy(update={"include_path": "./tasks"})
        notes.append(
            "recipe.yaml: evaluation.include_path is ./tasks; the tasks themselves are not published"
        )
    if search.warm_start is not None:
        changes["search"] = search.model_copy(update={"warm_start": None})
        notes.append("recipe.yaml: without search.warm_start; lock.yaml has the start itself (x0)")
    published = recipe.model_copy(update=changes)
    data = published.model_dump(mode="json")
    clean = scrubber.known_data(data)
    clean["name"] = scrubber.text(data["name"])
    if data["evaluation"]["system_instruction"] is not None:
        clean["evaluation"]["system_instruction"] = scrubber.text(data["evaluation"]["system_instruction"])
    if clean != data:
        notes.append("recipe.yaml: private words were replaced")
        published = Recipe.model_validate(clean)
    return published, notes


def lock_here(lock: Lock, recipe: Recipe) -> Lock:
    """The run's lock without folders; its recipe_digest is of the published recipe."""
    names = Names(lock.models)
    models = tuple(names.locked(model) for model in lock.models)
    return lock.model_copy(update={"models": models, "include_path": None, "recipe_digest": recipe.digest()})


def mergekit_here(lock: Lock, recipe: Recipe, plan: MergePlan) -> str:
    """mergekit_config.yml that names no folder of this machine; its head says what plain mergekit makes of it."""
    from shoal.merge.mergekit_yaml import to_mergekit

    names = Names(lock.models)
    references = [_for_mergekit(names.reference(model, pinned=True), model) for model in lock.models]
    source = recipe.output.tokenizer_source
    if source not in ("base", "union"):
        source = references[lock.tokenizer]
    text = to_mergekit(
        plan,
        references,
        tokenizer_source=source,
        chat_template=recipe.output.chat_template,
        parent=open_parents(lock.models)[0],
    )
    zoos = sorted({z for m in lock.models if (z := _zoo(m)) is not None and not m.origin.get("commit")})
    head = [f"# Build ./zoo/{zoo} first, by `shoal zoo {zoo} ./zoo/{zoo}`." for zoo in zoos]
    head += [line for model in lock.models if model.merge is not None for line in _merge_head(model, names)]
    if local_models(lock):
        head.append("# Models that begin with ./ are folders that were not published.")
    return "".join(f"{line}\n" for line in head) + text


def _zoo(model: ModelLock) -> str | None:
    base = parts_of(parse_model(model.ref, Path("/")))[0]
    return base.zoo if isinstance(base, ZooModel) else None


def _for_mergekit(reference: str, model: ModelLock) -> str:
    """mergekit knows no zoo and no merge of ours: a copy of a repository is named as that, others as a folder to make."""
    if model.merge is not None:
        _, plus, adapter = reference.partition("+")
        return f"./merges/{_slug(model.name)}{plus}{adapter}"
    if not reference.startswith("zoo:"):
        return reference
    base, plus, adapter = reference.partition("+")
    if model.origin.get("repo") and model.origin.get("commit"):
        return f"{model.origin['repo']}@{model.origin['commit']}{plus}{adapter}"
    return f"./zoo/{base.removeprefix('zoo:')}{plus}{adapter}"


def _merge_head(model: ModelLock, names: Names) -> list[str]:
    """How a merge of ours becomes a folder for mergekit, and what that is not."""
    assert model.merge is not None
    source = names.reference(model, pinned=True).partition("+")[0].removeprefix("merge:")
    how = f"shoal download {source} -o" if model.commit else f"shoal merge {source} -o"
    place = f"./merges/{_slug(model.name)}"
    lines = [f"# Make {place} first, by `{how} {place}`."]
    if model.merge.dtype != "float32":
        lines.append(
            f"# It is rounded to {model.merge.dtype} there, while shoal merged it in float32: what follows holds but for that."
        )
    return lines


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def check_recipe_only(lock: Lock) -> None:
    """Raises PublishError where a parent is a folder of this machine: nobody could rebuild the merge."""
    local = local_models(lock)
    if local:
        names = ", ".join(dict.fromkeys(Path(m.ref.split("+")[-1]).name for m in local))
        raise PublishError(
            f"parents in local folders: {names}; others cannot rebuild the merge from a recipe that names them. Publish"
            " them first and run with their Hub ids, or publish the weights with --weights"
        )
