"""Where shoal keeps what it can build again: the folder that SHOAL_CACHE names, or the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    given = os.environ.get("SHOAL_CACHE")
    if given:
        return Path(given).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("shoal", appauthor=False)
