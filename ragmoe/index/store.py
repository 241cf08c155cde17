"""Passages on disk: parquet for everybody, and a plain text file with an offset sidecar for fast text by row."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import IndexFolderError
from ragmoe.corpus.chunking import Chunk
from ragmoe.corpus.types import Passage

_COLUMNS = ("id", "title", "domain", "doc_id", "split", "source_id", "source_start", "windows")


def passages_name(generation: int) -> str:
    """The parquet file: a passage's fields, source_id and source_start of chunks, and windows encoded."""
    return f"passages-{generation}.parquet"


def texts_name(generation: int) -> str:
    """The texts one after the other, UTF-8."""
    return f"texts-{generation}.bin"


def offsets_name(generation: int) -> str:
    """int64 (passages + 1,): text i is bytes offsets[i] to offsets[i + 1] of the texts file."""
    return f"offsets-{generation}.npy"


def corpus_digest(passages: Iterable[Passage]) -> str:
    """sha256 over all fields of all passages, in order."""
    digest = hashlib.sha256()
    for p in passages:
        row = [p.id, p.title, p.text, p.domain, p.doc_id, p.split]
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def write_store(folder: Path, generation: int, chunks: Sequence[Chunk], windows: NDArray[np.int64]) -> list[str]:
    """Write the three files of the passages; returns their names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    passages = [chunk.passage for chunk in chunks]
    table = pa.table(
        {
            **{
                key: [getattr(p, key) for p in passages] for key in ("id", "title", "text", "domain", "doc_id", "split")
            },
            "source_id": [chunk.source_id for chunk in chunks],
            "source_start": pa.array([chunk.start for chunk in chunks], pa.int64()),
            "windows": pa.array(windows, pa.int64()),
        }
    )
    pq.write_table(table, folder / passages_name(generation), compression="zstd")
    offsets = np.zeros(len(passages) + 1, dtype=np.int64)
    with (folder / texts_name(generation)).open("wb") as file:
        for i, passage in enumerate(passages):
            offsets[i + 1] = offsets[i] + file.write(passage.text.encode())
    np.save(folder / offsets_name(generation), offsets, allow_pickle=False)
    return [passages_name(generation), texts_name(generation), offsets_name(generation)]


class PassageStore:
    """The passages of an index: ids and domains in memory, texts read from disk by row.

    Raises:
        IndexFolderError: on making one, if the files do not fit each other.
    """

    def __init__(self, folder: Path, generation: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(folder / passages_name(generation), columns=list(_COLUMNS))
            self._offsets: NDArray[np.int64] = np.load(folder / offsets_name(generation), mmap_mode="r")
        except (pa.ArrowInvalid, pa.ArrowKeyError, ValueError, EOFError) as error:
            raise IndexFolderError(f"{folder} is damaged: {str(error).splitlines()[0]}") from error
        self._table = table
        size = (folder / texts_name(generation)).stat().st_size
        if self._offsets.shape != (table.num_rows + 1,) or int(self._offsets[-1]) != size:
            raise IndexFolderError(f"{folder} is damaged: passages, offsets and texts do not fit each other")
        # An empty file cannot be mapped; but there is no index without passages, and none of them is empty.
        with (folder / texts_name(generation)).open("rb") as file:
            self._texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.ids: list[str] = table.column("id").to_pylist()

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row of each id."""
        return {name: row for row, name in enumerate(self.ids)}

    @cached_property
    def domains(self) -> list[str]:
        """The domain of each row."""
        return self._table.column("domain").to_pylist()

    @cached_property
    def windows(self) -> NDArray[np.int64]:
        """int64 (passages,): the windows that each row would need to be read whole."""
        return self._table.column("windows").to_numpy()

    def text(self, row: int) -> str:
        """The text of a row."""
        return self._texts[int(self._offsets[row]) : int(self._offsets[row + 1])].decode()

    def passage(self, row: int) -> Passage:
        """The passage of a row."""
        fields = {key: self._table.column(key)[row].as_py() for key in ("id", "title", "domain", "doc_id", "split")}
        return Passage(text=self.text(row), **fields)

    def chunk(self, row: int) -> Chunk:
        """The passage of a row with where it stands in what it was cut from."""
        source, start = self._table.column("source_id")[row].as_py(), self._table.column("source_start")[row].as_py()
        return Chunk(self.passage(row), source, start)

    def __iter__(self) -> Iterator[Passage]:
        return (self.passage(row) for row in range(len(self)))
