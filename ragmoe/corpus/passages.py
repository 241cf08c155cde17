"""Passages from files, folders, globs and Hub data sets, with every bad line named."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from ragmoe._errors import DataError, UsageError
from ragmoe._keys import KeyTable
from ragmoe.corpus.chunking import Chunk, check_sizes, chunk_passage
from ragmoe.corpus.files import check_encoding, is_text
from ragmoe.corpus.records import Record, read_hub, reader_of
from ragmoe.corpus.sources import source_files
from ragmoe.corpus.types import Passage

OnError = Literal["fail", "skip"]
_SPLITS = ("train", "dev", "test", "none")


class PassageReader:
    """An iterable over the passages of some sources; made by `read_passages`.

    Attributes:
        skipped: the bad lines passed over, ``FILE:LINE: reason``, with ``on_error="skip"``.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        domain: str | None,
        chunk_words: int,
        chunk_overlap: int,
        rechunk: bool,
        on_error: OnError,
        encoding: str,
        whole: bool = False,
    ) -> None:
        check_sizes(chunk_words, chunk_overlap)
        check_encoding(encoding)
        self.skipped: list[str] = []
        self._sources = sources
        self._domain = domain
        self._words = chunk_words
        self._overlap = chunk_overlap
        self._rechunk, self._whole = rechunk, whole
        self._on_error = on_error
        self._encoding = encoding

    def __iter__(self) -> Iterator[Passage]:
        return (chunk.passage for chunk in self.chunks())

    def chunks(self) -> Iterator[Chunk]:
        """The passages with where each stands in what it was cut from."""
        self.skipped = []
        places = KeyTable()
        for record, name in self._records():
            passage, has_id = self._passage(record, name)
            # Before it is cut: of two texts with one id the pieces would be taken for those of one.
            if passage is None or not self._is_new(places, passage.id, record.place):
                continue
            if self._whole or (has_id and not self._rechunk):
                yield Chunk(passage, passage.id)
                continue
            for chunk in chunk_passage(passage, words=self._words, overlap=self._overlap):
                if chunk.passage.id == passage.id or self._is_new(places, chunk.passage.id, record.place):
                    yield chunk

    def _is_new(self, places: KeyTable, id: str, place: str) -> bool:
        """Whether an id was not seen before; where it was, the record is bad."""
        first = places.put(id, _printable(place))
        if first is not None:
            self._bad(place, f"id {id!r} stands already at {first}")
        return first is None

    def _records(self) -> Iterator[tuple[Record, str]]:
        """Each record and the id it gets if it brings none."""
        for source, files in source_files(self._sources):
            if source.startswith("hub:"):
                for number, record in enumerate(read_hub(source), start=1):
                    yield record, f"{source.removeprefix('hub:')}-{number}"
            for path, name in files:
                read = reader_of(path)
                try:
                    for number, record in enumerate(read(path, self._encoding) if read else (), start=1):
                        yield record, name if record.document else f"{name}-{number}"
                except OSError as error:
                    raise DataError(f"{path} cannot be read: {error.strerror or error}") from error

    def _passage(self, record: Record, name: str) -> tuple[Passage | None, bool]:
        """The passage of a record, None where it is bad, and whether it brought its own id."""
        record = _with_metadata(record)
        problem = record.problem or _problem(record)
        if problem or record.fields is None:
            self._bad(record.place, problem)
            return None, False
        fields = record.fields
        own = next((str(fields[key]) for key in ("id", "_id") if fields.get(key) not in (None, "")), "")
        identity = own or name
        if identity != _printable(identity):
            self._bad(record.place, "the file's name is not UTF-8, and no id stands in its place")
            return None, False
        passage = Passage(
            id=identity,
            text=fields["text"],
            title=fields.get("title") or "",
            domain=fields.get("domain") or self._domain or "",
            doc_id=str(fields["doc_id"]) if fields.get("doc_id") not in (None, "") else identity,
            split=fields.get("split") or "none",
        )
        return passage, bool(own)

    def _bad(self, place: str, reason: str) -> None:
        place = _printable(place)
        if self._on_error == "fail":
            hint = "mend it, or pass over what is bad with --on-error skip"
            if reason.startswith("not UTF-8"):
                hint = "if the file is Latin-1, read it with --encoding latin-1; else " + hint
            raise DataError(f"{place}: {reason}", hint=hint)
        self.skipped.append(f"{place}: {reason}")


