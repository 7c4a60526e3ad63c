"""The models of the tiny zoo on a local Hub, and the quickstart recipe with its models there."""

from __future__ import annotations

from pathlib import Path

from hub.local_hub import LocalHub

from shoal import load_recipe, zoo

USER, TOKEN = "example", "hf_aTokenOfTheLocalHub"
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def put_zoo(hub: LocalHub) -> None:
    """USER with TOKEN, and each model as USER/tiny-NAME with its licence."""
    hub.add_user(USER, TOKEN)
    card = f"---\nlicense: {zoo.licence('tiny')}\nlanguage: en\n---\n# A model of shoal's tiny zoo\n"
    for member in zoo.names("tiny"):
        files = {path.name: path.read_bytes() for path in zoo.member_path("tiny", member).iterdir()}
        hub.add_repo(f"{USER}/tiny-{member}", files | {"README.md": card.encode()})


def quickstart(budget: int | None = None) -> str:
    """The recipe as YAML. budget: candidates; default: the quickstart's."""
    recipe = load_recipe(QUICKSTART)

    def there(name: str) -> str:
        return name.replace("zoo:tiny/", f"{USER}/tiny-")

    changes = {
        "base_model": there(recipe.base_model or ""),
        "models": tuple(map(there, recipe.models)),
        "search": recipe.search.model_copy(update={"budget": budget or recipe.search.budget}),
    }
    return recipe.model_copy(update=changes).to_yaml()
