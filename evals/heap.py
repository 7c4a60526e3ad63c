"""The C library's heap, set for forward passes: activations of some megabytes are made and freed thousands of times.

By default glibc gives such blocks back to the system at once and takes them anew, so that every pass pays for page faults
(10 to 20 percent of a 135M model's time on a CPU). A gigabyte of free heap is kept instead, and it is one for all threads:
the heaps that glibc makes for single threads are given back whatever it is told.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 << 20  # on 64 bits


def keep_free_heap(size: int = 1 << 30) -> bool:
    """Keep up to `size` bytes of free heap in this process; False where the C library is none that can be told."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return False
    wanted = {_TRIM_THRESHOLD: size, _MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _ARENA_MAX: 1}
    told = [mallopt(name, value) for name, value in wanted.items()]
    return all(told)
