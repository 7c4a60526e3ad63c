"""Published recipes and merges on the Hub, found by their tags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.endpoint import Say, client_errors, open_api, reason, speaking
from shoal.errors import PublishError

TAG, RECIPE_TAG = "shoal", "shoal-recipe"
_ASKED = ["author", "cardData", "downloads", "lastModified", "likes", "private", "tags"]


@dataclass(frozen=True)
class Listed:
    """recipe_only: no weights there. base_models: ids. updated: ISO date of the last commit."""

    repo: str
    recipe_only: bool
    base_models: tuple[str, ...]
    license: str | None
    downloads: int
    updated: str | None
    private: bool

    @property
    def kind(self) -> str:
        return "recipe" if self.recipe_only else "weights"


def list_published(author: str | None = None, limit: int = 100, say: Say = lambda text: None) -> list[Listed]:
    """Repositories with one of our tags, newest first; at most `limit`.

    Raises:
        PublishError: the Hub cannot be asked.
    """
    api = open_api()
    found: dict[str, Listed] = {}
    try:
        with speaking(say):
            for tag in (TAG, RECIPE_TAG):
                found |= {listed.repo: listed for listed in _tagged(api, tag, author, limit)}
    except client_errors() as error:
        raise PublishError(f"published recipes cannot be listed: {reason(error)}") from None
    return sorted(found.values(), key=lambda one: (one.updated or "", one.repo), reverse=True)[:limit]


def _tagged(api: Any, tag: str, author: str | None, limit: int) -> list[Listed]:
    models = api.list_models(filter=tag, author=author, sort="last_modified", limit=limit, expand=_ASKED)
    return [_listed(model) for model in models]


def _listed(model: Any) -> Listed:
    card = model.card_data.to_dict() if model.card_data else {}
    bases = card.get("base_model") or []
    updated = model.last_modified
    return Listed(
        repo=str(model.id),
        recipe_only=RECIPE_TAG in (model.tags or []),
        base_models=tuple(str(base) for base in ([bases] if isinstance(bases, str) else bases)),
        license=None if card.get("license") is None else str(card["license"]),
        downloads=int(model.downloads or 0),
        updated=None if updated is None else updated.date().isoformat(),
        private=bool(model.private),
    )