def _printable(name: str) -> str:
    """A name as it can be written: what is not UTF-8 in a file's name becomes question marks."""
    return name.encode("utf-8", "replace").decode()


def read_passages(
    sources: Sequence[str | os.PathLike[str]],
    *,
    domain: str | None = None,
    chunk_words: int = 200,
    chunk_overlap: int = 40,
    rechunk: bool = False,
    on_error: OnError = "fail",
    encoding: str = "utf-8",
) -> PassageReader:
    """Read passages from jsonl, parquet, csv, txt, md and html files, folders of them, globs, and ``hub:`` data sets.

    All but parquet may be compressed by gzip or zstd (``.jsonl.gz``, ``.txt.zst``); they are unpacked as they are read.

    Records have ``text``, and may have ``id`` (or BEIR's ``_id``), ``title``, ``domain``, ``doc_id`` and ``split``, the
    last three also in BEIR's ``metadata``.
    What has an id is a passage and stays whole unless ``rechunk`` is set; what has none, and running text, is cut
    into chunks.

    Args:
        domain: of records that name none.
        chunk_words: words in a chunk at most.
        chunk_overlap: words that neighbouring chunks share.
        on_error: ``fail`` raises at the first bad line, ``skip`` notes it in ``.skipped``.
        encoding: of text files, by Python's name for it; a byte order mark of UTF-8 is no part of the text.

    Raises:
        DataError: on reading, naming the file, the line and the reason; also a source that does not exist.
        UsageError: chunk sizes that make no sense, or an unknown encoding.
    """
    names = _names(sources)
    return PassageReader(
        names,
        domain=domain,
        chunk_words=chunk_words,
        chunk_overlap=chunk_overlap,
        rechunk=rechunk,
        on_error=on_error,
        encoding=encoding,
    )


def _names(sources: Sequence[str | os.PathLike[str]]) -> list[str]:
    # A single string is a sequence of strings too, of which "/" is a folder.
    if isinstance(sources, str | os.PathLike):
        raise UsageError(f"a single source was given, {os.fspath(sources)!r}; expected a list of them")
    return [os.fspath(source) for source in sources]


def read_documents(sources: Sequence[str | os.PathLike[str]], *, encoding: str = "utf-8") -> PassageReader:
    """Read whole documents from the same sources: nothing is cut, whether it has an id or not.

    A file of running text is one document, and so is each record.

    Raises:
        DataError: as ``read_passages``.
    """
    return PassageReader(
        _names(sources),
        domain=None,
        chunk_words=200,
        chunk_overlap=0,
        rechunk=False,
        on_error="fail",
        encoding=encoding,
        whole=True,
    )


def _with_metadata(record: Record) -> Record:
    """A record of BEIR's form, which says in ``metadata`` what it does not say itself, as an index exports it.

    What others put there under these names, and is nothing that a passage could have, stays where it is.
    """
    fields = record.fields or {}
    said = fields.get("metadata")
    if not isinstance(said, dict):
        return record
    taken = {key: said[key] for key in ("domain", "doc_id", "split") if isinstance(said.get(key), str)}
    taken = {key: value for key, value in taken.items() if key != "split" or value in _SPLITS}
    own = {key: value for key, value in fields.items() if value not in (None, "")}
    return replace(record, fields={**fields, **taken, **own})


def _problem(record: Record) -> str:
    """What is wrong with a record's fields, '' if nothing."""
    fields: dict[str, Any] = record.fields or {}
    text = fields.get("text")
    if text is None:
        if "text" in fields:
            return "'text' is null"
        return f"no 'text'; it has: {', '.join(sorted(map(str, fields))) or 'nothing'}"
    if not isinstance(text, str):
        return f"'text' is {type(text).__name__}, expected a string"
    if not text.strip():
        return "'text' is empty"
    for key in ("title", "domain", "split"):
        if not isinstance(fields.get(key) or "", str):
            return f"{key!r} is {type(fields[key]).__name__}, expected a string"
    if (fields.get("split") or "none") not in _SPLITS:
        return f"'split' is {fields['split']!r}, expected one of {', '.join(_SPLITS)}"
    for key in ("id", "_id", "doc_id"):
        if not isinstance(fields.get(key) or "", str | int) or isinstance(fields.get(key), bool):
            return f"{key!r} is {type(fields[key]).__name__}, expected a string or a whole number"
    if not is_text("".join(str(fields.get(key) or "") for key in ("id", "_id", "doc_id", "title", "text", "domain"))):
        return "it holds half of a surrogate pair, which is not text"
    return ""
