"""Corpora as people have them: each case a right result, or an error that says where and what to do."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stub_encoder import StubEncoder

from ragmoe import DataError, Index, UsageError
from ragmoe.corpus import files, read_passages
from ragmoe.index import BuildOptions, build_index

LONG = f"ten{'-' * 10_000_000}megabytes"
RIGHT_TO_LEFT = "שלום עולם, مرحبا بالعالم"
EMOJI = "👩‍👩‍👧‍👦 and 🏴󠁧󠁢󠁳󠁣󠁴󠁿 e\u0301"


def jsonl(*texts: str, ids: str = "abcdefgh") -> bytes:
    rows = [json.dumps({"id": name, "text": text}, ensure_ascii=False) for name, text in zip(ids, texts)]
    return "".join(row + "\n" for row in rows).encode()


def zst(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content))


def parquet(*texts: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": list("abcdefgh"[: len(texts)]), "text": list(texts)}), sink)
    return sink.getvalue()


NOISE = np.random.default_rng(0).bytes(20_000).hex()
TWO = jsonl("one", "two")

#: Name of a file, its bytes, options of the build, and the texts that come of it.
RIGHT: dict[str, tuple[str, bytes, dict[str, Any], list[str]]] = {
    "byte order mark": ("c.jsonl", codecs.BOM_UTF8 + TWO, {}, ["one", "two"]),
    "byte order mark in csv": ("c.csv", codecs.BOM_UTF8 + b"id,text\na,one\n", {}, ["one"]),
    "byte order mark, named": ("c.jsonl", codecs.BOM_UTF8 + TWO, {"text_encoding": "UTF8"}, ["one", "two"]),
    "latin-1": ("c.jsonl", b'{"id": "a", "text": "caf\xe9"}\n', {"text_encoding": "latin-1"}, ["café"]),
    "latin-1 in csv": ("c.csv", b"id,text\na,caf\xe9\n", {"text_encoding": "latin-1"}, ["café"]),
    "latin-1 in running text": ("c.txt", b"caf\xe9", {"text_encoding": "latin-1"}, ["café"]),
    # The second byte of this letter is that of a line end.
    "utf-16": ("c.jsonl", '{"id": "a", "text": "aĊb"}\n'.encode("utf-16"), {"text_encoding": "utf-16"}, ["aĊb"]),
    "latin-1 where it is skipped": (
        "c.jsonl",
        jsonl("one") + b'{"id": "x", "text": "caf\xe9"}\n' + jsonl("two", ids="b"),
        {"on_error": "skip"},
        ["one", "two"],
    ),
    "NUL in JSON": ("c.jsonl", b'{"id": "a", "text": "one\\u0000two"}\n', {}, ["one\0two"]),
    "NUL in running text": ("c.txt", b"one\0two", {}, ["one\0two"]),
    "NUL in csv": ("c.csv", b"id,text\na,one\0two\n", {}, ["one\0two"]),
    "a line of ten megabytes": ("c.jsonl", jsonl(LONG, "two"), {}, [LONG, "two"]),
    "empty texts where they are skipped": ("c.jsonl", jsonl("", "two", " \n"), {"on_error": "skip"}, ["two"]),
    "duplicates where they are skipped": ("c.jsonl", TWO + jsonl("three"), {"on_error": "skip"}, ["one", "two"]),
    "one passage": ("c.jsonl", jsonl("one"), {}, ["one"]),
    "right to left": ("c.jsonl", jsonl(RIGHT_TO_LEFT), {}, [RIGHT_TO_LEFT]),
    "right to left in csv": ("c.csv", f'id,text\na,"{RIGHT_TO_LEFT}"\n'.encode(), {}, [RIGHT_TO_LEFT]),
    "emoji": ("c.jsonl", jsonl(EMOJI), {}, [EMOJI]),
    "emoji as pairs of surrogates": ("c.jsonl", b'{"id": "a", "text": "\\ud83d\\ude00"}\n', {}, ["😀"]),
    "emoji in running text": ("c.txt", EMOJI.encode(), {}, [EMOJI]),
    "CRLF": ("c.jsonl", TWO.replace(b"\n", b"\r\n"), {}, ["one", "two"]),
    "CRLF in csv": ("c.csv", b'id,text\r\na,"one\r\ntwo"\r\n', {}, ["one\r\ntwo"]),
    "CRLF in running text": ("c.txt", b"one\r\ntwo", {}, ["one\ntwo"]),
    "no line end at the end": ("c.jsonl", TWO[:-1], {}, ["one", "two"]),
    "nested folders": ("x/y/z/c.jsonl", TWO, {}, ["one", "two"]),
    "gz": ("c.jsonl.gz", gzip.compress(TWO), {}, ["one", "two"]),
    "gz of several members": ("c.jsonl.gz", gzip.compress(TWO[:7]) + gzip.compress(TWO[7:]), {}, ["one", "two"]),
    "zst": ("c.jsonl.zst", zst(TWO), {}, ["one", "two"]),
    "capitals": ("C.JSONL.GZ", gzip.compress(TWO), {}, ["one", "two"]),
    "csv in gz": ("c.csv.gz", gzip.compress(b"id,text\na,one\n"), {}, ["one"]),
    "text in zst": ("c.txt.zst", zst(b"one"), {}, ["one"]),
    "html in gz": ("c.html.gz", gzip.compress(b"<p>one</p>"), {}, ["one"]),
    "latin-1 in gz": ("c.md.gz", gzip.compress(b"caf\xe9"), {"text_encoding": "latin-1"}, ["café"]),
    "parquet": ("c.parquet", parquet("one", "two"), {}, ["one", "two"]),
}  # fmt: skip

#: Name of a file, its bytes, options of the build, and what the error says.
WRONG: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "latin-1": (
        "c.jsonl",
        jsonl("one") + b'{"id": "b", "text": "caf\xe9"}\n',
        {},
        r"c\.jsonl:2: not UTF-8: byte 0xe9 at byte 25 of the line\n.* --encoding latin-1",
    ),
    "latin-1 in csv": ("c.csv", b"id,text\na,caf\xe9\n", {}, r"c\.csv:2: .* 4 of column 'text'\n.* --encoding latin-1"),
    "latin-1 in running text": ("c.md", b"one\ntwo \xe9", {}, r"c\.md:2: .* 5 of the line\n.* --encoding latin-1"),
    "utf-16": ("c.txt", "text".encode("utf-16"), {}, r"c\.txt:1: not UTF-8: byte 0xff at byte 1 of the line"),
    "half of utf-16": ("c.txt", "text".encode("utf-16")[:-1], {"text_encoding": "utf-16"}, r"c\.txt: not UTF-16"),
    "not of the encoding": ("c.txt", b"one \x81", {"text_encoding": "cp1252"}, r"c\.txt:1: not CP1252: byte 0x81 at"),
    "a raw NUL in JSON": ("c.jsonl", b'{"id": "a", "text": "one\0"}\n', {}, "Invalid control character at column"),
    "empty text": ("c.jsonl", jsonl("one", " "), {}, r"c\.jsonl:2: 'text' is empty"),
    "duplicate ids": ("c.jsonl", TWO + TWO, {}, r"c\.jsonl:3: id 'a' stands already at .*c\.jsonl:1"),
    "no passages": ("c.jsonl", b"", {}, r"no passages in .*"),
    "no passages in an empty gz": ("c.jsonl.gz", gzip.compress(b""), {}, r"no passages in .*"),
    "a csv of a header alone": ("c.csv", b"id,text\n", {}, r"no passages in .*"),
    "an empty parquet": ("c.parquet", parquet(), {}, r"no passages in .*"),
    "parquet without its footer": ("c.parquet", parquet(NOISE)[:-30], {}, r"c\.parquet: not parquet: "),
    "parquet with a broken footer": ("c.parquet", parquet(NOISE)[:-40] + bytes(40), {}, "not parquet"),
    "a gz cut short": ("c.jsonl.gz", gzip.compress(jsonl("one", NOISE))[:-9000], {}, r"c\.jsonl\.gz:2: damaged"),
    "a gz of other bytes": ("c.csv.gz", b"id,text\na,one\n", {}, r"c\.csv\.gz:1: .*damaged from here on: .* header"),
    "a gz with a flipped byte": (
        "c.jsonl.gz",
        gzip.compress(TWO)[:-6] + b"?" + gzip.compress(TWO)[-5:],
        {},
        r"c\.jsonl\.gz:\d: damaged from here on: .*incorrect data check",
    ),
    "a zst cut short": ("c.txt.zst", zst(NOISE.encode())[:-9], {}, r"c\.txt\.zst: damaged from here on: Truncated"),
    "a compressed parquet": ("c.parquet.gz", gzip.compress(parquet("one")), {}, "holds no file of a known format"),
}  # fmt: skip


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Index]:
    """Builds an index of one file in a folder, by the function users call, and opens it."""

    def run(name: str, content: bytes, options: dict[str, Any]) -> Index:
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        build_index(BuildOptions((str(tmp_path / "docs"),), tmp_path / "index", encoder=StubEncoder(), **options))
        return Index.open(tmp_path / "index", encoder=StubEncoder())

    return run


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_read_right(case: str, build: Callable[..., Index]) -> None:
    name, content, options, expected = RIGHT[case]
    assert [passage.text for passage in build(name, content, options).iterate()] == expected


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str, build: Callable[..., Index], tmp_path: Path) -> None:
    name, content, options, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        build(name, content, options)
    assert not (tmp_path / "index").exists()


def test_what_is_damaged_further_on_is_read_so_far_where_it_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BUFFER", 1000)
    source = tmp_path / "c.jsonl.gz"
    rows = jsonl(*(NOISE[i * 5000 : i * 5000 + 4900] for i in range(8)))
    source.write_bytes(gzip.compress(rows)[:-1500])
    reader = read_passages([source], on_error="skip")
    read = list(reader)
    assert 0 < len(read) < 8
    assert reader.skipped == [f"{source}:{len(read) + 1}: damaged from here on: Truncated compressed stream"]


def test_titles_and_the_corpus_of_a_folder_do_not_depend_on_compression(tmp_path: Path) -> None:
    (tmp_path / "tale.txt.gz").write_bytes(gzip.compress(b"one"))
    assert [passage.title for passage in read_passages([tmp_path])] == ["tale"]
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(TWO))
    assert [passage.text for passage in read_passages([tmp_path])] == ["one", "two"]


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.csv.gz", "c.txt.gz"])
def test_a_bomb_is_refused_before_it_has_burst(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB in 64 kB: no more of it is ever in memory than a line may have."""
    (tmp_path / name).write_bytes(gzip.compress(b"text," + b"x" * 64_000_000))
    monkeypatch.setattr(files, "MOST", 1_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"more than 1,000,000 characters"):
            list(read_passages([tmp_path / name]))
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["latin-17", "rot13", "base64", ""])
def test_an_encoding_that_is_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"encoding '{name}' is unknown\nknown are utf-8, latin-1"):
        read_passages([tmp_path], encoding=name)


def test_a_files_name_that_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "good.md").write_text("# Good\n\nA text.\n")
    strange = os.path.join(os.fsencode(folder), b"caf\xe9.md")
    Path(os.fsdecode(strange)).write_text("# Bad\n\nA text.\n")
    with pytest.raises(DataError, match=r"caf\?\.md.*: the file's name is not UTF-8, and no id stands in its place"):
        list(read_passages([folder]))
    reader = read_passages([folder], on_error="skip")
    assert len(list(reader)) == 1 and len(reader.skipped) == 1 and "caf?.md" in reader.skipped[0]
    # With ids of their own its records are read.
    Path(os.fsdecode(os.path.join(os.fsencode(folder), b"\xe9.jsonl"))).write_bytes(TWO)
    assert len(list(read_passages([folder], on_error="skip"))) == 3
