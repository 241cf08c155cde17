"""Passages on disk: parquet for everybody, and a plain text file with an offset sidecar for fast text by row."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from threading import Lock
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import IndexFolderError, UsageError
from ragmoe._parquet import declared_bytes
from ragmoe.corpus.chunking import Chunk
from ragmoe.corpus.types import Passage

_PASSAGE = ("id", "title", "text", "domain", "doc_id", "split")
_KINDS = ("domain", "doc_id", "split")
_BATCH = 1024
# Of more passages, the ids are looked through for the first so many calls; a table of all takes as long as about 40.
_SMALL = 100_000
_SCANS = 20
# Bytes that all fields of a passage but its text may have, far more than any do.
_MOST_FIELDS = 1_000_000
_COLUMNS = (*_PASSAGE, "source_id", "source_start", "windows")


def passages_name(generation: int) -> str:
    """The parquet file: a passage's fields, source_id and source_start of chunks, and windows encoded."""
    return f"passages-{generation}.parquet"


def texts_name(generation: int) -> str:
    """The texts one after the other, UTF-8."""
    return f"texts-{generation}.bin"


def offsets_name(generation: int) -> str:
    """int64 (passages + 1,): text i is bytes offsets[i] to offsets[i + 1] of the texts file."""
    return f"offsets-{generation}.npy"


class CorpusDigest:
    """sha256 over all fields of all passages, in order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, p: Passage) -> None:
        """Take in the next passage."""
        row = [p.id, p.title, p.text, p.domain, p.doc_id, p.split]
        self._digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def hexdigest(self) -> str:
        """The digest of the passages so far."""
        return self._digest.hexdigest()


def corpus_digest(passages: Iterable[Passage]) -> str:
    """sha256 over all fields of all passages, in order."""
    digest = CorpusDigest()
    for passage in passages:
        digest.update(passage)
    return digest.hexdigest()


class StoreWriter:
    """Writes the three files of the passages, some at a time.

    Args:
        total: how many there will be.
    """

    def __init__(self, folder: Path, generation: int, total: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"source_start": pa.int64(), "windows": pa.int64()}
        self._schema = pa.schema([(name, kinds.get(name, pa.string())) for name in _COLUMNS])
        self.names = [passages_name(generation), texts_name(generation), offsets_name(generation)]
        self._open = ExitStack()
        self._parquet = self._open.enter_context(
            pq.ParquetWriter(folder / self.names[0], self._schema, compression="zstd")
        )
        self._texts = self._open.enter_context((folder / self.names[1]).open("wb"))
        self._offsets = self._open.enter_context((folder / self.names[2]).open("wb"))
        write_npy_header(self._offsets, np.dtype(np.int64), (total + 1,))
        self._size = 0
        self._offsets.write(np.zeros(1, dtype=np.int64).tobytes())

    def add(self, chunks: Sequence[Chunk], windows: NDArray[np.int64]) -> None:
        """The next passages, and the windows that each needs."""
        import pyarrow as pa

        passages = [chunk.passage for chunk in chunks]
        columns: dict[str, Any] = {key: [getattr(p, key) for p in passages] for key in _PASSAGE}
        columns["source_id"] = [chunk.source_id for chunk in chunks]
        columns["source_start"] = [chunk.start for chunk in chunks]
        self._parquet.write_table(pa.table({**columns, "windows": windows}, schema=self._schema))
        sizes = [self._texts.write(passage.text.encode()) for passage in passages]
        ends = self._size + np.cumsum(sizes, dtype=np.int64)
        self._offsets.write(ends.tobytes())
        self._size = int(ends[-1])

    def close(self) -> None:
        """Finish the files; what was written stays also where something failed."""
        self._open.close()


def write_npy_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Begin an ``.npy`` file whose rows are then written: a full disk raises, where a mapped file would kill."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def map_npy(path: Path) -> NDArray[Any]:
    """Map an ``.npy`` file.

    Raises:
        ValueError: its header is not one, or names more than the file holds.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (SyntaxError, TokenError, TypeError, EOFError, RecursionError, MemoryError, OverflowError) as error:
        # numpy reads the header as Python's literals, with all that this may raise.
        raise ValueError(f"the header of {path.name} is no header of an array") from error


def release(mapped: NDArray[Any]) -> None:
    """Let go of what is in memory of a mapped array; what is used again is read again, mostly from the file's cache."""
    base: Any = mapped
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)


