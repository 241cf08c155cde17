"""Encoded blocks of a build under way, kept so that a killed one goes on; vectors taken over from the old index."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import IndexFolderError
from ragmoe.corpus.types import Passage
from ragmoe.index.manifest import Manifest, file_record
from ragmoe.index.store import PassageStore
from ragmoe.index.windows import encoder_text

#: Passages in a block: what a kill can lose at most.
BLOCK = 1024

#: Vectors as stored, and how many windows each passage needs.
Encoded = tuple[NDArray[np.float16], NDArray[np.int64]]


class Blocks:
    """The encoded blocks of one build, in a folder of their own.

    Args:
        folder: where they are; made by `start`.
        fingerprint: of the corpus and of how it is encoded.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.size = BLOCK
        self._folder = folder
        self._state = {"fingerprint": fingerprint, "size": self.size}

    @property
    def begun(self) -> bool:
        """Whether a stopped build of just the same left its blocks here."""
        return _read_json(self._folder / "state.json") == self._state

    def start(self, *, resume: bool) -> None:
        """Make the folder; what is in it is kept only if it belongs to the same build and ``resume`` is set."""
        if resume and self.begun:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        (self._folder / "state.json").write_text(json.dumps(self._state), encoding="utf-8")

    def read(self, number: int) -> Encoded | None:
        """A block, None where it is missing or was cut off by whatever stopped the build."""
        try:
            with np.load(self._path(number), allow_pickle=False) as block:
                return block["vectors"], block["windows"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, number: int, encoded: Encoded) -> None:
        """Keep a block; it is there whole or not at all."""
        part = self._path(number).with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, vectors=encoded[0], windows=encoded[1])
        os.replace(part, self._path(number))

    def _path(self, number: int) -> Path:
        return self._folder / f"block-{number:06d}.npz"


class OldVectors:
    """The vectors of the index in force by what was encoded, so that unchanged passages are not encoded again.

    Empty if there is no such index, its encoding differs, or its embeddings are not what its manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest | None, embeddings: str) -> None:
        self._rows: dict[bytes, int] = {}
        if manifest is None:
            return
        try:
            if file_record(folder / embeddings) != manifest.files[embeddings]:
                return
            store = PassageStore(folder, manifest.generation)
            self._vectors: NDArray[np.float16] = np.load(folder / embeddings, mmap_mode="r", allow_pickle=False)
            self._windows = store.windows
            self._rows = {_key(passage): row for row, passage in enumerate(store)}
        except (OSError, ValueError, KeyError, IndexFolderError):
            self._rows = {}

    def find(self, passages: Sequence[Passage]) -> NDArray[np.int64]:
        """int64 (passages,): the row of each in the old index, -1 where it has none."""
        if not self._rows:
            return np.full(len(passages), -1, dtype=np.int64)
        return np.asarray([self._rows.get(_key(passage), -1) for passage in passages], dtype=np.int64)

    def take(self, rows: NDArray[np.int64]) -> Encoded:
        """Some old rows, at least one."""
        return self._vectors[rows], self._windows[rows]


def _key(passage: Passage) -> bytes:
    return hashlib.sha256(encoder_text(passage).encode()).digest()


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
