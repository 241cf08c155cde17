"""Freed memory is kept for the next tensor, where the C library is glibc.

glibc asks the kernel for every large block and gives it back when it is freed. A training step on a processor frees and
takes some gigabytes of activations, and the kernel has to clear each page of them anew: a third of the step's time
(``eval/bench/allocator.py``). Results are the same to the bit. Batches of many sizes leave holes in what is kept, so a
long run gives them back now and then.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1

_keeps = False


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell the C library of this process not to give freed memory back, and whether it took it.

    Changes nothing, and returns False, where the C library knows no ``mallopt`` (musl, macOS, Windows) or the user has
    set it up in the environment (``MALLOC_*``, ``GLIBC_TUNABLES``, ``LD_PRELOAD`` of another allocator).
    """
    if any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    global _keeps
    # Blocks then come from the heap, large ones too, and its end is not trimmed.
    _keeps = bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
    return _keeps


def give_back_freed_memory() -> None:
    """Give back all that is free at this moment, where ``keep_freed_memory`` keeps it."""
    if _keeps:
        ctypes.CDLL(None).malloc_trim(0)
