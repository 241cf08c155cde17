"""Passages from files, folders, globs and Hub data sets, with every bad line named."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ragmoe._errors import DataError
from ragmoe.corpus.chunking import Chunk, check_sizes, chunk_passage
from ragmoe.corpus.records import READERS, Record, read_hub
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
    ) -> None:
        check_sizes(chunk_words, chunk_overlap)
        self.skipped: list[str] = []
        self._sources = sources
        self._domain = domain
        self._words = chunk_words
        self._overlap = chunk_overlap
        self._rechunk = rechunk
        self._on_error = on_error

    def __iter__(self) -> Iterator[Passage]:
        return (chunk.passage for chunk in self.chunks())

    def chunks(self) -> Iterator[Chunk]:
        """The passages with where each stands in what it was cut from."""
        self.skipped = []
        places: dict[str, str] = {}
        for record, name in self._records():
            passage, has_id = self._passage(record, name)
            if passage is None:
                continue
            cut = self._rechunk or not has_id
            for chunk in (
                chunk_passage(passage, words=self._words, overlap=self._overlap)
                if cut
                else [Chunk(passage, passage.id)]
            ):
                first = places.setdefault(chunk.passage.id, record.place)
                if first is not record.place:
                    self._bad(record.place, f"id {chunk.passage.id!r} stands already at {first}")
                    continue
                yield chunk

    def _records(self) -> Iterator[tuple[Record, str]]:
        """Each record and the id it gets if it brings none."""
        for source in self._sources:
            if source.startswith("hub:"):
                for number, record in enumerate(read_hub(source), start=1):
                    yield record, f"{source.removeprefix('hub:')}-{number}"
                continue
            for path, name in source_files(source):
                for number, record in enumerate(READERS[path.suffix.lower()](path), start=1):
                    yield record, name if record.document else f"{name}-{number}"

    def _passage(self, record: Record, name: str) -> tuple[Passage | None, bool]:
        """The passage of a record, None where it is bad, and whether it brought its own id."""
        problem = record.problem or _problem(record)
        if problem or record.fields is None:
            self._bad(record.place, problem)
            return None, False
        fields = record.fields
        own = next((str(fields[key]) for key in ("id", "_id") if fields.get(key) not in (None, "")), "")
        identity = own or name
        passage = Passage(
            id=identity,
            text=fields["text"],
            title=fields.get("title") or "",
            domain=fields.get("domain") or self._domain or "",
            doc_id=str(fields.get("doc_id") or identity),
            split=fields.get("split") or "none",
        )
        return passage, bool(own)

    def _bad(self, place: str, reason: str) -> None:
        if self._on_error == "fail":
            raise DataError(f"{place}: {reason}", hint="mend the line, or pass over bad lines with --on-error skip")
        self.skipped.append(f"{place}: {reason}")


def read_passages(
    sources: Sequence[str | os.PathLike[str]],
    *,
    domain: str | None = None,
    chunk_words: int = 200,
    chunk_overlap: int = 40,
    rechunk: bool = False,
    on_error: OnError = "fail",
) -> PassageReader:
    """Read passages from jsonl, parquet, csv, txt, md and html files, folders of them, globs, and ``hub:`` data sets.

    Records have ``text``, and may have ``id`` (or BEIR's ``_id``), ``title``, ``domain``, ``doc_id`` and ``split``.
    What has an id is a passage and stays whole unless ``rechunk`` is set; what has none, and running text, is cut
    into chunks.

    Args:
        domain: of records that name none.
        chunk_words: words in a chunk at most.
        chunk_overlap: words that neighbouring chunks share.
        on_error: ``fail`` raises at the first bad line, ``skip`` notes it in ``.skipped``.

    Raises:
        DataError: on reading, naming the file, the line and the reason; also a source that does not exist.
        UsageError: chunk sizes that make no sense.
    """
    names = [os.fspath(source) for source in sources]
    return PassageReader(
        names, domain=domain, chunk_words=chunk_words, chunk_overlap=chunk_overlap, rechunk=rechunk, on_error=on_error
    )


def source_files(source: str) -> list[tuple[Path, str]]:
    """The files of a source in order of name, each with the name that its records' ids are made from.

    In a folder that holds a ``corpus`` file (as BEIR's and ours do, questions beside it) only that one is read.
    """
    formats = " ".join(sorted(suffix.lstrip(".") for suffix in READERS))
    path = Path(source).expanduser()
    if path.is_dir():
        files = _folder_files(path)
        if not files:
            raise DataError(f"folder {source} holds no file of a known format ({formats})")
        return [(file, file.relative_to(path).as_posix()) for file in files]
    if not path.exists():
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not matches:
            near = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
            there = f"; in {path.parent} there is: {', '.join(near)}" if near else ""
            raise DataError(f"source {source}: there is no such file, folder or match of a pattern{there}")
        return [pair for match in matches for pair in source_files(str(match))]
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"source {source}: the format {path.suffix or 'without a suffix'!r} is unknown; known are: {formats}"
        )
    return [(path, path.name)]


def _folder_files(folder: Path) -> list[Path]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix.lower() in READERS]
    corpora = {p.parent for p in files if p.stem == "corpus"}
    return [p for p in files if p.stem == "corpus" or p.parent not in corpora]


def _problem(record: Record) -> str:
    """What is wrong with a record's fields, '' if nothing."""
    fields: dict[str, Any] = record.fields or {}
    text = fields.get("text")
    if text is None:
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
    try:
        "".join(str(fields.get(key) or "") for key in ("id", "_id", "doc_id", "title", "text", "domain")).encode()
    except UnicodeEncodeError:
        return "it holds half of a surrogate pair, which is not text"
    return ""
