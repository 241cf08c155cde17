"""What a generation is made of: a stream of passages, each with its vector where that is known already.

Nothing here holds a corpus in memory: a stream is read as often as it is needed, and what was seen lies on the disk.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import DataError, IndexFolderError, RagmoeError, UsageError
from ragmoe._keys import KeyTable
from ragmoe.corpus.chunking import Chunk
from ragmoe.corpus.passages import OnError, PassageReader
from ragmoe.corpus.types import Passage
from ragmoe.index.folder import embeddings_name
from ragmoe.index.manifest import Manifest, file_record
from ragmoe.index.store import passages_name, read_rows
from ragmoe.index.target import current
from ragmoe.index.windows import encoder_text

_AGAIN = "give the command again"


class Row(NamedTuple):
    """A passage of the generation that is to be.

    Attributes:
        at: row of its vector among those that are known; -1 where it is to be encoded.
        windows: of the encoder that it fills, where its vector is known.
    """

    chunk: Chunk
    at: int = -1
    windows: int = 0


class OldIndex:
    """An index in force that passages and vectors are taken over from.

    Raises:
        IndexFolderError: its passages or embeddings are not what its manifest says, or another took its place.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        name = embeddings_name(manifest.generation)
        try:
            for file in (name, passages_name(manifest.generation)):
                if file_record(folder / file) != manifest.files.get(file):
                    raise self._damaged(f"{file} was changed")
            self.vectors: NDArray[np.float16] = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise self._damaged(f"{error.filename} is missing") from None
        except ValueError as error:
            raise self._damaged(f"{name}: {error}") from error
        if self.vectors.shape != (manifest.passages, manifest.encoder.width):
            raise self._damaged(f"{name} holds {self.vectors.shape}")

    def rows(self, first: int = 0) -> Iterator[Row]:
        """Its passages, their vectors at ``first`` and on.

        Raises:
            IndexFolderError: another generation took their place meanwhile.
        """
        try:
            stored = read_rows(self.folder, self.manifest.generation, self.manifest.passages)
            for number, (chunk, windows) in enumerate(stored):
                yield Row(chunk, first + number, windows)
        except FileNotFoundError:
            raise IndexFolderError(f"{self.folder} was replaced meanwhile", hint=_AGAIN) from None

    def find(self, passage: Passage) -> tuple[int, int]:
        """The row of what is encoded of a passage and the windows that it fills; (-1, 0) where it is not there."""
        found = self._keys.get(key(passage))
        if found is None:
            return -1, 0
        row, windows = found.split()
        return int(row), int(windows)

    @cached_property
    def _keys(self) -> KeyTable:
        """Row and windows of each passage by what is encoded of it."""
        table = KeyTable()
        for row in self.rows():
            table.put(key(row.chunk.passage), f"{row.at} {row.windows}")
        return table

    def _damaged(self, reason: str) -> IndexFolderError:
        now = current(self.folder)
        if now is not None and now.digest != self.manifest.digest:
            return IndexFolderError(f"{self.folder} was replaced meanwhile", hint=_AGAIN)
        return IndexFolderError(
            f"{self.folder} is damaged: {reason}; nothing is taken over from it",
            hint=f"see: ragmoe index verify {self.folder}",
        )


class Rows(ABC):
    """The rows of a generation, in order; the same each time, and each time read anew.

    Attributes:
        known: the indexes that vectors come from; ``at`` counts through all of them.
        skipped: bad lines passed over, as of the last time that all was read.
        duplicates: passages passed over because they are there already, likewise.
        shared: of each passage that two of ``known`` hold, the row that is taken and the other, likewise.
        keeps_memory: what is recorded of the passages of ``known`` goes with them.
    """

    keeps_memory = True

    def __init__(self, known: Sequence[OldIndex] = ()) -> None:
        self.known = tuple(known)
        self.duplicates = 0
        self.shared: list[tuple[int, int]] = []

    @abstractmethod
    def __iter__(self) -> Iterator[Row]: ...

    @property
    def skipped(self) -> Sequence[str]:
        """Bad lines passed over."""
        return ()

    @property
    def skipped_before(self) -> int:
        """Bad lines passed over when the indexes that rows are taken from were made."""
        return sum(old.manifest.skipped for old in self.known)

    @property
    def base(self) -> list[str]:
        """Digests of what vectors are taken from."""
        return [old.manifest.digest for old in self.known]

    def nothing(self) -> RagmoeError:
        """What to say where there is no row at all."""
        return DataError("there are no passages")

    def take(self, at: NDArray[np.int64]) -> NDArray[np.float16]:
        """Known vectors, float16 (len(at), R)."""
        first, parts = 0, np.zeros((len(at), self.known[0].manifest.encoder.width), dtype=np.float16)
        for old in self.known:
            mine = (at >= first) & (at < first + len(old.vectors))
            parts[mine] = old.vectors[at[mine] - first]
            first += len(old.vectors)
        return parts


