"""Whether there is room: what the disk and the memory of this machine still have."""

from __future__ import annotations

import shutil
from pathlib import Path

from ragmoe._errors import IndexFolderError
from ragmoe._folders import expect_folder

_GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes of memory that this process may still take, None where the system does not say.

    What the machine has available or, where that is less, what the limit of a container leaves.
    """
    found = [number for number in (_machine(), _container()) if number is not None]
    return min(found) if found else None


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is or will be, what a stopped build left in it counted as free."""
    left = sum(path.stat().st_size for path in (folder / "partial").glob("*") if path.is_file())
    return shutil.disk_usage(expect_folder(folder, IndexFolderError)).free + left


def check_room(folder: Path, *, disk: int, memory: int) -> None:
    """Refuse work that cannot fit.

    Args:
        disk, memory: the bytes that it needs.

    Raises:
        IndexFolderError: one of them is more than there is; both numbers are named.
    """
    free = free_disk(folder)
    if disk > free:
        raise IndexFolderError(
            f"{folder} needs about {size(disk)} of disk while it is written, {size(free)} are free; "
            "nothing was written",
            hint="make room, or name a folder on another disk with --out",
        )
    available = free_memory()
    if available is not None and memory > available:
        raise IndexFolderError(
            f"{folder} needs about {size(memory)} of memory while it is written, {size(available)} are available; "
            "nothing was written",
            hint="end other programs, or make several smaller indexes",
        )


def size(number: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None


def _container() -> int | None:
    try:
        limit = int((_GROUP / "memory.max").read_text(encoding="utf-8"))
        used = int((_GROUP / "memory.current").read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text(encoding="utf-8").splitlines())
    # There is no such group, or its limit reads "max".
    except (OSError, ValueError):
        return None
    # What was read of files counts as used, and goes where room is needed.
    return max(limit - used + int(stat.get("inactive_file", 0)), 0)
