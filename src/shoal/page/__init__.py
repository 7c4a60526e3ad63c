"""The report of a run: RUN/report.html, one file that holds all it shows and loads nothing.

`state` says how far a run is, `course` how its search went, `weights` what its merge is made of, `items` what it won and
lost, `data` gathers all of it from RUN; `words` and `figures` say and draw it; `render` fills the template; `live` keeps
the page fresh while a run goes on.
"""

from __future__ import annotations

from shoal.page.live import Live as Live
from shoal.page.render import write_page as write_page

__all__ = ["Live", "write_page"]