class SourceRows(Rows):
    """What a reader reads; vectors of the same texts are taken over from an index that stood in the folder before."""

    # What an overwritten index had recorded goes with it.
    keeps_memory = False

    def __init__(self, reader: PassageReader, sources: Sequence[str], old: OldIndex | None) -> None:
        super().__init__([old] if old else [])
        self._reader = reader
        self._sources = sources
        self._old = old

    def __iter__(self) -> Iterator[Row]:
        for chunk in self._reader.chunks():
            yield Row(chunk, *(self._old.find(chunk.passage) if self._old else ()))

    @property
    def skipped(self) -> Sequence[str]:
        return self._reader.skipped

    @property
    def skipped_before(self) -> int:
        return 0

    def nothing(self) -> RagmoeError:
        lines = self._reader.skipped
        skipped = f"; {len(lines)} bad lines were skipped, the first: {lines[0]}" if lines else ""
        return DataError(f"no passages in {', '.join(self._sources) or 'no source at all'}{skipped}")


class AddedRows(Rows):
    """An index's rows, and behind them what a reader reads that is not among them.

    A passage is there already if the same is encoded of one of them; one of another text under an id that is taken
    is a bad line, with all the other pieces of what it was cut from.
    """

    def __init__(self, old: OldIndex, reader: PassageReader, on_error: OnError) -> None:
        super().__init__([old])
        self._old = old
        self._reader = reader
        self._on_error = on_error
        self._taken: list[str] = []

    def __iter__(self) -> Iterator[Row]:
        self.duplicates, self._taken = 0, []
        ids, texts, sources = KeyTable(), KeyTable(), KeyTable()
        refused: set[str] = set()
        for row in self._old.rows():
            ids.put(row.chunk.passage.id)
            texts.put(key(row.chunk.passage))
            sources.put(row.chunk.source_id, _kind(row.chunk))
            yield row
        for chunk in self._reader.chunks():
            passage, source = chunk.passage, chunk.source_id
            if texts.get(key(passage)) is not None:
                self.duplicates += 1
            elif source in refused:
                continue
            elif _is_other(chunk, sources) or ids.put(passage.id) is not None:
                refused.add(source)
                self._refuse(source)
            else:
                texts.put(key(passage))
                yield Row(chunk)

    @property
    def skipped(self) -> Sequence[str]:
        return [*self._reader.skipped, *self._taken]

    def _refuse(self, name: str) -> None:
        problem = f"id {name!r} is in {self._old.folder} already, with another title or text"
        if self._on_error == "fail":
            hint = (
                f"remove that one first, with all its pieces if it was cut: ragmoe index remove {self._old.folder} "
                "--ids FILE; or --on-error skip"
            )
            raise DataError(problem, hint=hint)
        self._taken.append(problem)


class KeptRows(Rows):
    """An index's rows without those of some ids, or of a domain."""

    def __init__(self, old: OldIndex, *, ids: frozenset[str] = frozenset(), domain: str | None = None) -> None:
        super().__init__([old])
        self._old = old
        self._ids = ids
        self._domain = domain

    def __iter__(self) -> Iterator[Row]:
        for row in self._old.rows():
            if row.chunk.passage.id not in self._ids and row.chunk.passage.domain != self._domain:
                yield row

    def missing(self) -> list[str]:
        """What is to go and is not there: ids, or the domain."""
        if self._domain is not None:
            return [] if self._domain in self._old.manifest.domains else [self._domain]
        left = set(self._ids)
        for row in self._old.rows():
            left.discard(row.chunk.passage.id)
        return sorted(left)

    def nothing(self) -> RagmoeError:
        return UsageError(
            f"these are all {self._old.manifest.passages:,} passages of {self._old.folder}, and an index has one at "
            "least; nothing was removed",
            hint=f"to be rid of the index, delete the folder {self._old.folder}",
        )


class MergedRows(Rows):
    """The rows of two indexes, one behind the other; what both have under one id must be the same, and comes once."""

    def __iter__(self) -> Iterator[Row]:
        self.duplicates, self.shared = 0, []
        ids, sources = KeyTable(), KeyTable()
        first = 0
        for old in self.known:
            for row in old.rows(first):
                passage = row.chunk.passage
                digest = key(passage).hex()
                there = ids.put(passage.id, f"{digest} {row.at}")
                other, _, at = (there or "").partition(" ")
                if there is None:
                    if old is self.known[0]:
                        sources.put(row.chunk.source_id, _kind(row.chunk))
                    elif _is_other(row.chunk, sources):
                        raise self._differ(row.chunk.source_id, old)
                    yield row
                elif other == digest:
                    self.duplicates += 1
                    self.shared.append((int(at), row.at))
                else:
                    raise self._differ(passage.id, old)
            first += old.manifest.passages

    def _differ(self, name: str, old: OldIndex) -> DataError:
        return DataError(
            f"id {name!r} is in both {self.known[0].folder} and {old.folder}, with different texts; "
            "nothing was written",
            hint=f"remove it from one of them: ragmoe index remove {old.folder} --ids FILE",
        )


def _kind(chunk: Chunk) -> str:
    return "whole" if chunk.passage.id == chunk.source_id else "cut"


def _is_other(chunk: Chunk, sources: KeyTable) -> bool:
    """Whether what a chunk comes from was whole in an index and is cut now, or the other way: it is another text."""
    return sources.get(chunk.source_id) not in (None, _kind(chunk))


def key(passage: Passage) -> bytes:
    """sha256 of what is encoded of a passage: two with the same have the same vector."""
    return hashlib.sha256(encoder_text(passage).encode()).digest()


_T = TypeVar("_T")


def blocks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """The items in lists of ``size``, the last one shorter."""
    rest = iter(items)
    while block := list(islice(rest, size)):
        yield block
