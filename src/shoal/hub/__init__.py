"""Publications on the Hugging Face Hub: what they hold, how they get there and back.

`upload` and `fetch` move folders, `list_published` finds them; they know nothing of what is in a publication.
"""

from shoal.hub.fetch import Fetched, Limits, fetch
from shoal.hub.listing import Listed, list_published
from shoal.hub.upload import Published, upload

__all__ = ["Fetched", "Limits", "Listed", "Published", "fetch", "list_published", "upload"]
