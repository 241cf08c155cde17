"""Digests of the embeddings by block, so that what is read of them is verified without reading the rest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import IndexFolderError
from ragmoe.index.store import map_npy, release

#: Bytes of the file that one digest is of. A query reads rows from everywhere: a block is little more than it needs.
BLOCK = 1 << 16


def digests_name(generation: int) -> str:
    """uint8 (blocks, 32): the sha256 of each block of the embeddings' file."""
    return f"digests-{generation}.npy"


def write_digests(path: Path, out: Path) -> None:
    """Write the digests of a file's blocks."""
    with path.open("rb") as file:
        found = b"".join(iter(lambda: _sha256(file.read(BLOCK)), _sha256(b"")))
    np.save(out, np.frombuffer(found, dtype=np.uint8).reshape(-1, 32), allow_pickle=False)


class VerifiedRows(np.memmap):
    """A mapped array (rows, R) whose blocks are verified when rows of them are first taken.

    Rows are taken by indexing, as plain arrays. Other operations on the whole see it unverified.
    """

    _guard: _Guard | None = None

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Copies of some rows (of any shape, none negative), as (..., R).

        They are read, not mapped: where all are from different places a page fault for each costs more, and what is
        mapped would stay with the process.
        """
        if self._guard is None or not hasattr(os, "pread"):
            return np.array(self[rows])
        return self._guard.read(rows).view(self.dtype)

    def __getitem__(self, key: Any) -> Any:
        if self._guard is not None:
            self._guard.check(key[0] if isinstance(key, tuple) and key else key)
        taken = super().__getitem__(key)
        return taken.view(np.ndarray) if isinstance(taken, np.ndarray) else taken


def verified(rows: NDArray[np.float16], path: Path, digests: Path) -> VerifiedRows:
    """A mapped array that verifies its blocks.

    Args:
        rows: what is mapped, in the order of C.
        path: its file.
        digests: what `write_digests` wrote, itself known to be right.

    Raises:
        ValueError: the digests are not of a file of this size.
        IndexFolderError: on taking rows, if a block of them was changed.
    """
    content = np.memmap(path, dtype=np.uint8, mode="r")
    listed: NDArray[np.uint8] = map_npy(digests)
    if listed.shape != (-(-len(content) // BLOCK), 32) or listed.dtype != np.uint8:
        raise ValueError(f"{digests.name} holds {listed.shape}, which does not fit {path.name}")
    guarded = rows.view(VerifiedRows)
    guarded._guard = _Guard(content, listed, len(content) - rows.nbytes, rows.strides[0], path)
    return guarded


class _Guard:
    """Which blocks of a file were verified.

    Args:
        content: uint8, all of the file, mapped.
        digests: uint8 (blocks, 32).
        first: where the rows begin in the file.
        each: bytes of a row.
    """

    def __init__(
        self, content: NDArray[np.uint8], digests: NDArray[np.uint8], first: int, each: int, path: Path
    ) -> None:
        self._content = content
        self._digests = digests
        self._first = first
        self._each = each
        self._path = path
        self._seen = np.zeros(len(digests), dtype=np.bool_)
        # Open as long as the mapping is: another generation may take the file's place.
        self._file = path.open("rb", buffering=0)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The bytes of some rows (of any shape), verified, uint8 (..., bytes of a row)."""
        self.check(rows)
        file, first, each = self._file.fileno(), self._first, self._each
        content = bytearray().join([os.pread(file, each, first + each * row) for row in np.ravel(rows).tolist()])
        return np.frombuffer(content, dtype=np.uint8).reshape(*np.shape(rows), each)

    def check(self, key: Any) -> None:
        """Verify what holds the rows of an index or slice.

        Raises:
            IndexFolderError: a block is not what was written.
        """
        starts = self._first + self._each * self._rows(key)
        firsts, lasts = starts // BLOCK, (starts + self._each - 1) // BLOCK
        if self._each <= BLOCK and self._seen[firsts].all() and self._seen[lasts].all():
            return
        blocks = np.minimum(firsts[:, None] + np.arange((self._each - 1) // BLOCK + 2), lasts[:, None])
        unseen = np.unique(blocks[~self._seen[blocks]]).tolist()
        for block in unseen:
            found = _sha256(self._content[block * BLOCK : (block + 1) * BLOCK])
            if found != self._digests[block].tobytes():
                folder = self._path.parent
                raise IndexFolderError(
                    f"{folder} is damaged: {self._path.name} was changed in bytes {block * BLOCK} and on",
                    hint=f"see: ragmoe index verify {folder}",
                )
            self._seen[block] = True
        # It is a mapping of its own, which nothing else reads: all of the embeddings would stay in it.
        release(self._content)

    def _rows(self, key: Any) -> NDArray[np.int64]:
        """The rows that an index means."""
        count = (len(self._content) - self._first) // self._each
        if isinstance(key, slice):
            return np.arange(*key.indices(count))
        if key is None or key is Ellipsis:
            return np.arange(count)
        at = np.asarray(key)
        if at.dtype == np.bool_:
            return np.flatnonzero(at.reshape(len(at), -1).any(axis=1))
        return np.ravel(np.where(at < 0, at + count, at))


def _sha256(content: Any) -> bytes:
    return hashlib.sha256(content).digest()
