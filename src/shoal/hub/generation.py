"""Arguments of generation that come from elsewhere: stop strings and numbers, under names that are known to run nothing.

What the scorer does not know it hands to transformers' generate, which loads and runs code that an argument names
(`custom_generate`). So names are listed here, and everything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "min_new_tokens")
KNOWN = (
    "until",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "length_penalty",
    "seed",
    *_LENGTHS,
)
MAX_TOKENS = 1 << 17  # that one answer may have
MAX_STOPS, MAX_STOP = 64, 1000  # stop strings, characters of one


def check_generation(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for a name that is none of KNOWN, or a value that is no stop string or finite number."""
    for name, value in arguments.items():
        if name not in KNOWN:
            raise ValueError(
                f"{str(name)[:40]!r} is none of the arguments of generation that are taken from elsewhere"
            )
        if name == "until":
            stops = value if isinstance(value, list) else [value]
            fine = len(stops) <= MAX_STOPS and all(isinstance(s, str) and len(s) <= MAX_STOP for s in stops)
        else:
            fine = value is None or (isinstance(value, (bool, int, float)) and math.isfinite(value))
        if not fine:
            raise ValueError(
                f"{name}: expected {'stop strings' if name == 'until' else 'a number'}, found {str(value)[:40]!r}"
            )
        if name in _LENGTHS and value is not None and not 0 <= value <= MAX_TOKENS:
            raise ValueError(f"{name}: expected at most {MAX_TOKENS:,} tokens, found {value}")
