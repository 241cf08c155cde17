"""Vectors that something else made, with the passages they are of: an index without encoding.

The encoder is declared, and believed only after some passages were encoded again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import DataError, EncoderMismatchError, RagmoeError
from ragmoe._keys import KeyTable
from ragmoe._parquet import absurd
from ragmoe.corpus.passages import OnError, PassageReader, read_passages
from ragmoe.index.build import encoder_record
from ragmoe.index.encoder import DEFAULT_ENCODER, Encoder, load_encoder
from ragmoe.index.plan import BuildPlan, How, make_plan, read_contents
from ragmoe.index.rows import Row, Rows, SourceRows, blocks
from ragmoe.index.target import NewIndex
from ragmoe.index.vectors import unit_rows, without_direction
from ragmoe.index.verify import ALIKE
from ragmoe.index.windows import LongPassages, cut_windows, encode_passages

_BATCH = 1024
_SAMPLE = 16
#: Vectors (rows, R) of some float, and the row of each id; None where rows stand in the order of the passages.
Given = tuple[NDArray[Any], KeyTable | None]
READERS: dict[str, Callable[[Path, Path | None], Given]] = {}


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What to make an index of, of passages and vectors.

    Attributes:
        vectors: a ``.npy`` of (rows, R) floats, or a ``.parquet`` with columns ``id`` and ``embedding``.
        sources: of the passages, as for a build.
        ids: with ``.npy``: a file with an id a line, by row; the rows are those of the passages, in order, if None.
        encoder: that made the vectors: its name, or an `Encoder`.
        long_passages: what it did with passages longer than it reads; most cut them.
        encoding: of text files among the sources.
    """

    vectors: Path
    sources: tuple[str, ...]
    out: Path
    ids: Path | None = None
    encoder: str | Encoder = DEFAULT_ENCODER
    domain: str | None = None
    on_error: OnError = "fail"
    long_passages: LongPassages = "truncate"
    encoding: str = "utf-8"
    resume: bool = False
    overwrite: bool = False


def plan_import(options: ImportOptions) -> BuildPlan:
    """Read passages and vectors, and encode some passages again to see whether the encoder is the one declared.

    Raises:
        DataError: a bad line or source; vectors that cannot be read, are not finite, or are not one for each passage.
        EncoderMismatchError: the encoder's own vectors of the same passages differ; names cosines.
        ConfigError: there is no such encoder.
        IndexFolderError: ``out`` may not be written to.
    """
    target = NewIndex(options.out, options.resume, options.overwrite)
    target.check()
    vectors, rows_by_id = _read(options.vectors, options.ids)
    reader = read_passages(options.sources, domain=options.domain, on_error=options.on_error, encoding=options.encoding)
    encoder = load_encoder(options.encoder)
    how = How(encoder_record(encoder), options.long_passages, 200, 40, False)
    _check_numbers(options.vectors, vectors, encoder)
    rows = ImportedRows(options, reader, vectors, rows_by_id, encoder)
    contents = read_contents(rows)
    if contents.passages != len(vectors):
        raise DataError(f"{options.vectors} holds {len(vectors):,} vectors, the sources {contents.passages:,} passages")
    _check_sample(options, rows, how, encoder)
    return make_plan(target, rows, how, None, contents)


class ImportedRows(Rows):
    """What a reader reads, each passage with its given vector."""

    def __init__(
        self,
        options: ImportOptions,
        reader: PassageReader,
        vectors: NDArray[Any],
        rows: KeyTable | None,
        encoder: Encoder,
    ) -> None:
        super().__init__()
        self._options = options
        self._source = SourceRows(reader, options.sources, None)
        self._vectors = vectors
        self._rows = rows
        self._encoder = encoder
        #: Some rows, evenly spread.
        self.sample: list[Row] = []

    def __iter__(self) -> Iterator[Row]:
        self.sample, step, number = [], 1, 0
        prompt = self._encoder.prompts["passage"]
        for block in blocks(self._source, _BATCH):
            windows = cut_windows([row.chunk.passage for row in block], self._encoder, prompt=prompt).per_passage
            for row, count in zip(block, windows.tolist(), strict=True):
                made = Row(row.chunk, self._at(row.chunk.passage.id, number), count)
                if number % step == 0:
                    self.sample.append(made)
                if len(self.sample) > 2 * _SAMPLE:
                    self.sample, step = self.sample[::2], 2 * step
                number += 1
                yield made

    @property
    def skipped(self) -> Sequence[str]:
        return self._source.skipped

    def nothing(self) -> RagmoeError:
        return self._source.nothing()

    def take(self, at: NDArray[np.int64]) -> NDArray[np.float16]:
        return unit_rows(self._vectors, at).astype(np.float16)

    def _at(self, name: str, number: int) -> int:
        found = self._rows.get(name) if self._rows else str(number)
        if found is None or int(found) >= len(self._vectors):
            raise DataError(
                f"passage {name!r} has no vector in {self._options.vectors}, which holds {len(self._vectors):,}"
            )
        return int(found)


def reads(suffix: str) -> Callable[[Callable[[Path, Path | None], Given]], Callable[[Path, Path | None], Given]]:
    """Register what reads vectors from files of a suffix."""

    def register(reader: Callable[[Path, Path | None], Given]) -> Callable[[Path, Path | None], Given]:
        READERS[suffix] = reader
        return reader

    return register


