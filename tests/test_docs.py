"""The documentation: generated pages are what they would be now, commands and recipes in it exist, and it builds."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.recipe import Recipe, parse_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md")) + sorted(DOCS.glob("how-to/*.md"))
MINIMAL = {"name": "x", "models": ["a/b", "c/d"], "tasks": [{"task": "t"}]}


@pytest.fixture
def generate() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "generate.py"))


@pytest.mark.parametrize("name", ["recipe.md", "cli.md"])
def test_a_generated_page_is_what_it_would_be_now(name: str, generate: dict[str, Any]) -> None:
    expected = generate["PAGES"][name]().rstrip("\n") + "\n"
    stale = "stale; run `python docs/generate.py`"
    assert (DOCS / "reference" / name).read_text(encoding="utf-8") == expected, stale


def test_the_generator_writes_and_finds_what_is_stale(
    generate: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = generate["main"]
    main.__globals__["REFERENCE"] = tmp_path / "reference"
    assert main(["--check"]) == 1
    assert main([]) == 0 and main(["--check"]) == 0
    page = tmp_path / "reference" / "recipe.md"
    page.write_text(page.read_text().replace("`sigma0`", "`sigma1`"))
    capsys.readouterr()
    assert main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/reference/recipe.md is not what docs/generate.py writes; run it\n"


def test_every_key_of_a_recipe_and_every_command_has_its_place() -> None:
    recipe = (DOCS / "reference" / "recipe.md").read_text()
    for key, value in Recipe.model_json_schema()["$defs"].items():
        for name in value.get("properties", {}):
            assert f"| `{name}` |" in recipe, f"{key}.{name}"
    assert "`tasks[].search`, `tasks[].select`, `tasks[].test`" in recipe
    assert "| `task` | text | required |" in recipe
    assert "| `coefficients` | integer, above 0, at most 16 or null | `null` |" in recipe
    cli = (DOCS / "reference" / "cli.md").read_text()
    for path, command in _commands():
        assert f"## `shoal {path}`\n" in cli
        for option in _options(command):
            assert f"`{option}`" in cli, f"{path} {option}"


def _commands() -> list[tuple[str, Any]]:
    import typer.main

    from shoal.cli import app

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, inner in command.commands.items():
            if hasattr(inner, "commands"):
                yield from walk(inner, (*path, name))
            elif not inner.hidden:
                yield " ".join((*path, name)), inner

    return list(walk(typer.main.get_command(app), ()))


def _options(command: Any) -> set[str]:
    """Names of options; none for a command that passes its arguments on."""
    return {
        name
        for param in command.params
        if param.param_type_name == "option" and not param.hidden
        for name in (*param.opts, *param.secondary_opts)
    }


def _quoted(page: Path) -> list[str]:
    """The commands of ours that a page tells to run: indented lines, and code within lines."""
    text = page.read_text()
    found = re.findall(r"^ {4}((?:[A-Z_]+=\S+ )*shoal .*)$", text, flags=re.MULTILINE)
    found += [" ".join(span.split()) for span in re.findall(r"`(shoal [a-z][^`]*)`", text)]
    return [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line) for line in found]


def test_commands_in_the_documentation_exist() -> None:
    commands, seen = dict(_commands()), 0
    for page in PAGES:
        for text in _quoted(page):
            words = shlex.split(text, comments=True)[1:]
            name = next((n for n in (" ".join(words[:2]), words[0]) if n in commands), None)
            assert name is not None, f"{page.name}: {text}"
            options = _options(commands[name])
            for word in words:
                if word.startswith("-") and options:
                    assert word.split("=")[0] in options, f"{page.name}: {text}"
            seen += 1
    assert seen > 20


def test_recipes_in_the_documentation_are_valid() -> None:
    seen = 0
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL):
            content = yaml.safe_load(block)
            if set(content) <= set(Recipe.model_fields):
                parse_recipe(yaml.safe_dump(MINIMAL | content), where=page.name)
                seen += 1
    assert seen >= 3


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in ("index.html", "reference/recipe/index.html", "how-to/gguf/index.html"):
        text = (tmp_path / "site" / page).read_text(encoding="utf-8")
        assert "<h1" in text
        # read without a network: nothing is loaded from elsewhere
        loaded = re.findall(r"<(?:script|img|link)[^>]*>", text)
        loaded = [tag for tag in loaded if not tag.startswith("<link") or "stylesheet" in tag]
        assert loaded and not [tag for tag in loaded if re.search(r"(?:src|href)=\"?(?:https?:)?//", tag)]
    assert not (tmp_path / "site" / "generate.py").exists()
