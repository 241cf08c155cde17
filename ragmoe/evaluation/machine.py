"""Where a figure was measured: enough to judge it, nothing that names a person's machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

# Follows a commit that does not say alone what ran.
CHANGES = "+changes"


def machine() -> dict[str, Any]:
    """Processor model, cores and threads used, memory in GB, accelerator, and the versions that decide speed."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@lru_cache
def commit_of_run(folder: Path) -> str | None:
    """The commit of the code that this process runs, as it stood when it was first asked for.

    That is the commit of the package's repository; of an installed package, which has none, that of ``folder``, where
    what is run is described. ``+changes`` as in ``commit``, for either folder.
    """
    own, described = commit(Path(__file__).parents[1]), commit(folder)
    if own is None or described is None or own == described:
        return own or described
    same = own.removesuffix(CHANGES) == described.removesuffix(CHANGES)
    return own if own.endswith(CHANGES) or not same else described


def commit(folder: Path) -> str | None:
    """The commit that a folder's repository stands at; None where it is none, or has no commit.

    ``+changes`` follows where the commit alone does not say what ran: a file of the repository differs from it, or the
    folder holds a file that is not in it (and is not ignored).
    """
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no"), _git(folder, "status", "--porcelain", ".")
    return head if changed == ("", "") else head + CHANGES


def _git(folder: Path, *words: str) -> str | None:
    """What git says, or None where it fails."""
    try:
        # Without optional locks, since somebody may be committing.
        command = ["git", "--no-optional-locks", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None