def read_rows(folder: Path, generation: int, rows: int) -> Iterator[tuple[Chunk, int]]:
    """All passages of an index and the windows of each, in order, a batch in memory at a time.

    Args:
        rows: how many there are.

    Raises:
        IndexFolderError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, texts = folder / passages_name(generation), folder / texts_name(generation)
    try:
        with pq.ParquetFile(path) as file:
            # Where only that file was lost, this one has all texts, and what takes them over mends the index.
            _check_declared(file, rows, texts.stat().st_size if texts.is_file() else 0)
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    passage = Passage(**{key: row[key] for key in _PASSAGE})
                    yield Chunk(passage, row["source_id"], row["source_start"]), row["windows"]
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise IndexFolderError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


class PassageStore:
    """The passages of an index: nothing is read before it is asked for, then fields by column and texts by row.

    Raises:
        IndexFolderError: on making one, if the files do not fit each other; on reading, if they are damaged.
    """

    def __init__(self, folder: Path, generation: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._folder = folder
        self._columns: dict[str, Any] = {}
        self._lock = Lock()
        self._scans = 0
        size = (folder / texts_name(generation)).stat().st_size
        try:
            self._offsets: NDArray[np.int64] = map_npy(folder / offsets_name(generation))
            # It stays open: another generation may take its place before all of it is read.
            self._file = pq.ParquetFile(folder / passages_name(generation))
            _check_declared(self._file, len(self._offsets) - 1, size)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, TypeError, ValueError, EOFError) as error:
            raise self._damaged(error) from error
        if self._offsets.ndim != 1 or int(self._offsets[-1]) != size:
            raise IndexFolderError(f"{folder} is damaged: passages, offsets and texts do not fit each other")
        # An empty file cannot be mapped; but there is no index without passages, and none of them is empty.
        with (folder / texts_name(generation)).open("rb") as file:
            self._texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def id(self, row: int) -> str:
        """The id of a row."""
        return str(self.ids_of(np.asarray([row]))[0])

    @cached_property
    def ids(self) -> list[str]:
        """The id of each row."""
        return self._list("id")

    def rows_of(self, ids: Sequence[str]) -> list[int | None]:
        """The row of each of some ids, None where there is no such passage.

        A table of all ids takes seconds where there are millions: there the first few calls look through the column.
        """
        if len(self) > _SMALL and self._scans < _SCANS and "_row_of" not in self.__dict__:
            self._scans += 1
            found = self._scan(ids)
        else:
            found = self._row_of
        return [found.get(name) for name in ids]

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}

    def _scan(self, ids: Sequence[str]) -> dict[str, int]:
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = list(dict.fromkeys(ids))
        at = pc.index_in(self._column("id"), value_set=pa.array(wanted, type=pa.string()))
        rows = np.flatnonzero(pc.is_valid(at).to_numpy())
        return {wanted[place]: row for place, row in zip(at.take(pa.array(rows)).to_pylist(), rows.tolist())}

    @cached_property
    def domains(self) -> list[str]:
        """The domain of each row."""
        return self._list("domain")

    @cached_property
    def windows(self) -> NDArray[np.int64]:
        """int64 (passages,): the windows that each row would need to be read whole."""
        return self._column("windows").to_numpy()

    @property
    def sizes(self) -> NDArray[np.int64]:
        """int64 (passages,): bytes of each text."""
        return np.diff(self._offsets)

    def matching(self, field: str, value: str) -> NDArray[np.bool_]:
        """Which passages have a field of this value, bool (passages,).

        Raises:
            UsageError: passages have no such field to be told apart by.
        """
        import pyarrow.compute as pc

        if field not in _KINDS:
            raise UsageError(f"passages are told apart by {', '.join(_KINDS)}; got {field!r}")
        return pc.equal(self._column(field), value).to_numpy()

    def text(self, row: int) -> str:
        """The text of a row."""
        try:
            return self._texts[int(self._offsets[row]) : int(self._offsets[row + 1])].decode()
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error

    def ids_of(self, rows: NDArray[np.int64]) -> list[str]:
        """The ids of some rows; from Arrow, unless all were taken out of it already."""
        if "ids" in self.__dict__:
            return [self.ids[row] for row in rows.tolist()]
        return self._fields("id", rows)

    def passages(self, rows: Sequence[int] | NDArray[np.int64]) -> list[Passage]:
        """The passages of some rows, in their order."""
        at = np.asarray(rows, dtype=np.int64)
        names = [name for name in _PASSAGE if name != "text"]
        columns = [self._fields(name, at) for name in names]
        return [
            Passage(text=self.text(row), **dict(zip(names, fields, strict=True)))
            for row, *fields in zip(at.tolist(), *columns, strict=True)
        ]

    def passage(self, row: int) -> Passage:
        """The passage of a row."""
        return self.passages([row])[0]

    def __iter__(self) -> Iterator[Passage]:
        return (chunk.passage for chunk in self.chunks())

    def chunks(self) -> Iterator[Chunk]:
        """All passages in order with where each stands in what it was cut from, a batch in memory at a time."""
        for start in range(0, len(self), _BATCH):
            at = np.arange(start, min(start + _BATCH, len(self)))
            parts = (self.passages(at), self._fields("source_id", at), self._fields("source_start", at))
            yield from map(Chunk, *parts)

    def _column(self, name: str) -> Any:
        """A column, by Arrow; read when it is first asked for."""
        import pyarrow as pa

        with self._lock:
            if name not in self._columns:
                try:
                    # In one piece as far as Arrow can: taking rows of many pieces costs in proportion to the pieces.
                    self._columns[name] = self._file.read(columns=[name]).combine_chunks().column(name)
                except (pa.ArrowException, OSError, ValueError) as error:
                    raise self._damaged(error) from error
            return self._columns[name]

    def _list(self, name: str) -> list[str]:
        return self._values(self._column(name))

    def _fields(self, name: str, rows: NDArray[np.int64]) -> list[Any]:
        """A field of some rows."""
        import pyarrow as pa

        return self._values(self._column(name).take(pa.array(rows)))

    def _values(self, column: Any) -> list[Any]:
        """What an Arrow column holds."""
        try:
            return column.to_pylist()
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> IndexFolderError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return IndexFolderError(f"{self._folder} is damaged: {reason}")


def _check_declared(file: Any, rows: int, text_bytes: int) -> None:
    """Refuse a parquet file that says it holds far more than the passages can: reading would allot it first."""
    if missing := set(_COLUMNS) - set(file.schema_arrow.names):
        raise ValueError(f"the passages have no {', '.join(sorted(missing))}")
    has, declared = file.metadata.num_rows, sum(declared_bytes(file.metadata))
    most = 16 * text_bytes + _MOST_FIELDS * max(rows, 1)
    if has != rows or declared > most:
        raise ValueError(
            f"passages, offsets and texts do not fit each other: {has} rows of {declared} bytes, expected {rows} of at "
            f"most {most}"
        )
