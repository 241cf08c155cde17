"""One reader a file format: each yields raw records with their place, bad ones included, and judges nothing.

Registered by suffix; a new format is one function with ``@reads``, of the file and the encoding of its text.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from ragmoe._errors import DataError
from ragmoe._parquet import absurd
from ragmoe.corpus import files


@dataclass(frozen=True, slots=True)
class Record:
    """A raw record.

    Attributes:
        place: where it stands, as users read it: ``FILE:LINE``, or ``FILE: row N``.
        fields: what it says; None where it could not be read.
        problem: why it could not be read.
        document: it is a whole file of running text, to be cut into chunks.
    """

    place: str
    fields: dict[str, Any] | None
    problem: str = ""
    document: bool = False


# What a passage's record may say; see ``read_passages``.
FIELDS = ("id", "_id", "doc_id", "title", "text", "domain", "split", "metadata")
RecordReader = Callable[[Path, str], Iterator[Record]]
# As CommonMark has it: "#tag" and "#!" are no headings.
_HEADING = re.compile(r"^#{1,6}[ \t]+(\S.*?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE)
# A comment in code is no heading.
_FENCED = re.compile(r"^[ ]{0,3}(`{3,}(?![^\n]*`)|~{3,}).*?(?:^[ ]{0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
READERS: dict[str, RecordReader] = {}
#: Readers of files that are one document each.
RUNNING: set[RecordReader] = set()


def reads(*suffixes: str, packed: bool = True, running: bool = False) -> Callable[[RecordReader], RecordReader]:
    """Register a reader for files with these suffixes.

    Args:
        packed: they may be compressed, with a suffix of that behind.
        running: each is a document of running text.
    """
    behind = ("", *files.CODECS) if packed else ("",)

    def register(reader: RecordReader) -> RecordReader:
        READERS.update({suffix + more: reader for suffix in suffixes for more in behind})
        RUNNING.update({reader} if running else ())
        return reader

    return register


def reader_of(path: Path) -> RecordReader | None:
    """What reads files of a name, None where its format is unknown."""
    ends = ("".join(path.suffixes[-2:]).lower(), path.suffix.lower())
    return next((READERS[end] for end in ends if end in READERS), None)


@reads(".jsonl")
def read_jsonl(path: Path, encoding: str) -> Iterator[Record]:
    """A JSON object a line; blank lines are passed over."""
    number = 0
    try:
        for number, line in enumerate(files.lines(path, encoding, "\n"), start=1):
            if line.strip():
                yield _json_line(f"{path}:{number}", line, encoding)
    except files.UnreadableError as error:
        yield Record(f"{path}:{number + 1}", None, str(error))


def _json_line(place: str, line: str, encoding: str) -> Record:
    if bad := files.misfit(line, encoding):
        return Record(place, None, bad[1])
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        return Record(place, None, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return Record(place, None, "not JSON that can be read: nested too deeply")
    except ValueError as error:  # a number of more digits than Python converts
        return Record(place, None, f"not JSON that can be read: {error}")
    if not isinstance(fields, dict):
        return Record(place, None, f"expected a JSON object, got {type(fields).__name__}")
    return Record(place, fields)


@reads(".csv")
def read_csv(path: Path, encoding: str) -> Iterator[Record]:
    """Comma-separated with a header line; places name the line on which a row ends.

    A cell that is nothing but ``nan`` or ``NaN`` is what pandas and numpy write for a missing value: null.
    """
    csv.field_size_limit(files.MOST)
    # A byte that is not of the encoding spoils only its row, and the row's line is known.
    rows = csv.DictReader(files.lines(path, encoding, ""), strict=True)
    while True:
        try:
            row = next(rows, None)
        except (csv.Error, files.UnreadableError) as error:
            # What follows a broken quotation cannot be told apart: nothing more is read of this file.
            yield Record(f"{path}:{max(rows.line_num, 1)}", None, f"not CSV: {error}")
            return
        header = rows.fieldnames or []
        if bad := files.misfit(" ".join(header), encoding, "the header"):
            yield Record(f"{path}:1", None, bad[1])
            return
        if row is None:
            return
        place = f"{path}:{rows.line_num}"
        if None in row:
            yield Record(place, None, f"more columns than the header's {len(header)}")
        elif bad := _misfit_cell(row, encoding):
            yield Record(place, None, bad[1])
        else:
            yield Record(place, {key: None if cell in ("nan", "NaN") else cell for key, cell in row.items()})


def _misfit_cell(row: dict[str, Any], encoding: str) -> tuple[int, str] | None:
    cells = ((key, cell) for key, cell in row.items() if cell is not None)
    found = (files.misfit(cell.replace("\n", " "), encoding, f"column {key!r}") for key, cell in cells)
    return next(filter(None, found), None)


@reads(".parquet", packed=False)
def read_parquet(path: Path, encoding: str) -> Iterator[Record]:
    """The rows of a parquet file, read by row group; its text is UTF-8 whatever the encoding of others.

    Columns that no passage has, such as embeddings, are passed over: they may be many times the text. Where there is
    no text all are read, to be named.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        if bad := absurd(path, file.metadata):
            yield Record(str(path), None, bad)
            return
        there = file.schema_arrow.names
        wanted = [name for name in FIELDS if name in there] if "text" in there else None
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{path}: row {number}", row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Record(str(path), None, f"not parquet: {error}" if not number else f"damaged after row {number}: {error}")


