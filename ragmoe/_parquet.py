"""Parquet files of others: what they say of themselves, before they are believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ragmoe._room import free_memory, size

# Text packs to a third or a tenth, and texts that repeat each other to a hundredth; zstd goes beyond a ten-thousandth.
_MOST_PACKED = 1000


def declared_bytes(metadata: Any) -> list[int]:
    """What each row group of a file's metadata says that it unpacks to."""
    return [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]


def absurd(path: Path, metadata: Any) -> str:
    """Why a file is not to be read: a row group unpacks to more than memory holds, and to absurdly more than it has.

    Both: a row group is read a page at a time, so that one larger than memory is nothing unusual in a large file.

    Returns:
        The reason, with its numbers; empty where there is none.
    """
    packed, free = path.stat().st_size, free_memory()
    for number, declared in enumerate(declared_bytes(metadata), start=1):
        if free is not None and declared > max(free, _MOST_PACKED * packed):
            return (
                f"row group {number} of {metadata.num_row_groups} says that it unpacks to {size(declared)}, in a file "
                f"of {size(packed)}; {size(free)} of memory are available"
            )
    return ""
