"""Encoded blocks of a build under way, kept so that a killed one goes on."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ragmoe.index.manifest import EncodingRecord

#: Passages in a block: what a kill can lose at most.
BLOCK = 1024

#: Vectors as stored, and how many windows each passage needs.
Encoded = tuple[NDArray[np.float16], NDArray[np.int64]]


class Blocks:
    """The encoded blocks of one build, in a folder of their own.

    Args:
        folder: where they are; made by `start`.
        fingerprint: of the corpus and of how it is encoded.
        encoding: what was chosen for it, which a run that goes on must not choose anew.
    """

    def __init__(self, folder: Path, fingerprint: str, encoding: EncodingRecord | None = None) -> None:
        self.size = BLOCK
        self._folder = folder
        self._state: dict[str, object] = {"fingerprint": fingerprint, "size": self.size}
        self._encoding = {} if encoding is None else {"encoding": encoding.model_dump()}

    @property
    def begun(self) -> bool:
        """Whether a stopped build of just the same left its blocks here."""
        state = _read_json(self._folder / "state.json")
        return isinstance(state, dict) and {key: state.get(key) for key in self._state} == self._state

    def start(self, generation: int, *, resume: bool) -> None:
        """Make the folder; what is in it is kept only if it belongs to the same build and ``resume`` is set.

        Args:
            generation: which the build is to become.
        """
        if not (resume and self.begun):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        state = self._state | self._encoding | {"generation": generation}
        part = self._folder / "state.part"
        part.write_text(json.dumps(state), encoding="utf-8")
        os.replace(part, self._folder / "state.json")

    def __contains__(self, number: int) -> bool:
        """Whether a block is kept."""
        return self._path(number).is_file()

    def read(self, number: int, rows: int) -> Encoded | None:
        """A block of so many rows, None where it is missing or was cut off by whatever stopped the build."""
        try:
            with np.load(self._path(number), allow_pickle=False) as block:
                vectors, windows = block["vectors"], block["windows"]
                return (vectors, windows) if len(vectors) == len(windows) == rows else None
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


def kept_encoding(folder: Path) -> EncodingRecord | None:
    """What a stopped build in a folder of blocks had chosen; None where there is none, or it had no choice."""
    state = _read_json(folder / "state.json")
    try:
        return EncodingRecord.model_validate(state["encoding"]) if isinstance(state, dict) else None
    except (KeyError, ValueError):
        return None


def is_wanted(folder: Path, generation: int) -> bool:
    """Whether a folder of blocks is a stopped build's that has not become the generation in force, and still can."""
    state = _read_json(folder / "state.json")
    return isinstance(state, dict) and state.get("generation", generation) != generation


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
