"""The folder that an index is written to: what it may hold before, the lock, and what goes afterwards."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ragmoe._errors import IndexFolderError, IndexLockedError
from ragmoe._folders import expect_folder, refuse_link
from ragmoe.index import blocks, card, memory
from ragmoe.index import manifest as manifests
from ragmoe.index.manifest import EncoderRecord, EncodingRecord, Manifest

_LOCK = "build.lock"
_WRITTEN = {
    manifests.NAME,
    f"{manifests.NAME}.part",
    _LOCK,
    card.NAME,
    f"{card.NAME}.part",
    "partial",
    memory.FOLDER,
}
# ``.neighbours`` is where training keeps what it retrieved; it is keyed by the index's digest.
_OURS = (_WRITTEN | {".neighbours"}) - {card.NAME}
_REPLACE = "replace it with --overwrite, or name another folder with --out"


class OtherIndexError(IndexFolderError):
    """The folder holds an index already, of something else than what is to be built."""


@dataclass(frozen=True)
class Target(ABC):
    """A folder that a generation is to be written to.

    Attributes:
        resume: go on with what was stopped.
    """

    folder: Path
    resume: bool = False

    @abstractmethod
    def check(self) -> None:
        """Refuse a folder that is not to be written to; asked before anything is read, and again under the lock."""

    def finished(self, corpus_digest: str, encoding: list[Any], begun: bool) -> Manifest | None:
        """With ``resume``: the index in force if it is what is to be written (what was stopped, was so at the end).

        Args:
            begun: blocks of just this work are there.
        """
        return None


@dataclass(frozen=True)
class NewIndex(Target):
    """A folder of its own: new, empty, or with an index that is to be replaced."""

    overwrite: bool = False

    def check(self) -> None:
        there = expect_folder(self.folder, IndexFolderError)
        if not os.access(there, os.W_OK | os.X_OK):
            raise IndexFolderError(
                f"{self.folder} cannot be written: {there} is not writable", hint="name another with --out"
            )
        if not self.folder.is_dir():
            return
        # Where nobody has built an index, names like an index's are somebody's files, such as vectors to be imported.
        ours = _has_begun(self.folder)
        others = sorted(
            path.name
            for path in self.folder.iterdir()
            if not (ours and (path.name in _OURS or manifests.generation_of(path.name) or card.is_ours(path)))
        )
        if others:
            raise IndexFolderError(
                f"{self.folder} holds other things than an index: {', '.join(others[:8])}",
                hint="move them elsewhere, or name a new folder with --out",
            )
        refuse_links(self.folder)
        if (self.folder / manifests.NAME).exists() and not (self.overwrite or self.resume):
            raise IndexFolderError(f"{self.folder} holds an index already", hint=_REPLACE)

    def finished(self, corpus_digest: str, encoding: list[Any], begun: bool) -> Manifest | None:
        now = current(self.folder)
        if not self.resume or now is None:
            return None
        if now.corpus_digest == corpus_digest and alike(encoding_of(now), encoding):
            return now
        if not (self.overwrite or begun):
            raise OtherIndexError(
                f"{self.folder} holds an index already, and no stopped build of these sources", hint=_REPLACE
            )
        return None


@dataclass(frozen=True)
class SameIndex(Target):
    """The folder of an index that gets another generation of itself."""

    base: Manifest | None = None

    def check(self) -> None:
        now = manifests.read_manifest(self.folder)
        if self.base is None or now.digest != self.base.digest:
            raise IndexFolderError(f"{self.folder} was changed meanwhile", hint="give the command again")
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise IndexFolderError(f"{self.folder} cannot be written")
        refuse_links(self.folder)

    def finished(self, corpus_digest: str, encoding: list[Any], begun: bool) -> Manifest | None:
        """The index itself where nothing of it changes, with ``resume`` or without."""
        return self.base if self.base is not None and self.base.corpus_digest == corpus_digest else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for writing, made if need be.

    Raises:
        IndexLockedError: somebody else holds it.
        IndexFolderError: the lock is a link; or whatever goes wrong with files inside, the disk being full among it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_link(folder / _LOCK, IndexFolderError)
        with FileLock(folder / _LOCK, timeout=0):
            yield
    except Timeout:
        raise IndexLockedError(
            f"{folder} is locked: another process is writing to it", hint="wait until it has finished"
        ) from None
    except OSError as error:
        raise IndexFolderError(
            f"{folder} cannot be written: {error.strerror or error}; an index that was there is untouched",
            hint="make room or mend the rights, then go on with --resume",
        ) from error


def refuse_links(folder: Path) -> None:
    """Refuse a folder where a link stands in a place that is written or removed: what it leads to would be changed.

    Whoever made the folder could have put it there. The folder itself may be a link, and reading follows all of them:
    the Hub's cache is made of links.
    """
    for path in folder.iterdir():
        if path.name not in _WRITTEN and not manifests.generation_of(path.name):
            continue
        refuse_link(path, IndexFolderError)
        # Into these is written again what lies there; others are removed whole, which follows no link.
        if path.name in ("partial", memory.FOLDER):
            for place, folders, files in os.walk(path):
                for name in (*folders, *files):
                    refuse_link(Path(place, name), IndexFolderError)


def encoding_of(manifest: Manifest) -> list[Any]:
    """What decides a passage's vector: two builds with the same have the same vectors for the same text."""
    long = manifest.long_passages
    return encoding_key(manifest.encoder, long.mode, long.window_overlap, manifest.encoding)