@reads(".txt", running=True)
def read_txt(path: Path, encoding: str) -> Iterator[Record]:
    """A whole file of running text; its name is the title."""
    yield _document(path, encoding, lambda text: (files.stem(path), text))


@reads(".md", ".markdown", running=True)
def read_md(path: Path, encoding: str) -> Iterator[Record]:
    """A Markdown file as it is; its first heading is the title."""

    def parse(text: str) -> tuple[str, str]:
        heading = _HEADING.search(_FENCED.sub("", text))
        return heading.group(1) if heading else files.stem(path), text

    yield _document(path, encoding, parse)


@reads(".html", ".htm", running=True)
def read_html(path: Path, encoding: str) -> Iterator[Record]:
    """The visible text of an HTML page; its ``<title>`` is the title."""

    def parse(text: str) -> tuple[str, str]:
        page = _Page()
        page.feed(text)
        page.close()
        return page.title.strip() or files.stem(path), page.text()

    yield _document(path, encoding, parse)


def read_hub(source: str) -> Iterator[Record]:
    """The rows of ``hub:NAME[:CONFIG][:SPLIT]`` through `datasets` (split ``train`` where none is named)."""
    parts = source.removeprefix("hub:").split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(f"source {source!r} is not of the form hub:NAME[:CONFIG][:SPLIT]")
    name, config, split = parts[0], None, "train"
    if len(parts) == 3:
        config, split = parts[1] or None, parts[2]
    elif len(parts) == 2:
        split = parts[1]
    import datasets

    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises many kinds: offline, unknown name, unknown split
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"source {source!r} cannot be loaded: {first}",
            hint="forms: hub:NAME, hub:NAME:SPLIT, hub:NAME:CONFIG:SPLIT; they need the network or a filled cache",
        ) from error
    for number, row in enumerate(rows, start=1):
        yield Record(f"{source}: row {number}", dict(row))


def _document(path: Path, encoding: str, parse: Callable[[str], tuple[str, str]]) -> Record:
    try:
        text = files.whole(path, encoding)
    except files.UnreadableError as error:
        return Record(str(path), None, str(error))
    if bad := files.misfit(text, encoding):
        return Record(f"{path}:{bad[0]}", None, bad[1])
    title, body = parse(text)
    return Record(str(path), {"title": title, "text": body}, document=True)


_BLOCK_TAGS = """
address article aside blockquote br caption dd details div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5
h6 header hr li main nav ol option p pre section summary table tr ul
"""


class _Page(HTMLParser):
    """Collects what a browser would show, a line break where a block ends and a space where a table cell does."""

    _HIDDEN = frozenset({"script", "style", "template", "noscript", "head"})
    _OF_HEAD = frozenset({"title", "meta", "link", "base", "script", "style", "template", "noscript"})
    _CELLS = frozenset({"td", "th"})
    _BLOCKS = frozenset(_BLOCK_TAGS.split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self._pieces: list[str] = []
        self._hidden: list[str] = []
        self._in_title = self._titled = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # </head> and <body> may both be left out: what cannot stand in a head ends it.
        if self._hidden[-1:] == ["head"] and tag not in self._OF_HEAD:
            self._hidden.pop()
        if tag in self._HIDDEN:
            self._hidden.append(tag)
        # An unclosed <head> or <noscript> must not swallow the page.
        if tag == "body":
            self._hidden.clear()
        # Pictures in the page have titles too.
        self._in_title = tag == "title" and not self._titled
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        if tag == "title":
            self._in_title, self._titled = False, bool(self.title.strip())
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._hidden:
            self._pieces.append(data)

    def _break(self, tag: str) -> None:
        if tag in self._BLOCKS:
            self._pieces.append("\n")
        elif tag in self._CELLS:
            self._pieces.append(" ")

    def text(self) -> str:
        lines = (" ".join(line.split()) for line in "".join(self._pieces).splitlines())
        return "\n".join(line for line in lines if line)
