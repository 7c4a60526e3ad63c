"""Write the reference pages of the documentation from what they describe: the recipe's schema and the command line.

python docs/generate.py            # writes docs/reference/recipe.md and docs/reference/cli.md
python docs/generate.py --check    # writes nothing; exit code 1 where a page is not what it would be
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- written by docs/generate.py; change what it describes, then run `python docs/generate.py` -->"
SIGNS = {Gt: ("gt", "above"), Ge: ("ge", "at least"), Lt: ("lt", "below"), Le: ("le", "at most")}


# The recipe


def recipe_page() -> str:
    from shoal.recipe import Recipe

    lines = [
        "# The recipe",
        "",
        NOTE,
        "",
        "Every key of a recipe with its type and default. Unknown keys are errors. `shoal validate RECIPE` checks a file and says",
        "what its run would do.",
        "",
    ]
    for paths, model in _models(Recipe, [""], []):
        heading = ", ".join(f"`{path}`" for path in paths if path) or "Top level"
        lines += [f"## {heading}", "", *_words(model), ""]
        lines += ["| key | type | default |", "| --- | --- | --- |"]
        lines += [_row(name, field) for name, field in model.model_fields.items()]
        lines.append("")
    return "\n".join(lines)


def _models(
    model: type[BaseModel], paths: list[str], seen: list[type[BaseModel]]
) -> Iterator[tuple[list[str], type[BaseModel]]]:
    """A model and all models in it, each once, with all places in a recipe where it stands."""
    seen.append(model)
    yield paths, model
    places: dict[type[BaseModel], list[str]] = {}
    for name, field in model.model_fields.items():
        many = "[]" if get_origin(field.annotation) is tuple else ""
        for inner in _inside(field.annotation):
            places.setdefault(inner, []).extend(f"{path}.{name}{many}".lstrip(".") for path in paths)
    for inner, found in places.items():
        if inner not in seen:
            yield from _models(inner, found, seen)


def _inside(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for argument in get_args(kind):
        yield from _inside(argument)


def _words(model: type[BaseModel]) -> list[str]:
    """The docstring: first what it says of all keys, then a list of what it says of single ones."""
    names = "|".join(model.model_fields)
    found: list[str] = []
    for paragraph in inspect.cleandoc(model.__doc__ or "").split("\n\n"):
        first, *rest = re.split(
            rf"(?:^|(?<=[.;] ))((?:{names})(?:, (?:{names}))*): ", " ".join(paragraph.split())
        )
        if first:
            found += [*textwrap.wrap(_linked(first), 118), ""]
        for keys, words in zip(rest[::2], rest[1::2], strict=True):
            label = ", ".join(f"`{key}`" for key in keys.split(", "))
            text = f"- {label}: {words.strip().removesuffix(';')}"
            found += textwrap.wrap(_linked(text), 118, subsequent_indent="  ")
    while found and not found[-1]:
        found.pop()
    return found


def _linked(line: str) -> str:
    def link(match: re.Match[str]) -> str:
        page = match.group(1)
        return f"[docs/{page}](../{page})" if (Path(__file__).parent / page).is_file() else match.group(0)

    return re.sub(r"docs/(\w+\.md)", link, line)


def _row(name: str, field: FieldInfo) -> str:
    kind = _type(field.annotation, list(field.metadata))
    if field.is_required():
        default = "required"
    else:
        value = field.get_default(call_default_factory=True)
        default = "" if value is PydanticUndefined or isinstance(value, BaseModel) else f"`{_yaml(value)}`"
    return f"| `{name}` | {kind} | {default} |"


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _type(kind: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        extra = list(arguments[1:])
        extra += [one for item in extra if isinstance(item, FieldInfo) for one in item.metadata]
        return _type(arguments[0], extra + metadata)
    if origin in (Union, types.UnionType):
        words = [_type(one, metadata if one is not type(None) else []) for one in arguments]
        return " or ".join("null" if word == "NoneType" else word for word in words)
    if origin is Literal:
        return " or ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin in (tuple, list):
        if len(arguments) == 2 and arguments[1] is not Ellipsis:
            return f"[{', '.join(_type(one, []) for one in arguments)}]"
        return f"list of {_type(arguments[0], [])}" + _limits(metadata)
    if origin is dict:
        return f"mapping of {_type(arguments[0], [])} to {_type(arguments[1], [])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "mapping, see below"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any"}
    return names.get(kind, getattr(kind, "__name__", str(kind))) + _limits(metadata)


def _limits(metadata: list[Any]) -> str:
    words = []
    for item in metadata:
        for sign, (field, word) in SIGNS.items():
            if isinstance(item, sign):
                words.append(f"{word} {getattr(item, field)}")
        if isinstance(item, MinLen):
            words.append(f"at least {item.min_length}")
    return f", {', '.join(words)}" if words else ""


# The command line


def cli_page() -> str:
    import typer.main

    from shoal.cli import app

    lines = ["# The command line", "", NOTE, "", "`shoal COMMAND --help` prints the same.", ""]
    for path, command in _commands(typer.main.get_command(app), ["shoal"]):
        lines += [f"## `{' '.join(path)}`", "", inspect.cleandoc(command.help or ""), ""]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        passed_on = [] if options else [command.options_metavar or ""]
        usage = [*path, *(["[OPTIONS]"] if options else passed_on), *(_argument(p) for p in arguments)]
        lines += ["```text", " ".join(usage), "```", ""]
        if arguments:
            lines += ["| argument | |", "| --- | --- |"]
            lines += [f"| `{_name(p)}` | {_cell(p.help)} |" for p in arguments]
            lines.append("")
        if options:
            lines += ["| option | | default |", "| --- | --- | --- |"]
            lines += [_option(p) for p in options]
            lines.append("")
    return "\n".join(lines)


def _commands(command: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    if not hasattr(command, "commands"):
        if not command.hidden:
            yield path, command
        return
    for name, inner in command.commands.items():
        yield from _commands(inner, [*path, name])


def _argument(param: Any) -> str:
    name = _name(param)
    return name if param.required else f"[{name}]"


def _name(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _option(param: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    value = "" if param.is_flag else f" {_metavar(param)}"
    default = param.default
    if param.required:
        shown = "required"
    elif param.is_flag and param.secondary_opts:
        shown = f"`{(param.opts if default else param.secondary_opts)[0]}`"
    elif default is None or default is False or callable(default) or str(default).startswith("Sentinel"):
        shown = ""
    else:
        shown = f"`{default}`"
    return f"| {names}{value} | {_cell(param.help)} | {shown} |"


def _metavar(param: Any) -> str:
    return _cell(param.metavar or param.type_descriptor.annotation.__name__.upper())


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


PAGES = {"recipe.md": recipe_page, "cli.md": cli_page}


def main(arguments: list[str]) -> int:
    stale = 0
    for name, page in PAGES.items():
        path, text = REFERENCE / name, page()
        text = text.rstrip("\n") + "\n"
        if arguments == ["--check"]:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                print(f"docs/reference/{name} is not what docs/generate.py writes; run it", file=sys.stderr)
                stale = 1
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"docs/reference/{name}: written")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