def encoding_key(encoder: EncoderRecord, mode: str, overlap: int, made: EncodingRecord | None) -> list[Any]:
    """`encoding_of` what is yet to be made. Batches of another size change a vector by less than it is rounded."""
    precision = [] if made is None or made.precision == "fp32" else [made.precision]
    # Its id is only what its weights were called, or where they lay.
    return [encoder.model_dump(exclude={"id"}), mode, overlap, *precision]


def alike(one: list[Any], other: list[Any]) -> bool:
    """Whether two encodings are the same as far as both say: earlier versions recorded no settings of an encoder."""
    (mine, *how), (theirs, *as_well) = one, other
    return how == as_well and all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys())


def current(folder: Path) -> Manifest | None:
    """The manifest in force, None where there is none or it cannot be read."""
    try:
        return manifests.read_manifest(folder)
    except IndexFolderError:
        return None


def next_generation(folder: Path) -> int:
    """A number that no file of the folder has yet."""
    return 1 + max((number for _, number in _data_files(folder)), default=0)


def _has_begun(folder: Path) -> bool:
    """Whether an index was built in a folder, or begun to be."""
    left = (f"{manifests.NAME}.part", _LOCK, "partial/state.json")
    return manifests.is_manifest(folder / manifests.NAME) or any((folder / name).exists() for name in left)


def clean(folder: Path, manifest: Manifest) -> None:
    """Remove the files of all generations but the manifest's, and the blocks that it was made of; write the card.

    Blocks of another run that was stopped stay: it can go on.

    Raises:
        IndexFolderError: not all could be done; the manifest is in force nevertheless.
    """
    try:
        sweep(folder)
        card.write_card(folder, manifest)
        if not blocks.is_wanted(folder / "partial", manifest.generation):
            shutil.rmtree(folder / "partial", ignore_errors=True)
        (folder / f"{manifests.NAME}.part").unlink(missing_ok=True)
        memory.forget(folder, manifest.digest)
    except OSError as error:
        raise IndexFolderError(
            f"{folder}: generation {manifest.generation} is in force and whole, but what is left to do in its folder "
            f"failed: {error.strerror or error}",
            hint="make room or mend the rights, then give the command again with --resume",
        ) from error


def sweep(folder: Path) -> None:
    """Remove the files of generations that are not in force: what a run that died or met a full disk left takes room.

    Where the manifest cannot be read, all stay: nobody knows which are in force.
    """
    now = current(folder)
    if now is None and (folder / manifests.NAME).exists():
        return
    for path, generation in _data_files(folder):
        if now is None or generation != now.generation:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _data_files(folder: Path) -> list[tuple[Path, int]]:
    return [(path, number) for path in folder.iterdir() if (number := manifests.generation_of(path.name))]