@reads(".npy")
def _read_npy(path: Path, ids: Path | None) -> Given:
    # A header that names more than the file holds is refused by the mapping itself.
    vectors: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if ids is None:
        return vectors, None
    with ids.open(encoding="utf-8-sig") as file:
        rows, count = _by_id(ids, (line.rstrip("\n") for line in file))
    if count != len(vectors):
        raise DataError(f"{path} holds {len(vectors):,} vectors, {ids} {count:,} ids")
    return vectors, rows


@reads(".parquet")
def _read_parquet(path: Path, ids: Path | None) -> Given:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if ids is not None:
        raise DataError(f"{path} has ids of its own; expected no file of ids beside it")
    rows, count = KeyTable(), 0
    # Parquet cannot be mapped: the vectors go through a temporary file.
    spool, width = tempfile.TemporaryFile(), 0  # noqa: SIM115
    with pq.ParquetFile(path) as file:
        if missing := {"id", "embedding"} - set(file.schema_arrow.names):
            raise DataError(f"{path} has no column {', '.join(sorted(missing))}; it has: {file.schema_arrow.names}")
        ids_are, vectors_are = (file.schema_arrow.field(name).type for name in ("id", "embedding"))
        if pa.types.is_nested(ids_are) or not _is_list_of_numbers(vectors_are):
            raise DataError(
                f"{path} has ids of type {ids_are} and embeddings of type {vectors_are}; expected strings or whole "
                "numbers, and lists of floats"
            )
        if bad := absurd(path, file.metadata):
            raise DataError(f"{path} cannot be read: {bad}")
        for batch in file.iter_batches(batch_size=_BATCH, columns=["id", "embedding"]):
            if batch.column("embedding").null_count:
                row = count + batch.column("embedding").is_null().index(True).as_py() + 1
                raise DataError(f"{path}: row {row} has no embedding")
            vectors = np.stack([np.asarray(row, dtype=np.float32) for row in batch.column("embedding").to_numpy(False)])
            if width not in (0, vectors.shape[1]):
                raise DataError(f"{path} has vectors of width {width} and of {vectors.shape[1]}")
            width = vectors.shape[1]
            spool.write(vectors.tobytes())
            rows, count = _by_id(path, batch.column("id").cast(pa.string()).to_pylist(), rows, count)
    spool.flush()
    if not count:
        raise DataError(f"{path} holds no vectors")
    return np.memmap(spool, dtype=np.float32, mode="r", shape=(count, width)), rows


def _is_list_of_numbers(kind: Any) -> bool:
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)


def _read(path: Path, ids: Path | None) -> Given:
    import pyarrow as pa

    if path.suffix not in READERS:
        raise DataError(f"{path} is no file of vectors; expected one of: {', '.join(READERS)}")
    try:
        vectors, rows = READERS[path.suffix](path, ids)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or path}: there is no such file") from None
    except (ValueError, TypeError, EOFError, OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {(str(error).splitlines() or ['?'])[0]}") from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise DataError(f"{path} holds {vectors.dtype} of shape {vectors.shape}; expected floats (rows, width)")
    return vectors, rows


def _by_id(
    path: Path, names: Iterable[str | None], rows: KeyTable | None = None, count: int = 0
) -> tuple[KeyTable, int]:
    """The row of each id, and how many there are; behind those that are there already."""
    rows = rows or KeyTable()
    for name in names:
        if not name:
            raise DataError(f"{path}: row {count + 1} has no id")
        if rows.put(name, str(count)) is not None:
            raise DataError(f"{path}: id {name!r} stands twice")
        count += 1
    return rows, count


def _check_numbers(path: Path, vectors: NDArray[Any], encoder: Encoder) -> None:
    if vectors.shape[1] != encoder.width:
        raise EncoderMismatchError(
            f"{path} holds vectors of width {vectors.shape[1]}, encoder {encoder.id!r} makes such of {encoder.width}"
        )
    for start in range(0, len(vectors), _BATCH):
        bad = without_direction(vectors[start : start + _BATCH])
        if len(bad):
            raise DataError(f"{path}: vector {start + bad[0] + 1} is zero or not finite")


def _check_sample(options: ImportOptions, rows: ImportedRows, how: How, encoder: Encoder) -> None:
    passages = [row.chunk.passage for row in rows.sample]
    own, _ = encode_passages(passages, encoder, mode=how.long_passages, prompt=how.encoder.passage_prompt)
    given = rows.take(np.asarray([row.at for row in rows.sample], dtype=np.int64))
    cosines = (own * given.astype(np.float32)).sum(axis=1)
    if (cosines >= ALIKE).all():
        return
    worst = int(cosines.argmin())
    raise EncoderMismatchError(
        f"{options.vectors} holds other vectors than encoder {encoder.id!r} ({encoder.digest[:12]}) makes: of "
        f"{len(cosines)} passages encoded again {int((cosines < ALIKE).sum())} have a cosine below {ALIKE}, the lowest "
        f"{cosines[worst]:.3f} ({passages[worst].id!r}), the mean {cosines.mean():.3f}",
        hint=f"expected is: title, line break, text, with the prompt {how.encoder.passage_prompt!r} in front; longer "
        f"ones {how.long_passages!r}; another encoder is declared by --encoder",
    )
