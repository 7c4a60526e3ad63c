"""shoal breeds better open language models out of existing ones."""

from shoal.version import __version__ as __version__
