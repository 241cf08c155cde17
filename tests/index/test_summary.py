"""Figures of an index, the sentence that matches, and search of some passages alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from stub_encoder import StubEncoder

from ragmoe import Index, IndexFolderError, UsageError
from ragmoe.index import Manifest, plan_remove
from ragmoe.index.summary import best_sentence, summarise


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("when do ferries leave", "The ferry leaves at 6.30 from the quay."),
        ("BREAD", "Bread is baked!"),
        ("zebra", "It is dark."),
        ("who is happy", "\u201cAre you happy?\u201d"),
    ],
)
def test_the_sentence_that_shares_most_words(query: str, sentence: str) -> None:
    text = " It is dark.  The ferry leaves at 6.30 from the quay.\nBread is baked! \u201cAre you happy?\u201d The ferry"
    start, end = best_sentence(text, query)
    assert text[start:end] == sentence


def test_text_without_a_sentence() -> None:
    assert best_sentence("...", "query") == (0, 3)
    assert best_sentence("no end", "end") == (0, 6)


def test_figures(build: Callable[..., Manifest], corpus: Path, tmp_path: Path) -> None:
    build()
    index = Index.open(tmp_path / "index")
    sizes = [len(p.text.encode()) for p in index.iterate()]
    figures = summarise(index)
    assert index.text_bytes().tolist() == sizes and figures.sampled == 24
    for first, last, count in figures.lengths:
        assert count == sum(first <= size < last or size == last == max(sizes) for size in sizes)
    vectors = index.embeddings.astype("float32")
    near = ((vectors @ vectors.T >= 0.95).sum(axis=1) > 1).mean()
    assert figures.near_duplicates == pytest.approx(near)


def test_the_card_says_what_the_index_is(build: Callable[..., Manifest], tmp_path: Path) -> None:
    first = build()
    path = tmp_path / "index" / "README.md"
    text = path.read_text()
    assert "A ragmoe index of 24 passages" in text and "| river | 8 |" in text and f"`{first.digest}`" in text
    assert "`stub-0`" in text and "9 passages (37.5%), encoded by `windows`" in text and "`Flat` (exact)" in text
    assert build(overwrite=True).digest in path.read_text()
    plan = plan_remove(tmp_path / "index", domain="river")
    plan.run()
    assert "A ragmoe index of 16 passages" in path.read_text() and "river" not in path.read_text()
    # What a person wrote stays.
    path.write_text("# My own\n")
    plan = plan_remove(tmp_path / "index", domain="market")
    plan.run()
    assert path.read_text() == "# My own\n"
    with pytest.raises(IndexFolderError, match=r"holds other things than an index: README\.md"):
        build(overwrite=True)


@pytest.mark.parametrize("retriever", ["dense", "bm25", "blend"])
def test_only_what_was_asked_for(retriever: str, folder: Path) -> None:
    index = Index.open(folder, encoder=StubEncoder())
    (everything,) = index.search(["the honey of the market"], 24, retriever=retriever)
    for where in ({"domain": "archive"}, {"domain": "river", "doc_id": "river-d1"}):
        fits = [
            hit
            for hit in everything
            if all(getattr(index.passage(hit.passage_id), name) == value for name, value in where.items())
        ]
        (found,) = index.search(["the honey of the market"], 3, retriever=retriever, where=where)
        assert [hit.row for hit in found] == [hit.row for hit in fits[:3]] and [hit.rank for hit in found] == [1, 2, 3][
            : len(found)
        ]
    with pytest.raises(UsageError, match="holds no passage with domain=sea"):
        index.search(["x"], where={"domain": "sea"})
