"""Readers: every format gives the same passages, and every bad line is named with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragmoe import DataError, Passage, UsageError
from ragmoe.corpus import read_documents, read_passages
from ragmoe.corpus.records import read_parquet

ROWS = [
    {
        "id": "a",
        "title": "Ferries",
        "text": "The ferry leaves at six.",
        "domain": "river",
        "doc_id": "d1",
        "split": "dev",
    },
    {
        "id": "b",
        "title": "",
        "text": 'Bread, "fresh"\nfrom Millrace.',
        "domain": "market",
        "doc_id": "d2",
        "split": "train",
    },
]
EXPECTED = [Passage(**row) for row in ROWS]


def write_lines(path: Path, *lines: str | dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_jsonl(tmp_path: Path) -> None:
    assert list(read_passages([write_lines(tmp_path / "c.jsonl", *ROWS)])) == EXPECTED


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    assert list(read_passages([tmp_path / "c.parquet"])) == EXPECTED


def test_csv(tmp_path: Path) -> None:
    text = "id,title,text,domain,doc_id,split\na,Ferries,The ferry leaves at six.,river,d1,dev\n"
    text += 'b,,"Bread, ""fresh""\nfrom Millrace.",market,d2,train\n'
    (tmp_path / "c.csv").write_text(text)
    assert list(read_passages([tmp_path / "c.csv"])) == EXPECTED


def test_beir_names_and_defaults(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "c.jsonl", {"_id": 7, "title": "T", "text": "words"}, {"_id": 0, "text": "none"})
    first, second = read_passages([source], domain="beir")
    assert first == Passage(id="7", title="T", text="words", domain="beir", doc_id="7", split="none")
    assert second.id == "0"


def test_domain_of_the_record_wins(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "c.jsonl", *ROWS)
    assert [p.domain for p in read_passages([source], domain="other")] == ["river", "market"]


def test_byte_order_mark_blank_lines_and_unicode_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    row = json.dumps({"id": "a", "text": "one\u2028two"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n")
    assert [p.text for p in read_passages([path])] == ["one\u2028two"]


def test_running_text_is_cut_and_named_after_its_file(tmp_path: Path) -> None:
    (tmp_path / "tale.txt").write_text(" ".join(f"w{i}" for i in range(25)))
    (tmp_path / "notes.md").write_text("intro\n\n# Heading\n\nBody text.")
    passages = list(read_passages([tmp_path], chunk_words=10, chunk_overlap=2))
    assert [(p.id, p.title) for p in passages] == [
        ("notes.md", "Heading"), ("tale.txt#1", "tale"), ("tale.txt#2", "tale"), ("tale.txt#3", "tale"),
    ]  # fmt: skip
    assert {p.doc_id for p in passages[1:]} == {"tale.txt"}
    assert passages[1].text.split()[-2:] == passages[2].text.split()[:2]


def test_html_shows_what_a_browser_would(tmp_path: Path) -> None:
    page = "<html><head><title>Rules &amp; fees</title><style>p{}</style></head><body><h1>Fees</h1><p>Two <b>crowns</b>"
    page += " a day.</p><script>var hidden = 1;</script><ul><li>one<li>two</ul></body></html>"
    (tmp_path / "page.html").write_text(page)
    (passage,) = read_passages([tmp_path / "page.html"])
    assert passage.title == "Rules & fees"
    assert passage.text == "Fees\nTwo crowns a day.\none\ntwo"


def test_a_head_ends_where_its_last_tag_may_stand(tmp_path: Path) -> None:
    page = "<!doctype html><html><head><meta charset=utf-8><title>Fees</title><style>p{}</style>"
    page += "<noscript><p>No script.</p></noscript><script>var hidden = 1;</script><h1>Fees</h1><p>Two crowns."
    (tmp_path / "page.html").write_text(page)
    (passage,) = read_passages([tmp_path / "page.html"])
    assert (passage.title, passage.text) == ("Fees", "Fees\nTwo crowns.")


def test_html_keeps_the_cells_of_a_table_and_the_lines_of_a_list_apart(tmp_path: Path) -> None:
    page = "<table><tr><th>Fee</th><td>10 crowns</td></tr><tr><td>Fine</td><td>2</td></tr></table><dl><dt>a<dd>b</dl>"
    (tmp_path / "page.html").write_text(page)
    (passage,) = read_passages([tmp_path / "page.html"])
    assert passage.text == "Fee 10 crowns\nFine 2\na\nb"


@pytest.mark.parametrize(
    ("text", "title"),
    [("#tag\n\n## Real heading ##\n", "Real heading"), ("#!/bin/sh\n", "notes"), ("# C#\n", "C#"), ("##\nx", "notes")],
)
def test_what_is_a_heading_in_markdown(tmp_path: Path, text: str, title: str) -> None:
    (tmp_path / "notes.md").write_text(text)
    assert [p.title for p in read_passages([tmp_path / "notes.md"])] == [title]


def test_passages_with_ids_are_cut_only_if_asked(tmp_path: Path) -> None:
    text = " ".join(f"w{i}" for i in range(30))
    source = write_lines(tmp_path / "c.jsonl", {"id": "long", "text": text})
    assert [p.text for p in read_passages([source], chunk_words=10, chunk_overlap=2)] == [text]
    chunks = list(read_passages([source], chunk_words=10, chunk_overlap=2, rechunk=True).chunks())
    assert len(chunks) == 4
    assert all(chunk.source_id == "long" for chunk in chunks)
    assert all(text[c.start : c.start + len(c.passage.text)] == c.passage.text for c in chunks)


def test_records_without_id_are_cut(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "c.jsonl", {"text": "one two three four five six"})
    assert [p.id for p in read_passages([source], chunk_words=4, chunk_overlap=0)] == ["c.jsonl-1#1", "c.jsonl-1#2"]


def test_in_a_folder_a_corpus_file_stands_for_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "one" / "corpus.jsonl", ROWS[0])
    write_lines(tmp_path / "one" / "dev.jsonl", {"id": "q", "question": "When?"})
    write_lines(tmp_path / "two" / "x.jsonl", ROWS[1])
    assert list(read_passages([tmp_path])) == EXPECTED


def test_globs_in_order_of_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "2.jsonl", ROWS[1])
    write_lines(tmp_path / "1.jsonl", ROWS[0])
    assert list(read_passages([str(tmp_path / "*.jsonl")])) == EXPECTED


BAD = {
    "not JSON": ("{nope", "not JSON: Expecting property name"),
    "not an object": ("[1, 2]", "expected a JSON object, got list"),
    "no text": ({"id": "x", "body": "?"}, "no 'text'; it has: body, id"),
    "null text": ({"id": "x", "text": None}, "'text' is null"),
    "empty text": ({"id": "x", "text": "  "}, "'text' is empty"),
    "text not a string": ({"id": "x", "text": 5}, "'text' is int, expected a string"),
    "title not a string": ({"id": "x", "text": "t", "title": [1]}, "'title' is list, expected a string"),
    "id not a string": ({"id": ["x"], "text": "t"}, "'id' is list, expected a string or a whole number"),
    "unknown split": (
        {"id": "x", "text": "t", "split": "eval"},
        "'split' is 'eval', expected one of train, dev, test, none",
    ),
    "half a surrogate": ('{"id": "x", "text": "\\ud800"}', "half of a surrogate pair"),
    "seen before": ({"id": "a", "text": "t"}, "id 'a' stands already at "),
    "endless number": ('{"text": "a", "n": ' + "9" * 5000 + "}", "not JSON that can be read: Exceeds"),
    "nested too deeply": ("[" * 100_000, "not JSON that can be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named(name: str, tmp_path: Path) -> None:
    line, reason = BAD[name]
    source = write_lines(tmp_path / "c.jsonl", ROWS[0], line, ROWS[1])
    with pytest.raises(DataError) as caught:
        list(read_passages([source]))
    assert caught.value.message.startswith(f"{source}:2: ")
    assert reason in caught.value.message
    reader = read_passages([source], on_error="skip")
    assert list(reader) == EXPECTED
    assert len(reader.skipped) == 1 and reader.skipped[0].startswith(f"{source}:2: ")


def test_duplicate_ids_name_both_lines_across_files(tmp_path: Path) -> None:
    one, two = write_lines(tmp_path / "1.jsonl", *ROWS), write_lines(tmp_path / "2.jsonl", ROWS[1])
    with pytest.raises(DataError, match=f"{two}:1: id 'b' stands already at {one}:2"):
        list(read_passages([one, two]))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    lines = tmp_path / "c.jsonl"
    lines.write_bytes(b'{"id": "a", "text": "ok"}\n{"id": "b", "text": "\xff"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:2: not UTF-8"):
        list(read_passages([lines]))
    page = tmp_path / "page.txt"
    page.write_bytes(b"fine\nnot \xe9 fine\n")
    with pytest.raises(DataError, match=r"page\.txt:2: not UTF-8"):
        list(read_passages([page]))


def test_columns_that_no_passage_has_are_not_even_read(tmp_path: Path) -> None:
    source = tmp_path / "c.parquet"
    embeddings = [[0.0, 1.0]] * len(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS).append_column("embedding", pa.array(embeddings)), source)
    assert list(read_passages([source])) == EXPECTED
    records = read_parquet(source, "utf-8")
    assert not any("embedding" in (record.fields or {}) for record in records)
    pq.write_table(pa.table({"embedding": embeddings, "body": ["one"] * len(ROWS)}), source)
    with pytest.raises(DataError, match="no 'text'; it has: body, embedding"):
        list(read_passages([source]))


def test_broken_csv_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,text\na,fine\nb,one,too many\n")
    with pytest.raises(DataError, match=r"c\.csv:3: more columns than the header's 2"):
        list(read_passages([tmp_path / "c.csv"]))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"c\.parquet: not parquet"):
        list(read_passages([tmp_path / "c.parquet"]))


def test_a_csv_row_that_is_not_utf8_does_not_take_others_with_it(tmp_path: Path) -> None:
    source = tmp_path / "c.csv"
    source.write_bytes(b'id,text\na,"two\nlines"\nb,caf\xe9\nc,fine\n')
    with pytest.raises(DataError, match=r"c\.csv:4: not UTF-8: byte 0xe9 at byte 4 of column 'text'"):
        list(read_passages([source]))
    reader = read_passages([source], on_error="skip")
    assert [p.id for p in reader] == ["a", "c"]
    assert reader.skipped == [f"{source}:4: not UTF-8: byte 0xe9 at byte 4 of column 'text'"]
    source.write_bytes(b"id,caf\xe9,text\na,b,c\n")
    with pytest.raises(DataError, match=r"c\.csv:1: not UTF-8: byte 0xe9 at byte 7 of the header"):
        list(read_passages([source]))


def test_missing_values_of_pandas(tmp_path: Path) -> None:
    source = tmp_path / "c.csv"
    source.write_text("id,title,text\na,NaN,Naan bread\nb,B,nan\nc,C\n")
    reader = read_passages([source], on_error="skip")
    assert [(p.id, p.title, p.text) for p in reader] == [("a", "", "Naan bread")]
    assert reader.skipped == [f"{source}:3: 'text' is null", f"{source}:4: 'text' is null"]


def test_a_parquet_file_damaged_further_on(tmp_path: Path) -> None:
    source = tmp_path / "c.parquet"
    rows = [{"id": str(i), "text": f"{i} " * 50} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=1024, write_page_checksum=True)
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 0xFF
    source.write_bytes(content)
    reader = read_passages([source], on_error="skip")
    assert 0 < len(list(reader)) < 3000
    assert len(reader.skipped) == 1 and reader.skipped[0].startswith(f"{source}: damaged after row ")


def test_a_parquet_file_that_unpacks_to_more_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "c.parquet"
    rows = [{"id": str(i), "text": "a" * 1_000_000} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), source, compression="zstd", use_dictionary=False)
    assert source.stat().st_size < 20_000
    assert len(list(read_passages([source]))) == 20  # where there is memory for it
    monkeypatch.setattr("ragmoe._parquet.free_memory", lambda: 10_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("read"))
        reason = r"c\.parquet: row group 1 of 1 says that it unpacks to 20\.0 MB, .*; 10\.0 MB of memory are available"
        with pytest.raises(DataError, match=reason):
            list(read_passages([source]))
        reader = read_passages([source], on_error="skip")
        assert list(reader) == [] and len(reader.skipped) == 1
    # What repeats itself as much as templates do is read a page at a time, however large all of it is.
    rows = [{"id": str(i), "text": f"The stall {i} of the market is open. " * 200} for i in range(2000)]
    pq.write_table(pa.Table.from_pylist(rows), source, compression="zstd", use_dictionary=False)
    assert 10_000_000 < pq.read_metadata(source).row_group(0).total_byte_size > 100 * source.stat().st_size
    assert len(list(read_passages([source]))) == 2000


def test_sources_that_are_not_there_say_what_is(tmp_path: Path) -> None:
    write_lines(tmp_path / "corpus.jsonl", ROWS[0])
    with pytest.raises(DataError, match=r"there is no such file.*there is: corpus\.jsonl"):
        list(read_passages([tmp_path / "korpus.jsonl"]))
    (tmp_path / "x.docx").write_text("?")
    with pytest.raises(DataError, match=r"format '\.docx' is unknown; known are: csv htm html jsonl"):
        list(read_passages([tmp_path / "x.docx"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file of a known format"):
        list(read_passages([tmp_path / "empty"]))


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        if name == "gone/away":
            raise ConnectionError("offline\nand more")
        return [{"_id": "1", "text": "from the hub"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("hub:o/n", "hub:o/n:test", "hub:o/n:corpus:test"):
        assert [p.text for p in read_passages([source])] == ["from the hub"]
    assert asked == [("o/n", None, "train"), ("o/n", None, "test"), ("o/n", "corpus", "test")]
    with pytest.raises(DataError, match="'hub:gone/away' cannot be loaded: offline\n") as caught:
        list(read_passages(["hub:gone/away"]))
    assert "hub:NAME:CONFIG:SPLIT" in str(caught.value.hint)
    with pytest.raises(DataError, match="not of the form"):
        list(read_passages(["hub:a:b:c:d"]))


@pytest.mark.parametrize(("words", "overlap"), [(0, 0), (10, 6), (10, -1)])
def test_chunk_sizes_that_make_no_sense(words: int, overlap: int) -> None:
    with pytest.raises(UsageError, match=f"chunks of {words} words with an overlap of {overlap}"):
        read_passages(["x.jsonl"], chunk_words=words, chunk_overlap=overlap)


def test_a_second_text_with_an_id_is_bad_whole_even_if_it_is_cut(tmp_path: Path) -> None:
    long, longer = "one two three four five six", "red green blue white black brown grey pink"
    file = write_lines(tmp_path / "a.jsonl", {"id": "A", "text": long}, {"id": "A", "text": longer})
    with pytest.raises(DataError, match=r"a\.jsonl:2: id 'A' stands already at .*a\.jsonl:1"):
        list(read_passages([file], rechunk=True, chunk_words=4, chunk_overlap=1))
    reader = read_passages([file], rechunk=True, chunk_words=4, chunk_overlap=1, on_error="skip")
    assert {word for passage in reader for word in passage.text.split()} == set(long.split())
    assert len(reader.skipped) == 1


def test_documents_are_numbered_from_zero(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", *({"id": f"p{at}", "text": "x", "doc_id": at // 2} for at in range(4)))
    assert [passage.doc_id for passage in read_passages([file])] == ["0", "0", "1", "1"]


def test_documents_are_read_whole(tmp_path: Path) -> None:
    words = " ".join(str(at) for at in range(500))
    (tmp_path / "pods.md").write_text(words)
    file = write_lines(tmp_path / "rows.jsonl", {"text": words}, {"id": "a", "text": words, "domain": "d"})
    found = list(read_documents([tmp_path / "pods.md", file]))
    assert [(document.id, len(document.text.split())) for document in found] == [
        ("pods.md", 500), ("rows.jsonl-1", 500), ("a", 500),
    ]  # fmt: skip


def test_pictures_have_titles_too(tmp_path: Path) -> None:
    page = "<html><head><title>Install</title></head><body><svg><title>Contents</title></svg><p>Run it.</body></html>"
    (tmp_path / "page.html").write_text(page)
    assert [passage.title for passage in read_passages([tmp_path / "page.html"])] == ["Install"]


def test_a_comment_in_code_is_no_heading(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("```sh\n# install it\nrun\n```\n\n# Heading\n")
    (tmp_path / "b.md").write_text("~~~\n# never closed\n")
    (tmp_path / "c.md").write_text("```x``` is code in a line\n\n# Real\n")
    assert [passage.title for passage in read_passages([tmp_path])] == ["Heading", "b", "Real"]


def test_what_a_corpus_of_beirs_form_says_in_its_metadata(tmp_path: Path) -> None:
    lines = [
        {"_id": "1", "title": "", "text": "a", "metadata": {"domain": "law", "doc_id": "act", "split": "dev"}},
        {"_id": "2", "text": "b", "domain": "own", "metadata": {"domain": "law", "doc_id": 7, "split": "first half"}},
        {"_id": "3", "text": "c", "metadata": {"url": "x"}},
        {"_id": "4", "text": "d", "metadata": "none"},
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = [(p.id, p.domain, p.doc_id, p.split) for p in read_passages([tmp_path / "corpus.jsonl"])]
    assert read == [
        ("1", "law", "act", "dev"),
        ("2", "own", "2", "none"),
        ("3", "", "3", "none"),
        ("4", "", "4", "none"),
    ]


def test_metadata_of_beirs_form_is_read_from_parquet_too(tmp_path: Path) -> None:
    row = {"_id": "1", "text": "a", "metadata": {"domain": "law", "doc_id": "act", "split": "dev"}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "corpus.parquet")
    (passage,) = read_passages([tmp_path / "corpus.parquet"])
    assert (passage.domain, passage.doc_id, passage.split) == ("law", "act", "dev")
