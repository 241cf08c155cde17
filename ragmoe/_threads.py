"""The one module that decides in which order torch and faiss are imported and how many threads they use.

Both bring an OpenMP runtime of their own. Imported in the wrong order, or with both spinning a thread per core, they
crash (macOS, faiss #3401) or take turns (Linux). So torch always comes first, everything gets its faiss from
`import_faiss`, and the number of threads is what this process may really use, not what the machine has. This module
imports nothing heavy itself.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType


def available_threads() -> int:
    """The number of threads this process should use: ``OMP_NUM_THREADS`` where set, else the cores it may run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def import_torch() -> ModuleType:
    """Import torch with the thread settings of this process."""
    first = "torch" not in sys.modules
    # The fast tokenizers' own threads are not fork-safe, and warn about it, once worker processes exist.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if first and torch.get_num_threads() > available_threads():
        torch.set_num_threads(available_threads())
    return torch


def import_faiss() -> ModuleType:
    """Import faiss, after torch and with the same number of threads. Use this instead of ``import faiss``."""
    import_torch()
    first = "faiss" not in sys.modules
    import faiss

    if first:
        faiss.omp_set_num_threads(available_threads())
    return faiss
