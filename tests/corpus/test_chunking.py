"""Chunks are verbatim and cover everything; questions that move onto them stay true."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragmoe import DataError, Passage, Question
from ragmoe.corpus import chunk_passage, remap_questions
from ragmoe.corpus.types import Span

TEXT = " ".join(f"Sentence {i} is about item{i}, which costs {i} crowns." for i in range(40))
SOURCE = Passage(id="p", text=TEXT, title="T", domain="d", doc_id="doc", split="dev")


@settings(deadline=None, max_examples=50)
@given(
    text=st.text(alphabet="ab .\n\u00e9\U0001f600", min_size=1, max_size=200).filter(str.strip),
    words=st.integers(1, 12),
    data=st.data(),
)
def test_chunks_are_verbatim_and_cover_every_word(text: str, words: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, words // 2))
    chunks = chunk_passage(Passage(id="p", text=text), words=words, overlap=overlap)
    covered = set()
    for chunk in chunks:
        assert text[chunk.start : chunk.start + len(chunk.passage.text)] == chunk.passage.text
        assert len(chunk.passage.text.split()) <= words
        covered.update(range(chunk.start, chunk.start + len(chunk.passage.text)))
    assert all(i in covered for i, letter in enumerate(text) if not letter.isspace())
    assert len({chunk.passage.id for chunk in chunks}) == len(chunks)


def test_a_passage_that_fits_stays_as_it_is() -> None:
    (chunk,) = chunk_passage(SOURCE, words=1000)
    assert chunk.passage is SOURCE and chunk.start == 0


def test_chunks_end_with_sentences_and_keep_their_document() -> None:
    chunks = chunk_passage(SOURCE, words=50, overlap=10)
    assert all(chunk.passage.text.endswith(".") for chunk in chunks)
    assert {(c.passage.doc_id, c.passage.domain, c.passage.split, c.passage.title) for c in chunks} == {
        ("doc", "d", "dev", "T")
    }


def question(answer: str, **more: object) -> Question:
    span = Span("p", TEXT.index(answer), answer)
    return Question(id="q", question="?", answers=(answer,), gold_ids=("p",), answer_spans=(span,), **more)


def test_gold_and_spans_move_onto_the_chunks() -> None:
    chunks = chunk_passage(SOURCE, words=50, overlap=20)
    by_id = {chunk.passage.id: chunk.passage for chunk in chunks}
    for i in range(40):
        (moved,) = remap_questions([question(f"item{i},", context_ids=("p",))], chunks)
        assert moved.gold_ids and set(moved.gold_ids) == {span.passage_id for span in moved.answer_spans}
        assert moved.context_ids == tuple(by_id)
        for span in moved.answer_spans:
            assert by_id[span.passage_id].text[span.start : span.start + len(span.text)] == f"item{i},"


def test_an_overlap_holds_the_answer_twice() -> None:
    chunks = chunk_passage(SOURCE, words=50, overlap=20)
    shared = chunks[1].passage.text.split(" ")[3]
    (moved,) = remap_questions([question(shared)], chunks)
    assert moved.gold_ids == ("p#1", "p#2")


def test_gold_without_a_span_is_every_chunk() -> None:
    chunks = chunk_passage(SOURCE, words=50, overlap=0)
    asked = Question(id="q", question="?", answers=("yes",), answer_type="yesno", gold_ids=("p",))
    (moved,) = remap_questions([asked], chunks)
    assert moved.gold_ids == tuple(chunk.passage.id for chunk in chunks)


def test_spans_that_cannot_move_are_errors() -> None:
    chunks = chunk_passage(SOURCE, words=50, overlap=0)
    with pytest.raises(DataError, match="'q': its answer of 60 words at 0 of 'p' lies whole in no chunk") as caught:
        remap_questions([question(" ".join(TEXT.split(" ")[:60]))], chunks)
    assert "--chunk-words" in str(caught.value.hint)
    wrong = Question(id="q", question="?", answers=("x",), gold_ids=("p",), answer_spans=(Span("p", 3, "item0"),))
    with pytest.raises(DataError, match=r"its answer 'item0' is not at 3 of 'p'; there stands 'tence'"):
        remap_questions([wrong], chunks)
    with pytest.raises(DataError, match="no chunk comes from its passage 'elsewhere'; there are 1 passages, such as"):
        remap_questions([Question(id="q", question="?", gold_ids=("elsewhere",))], chunks)


def test_a_text_without_spaces_is_cut_too() -> None:
    # Of fourteen characters after an odd one: no sentence ends where a pair does.
    whole = Passage("book", "あ" + "これは空白のない長い文です。" * 300)
    chunks = chunk_passage(whole, words=200, overlap=40)
    assert len(chunks) > 10 and all(len(chunk.passage.text) <= 400 for chunk in chunks)
    assert all(whole.text[c.start :].startswith(c.passage.text) for c in chunks)
    assert chunks[-1].start + len(chunks[-1].passage.text) == len(whole.text)
    # Where a sentence ends within reach, so does the chunk.
    assert all(chunk.passage.text.endswith("。") for chunk in chunks)
    # Long words are words all the same.
    links = "\n".join(f"https://example.org/some/path/item-{n:05d}" for n in range(150))
    assert len(chunk_passage(Passage("links", links + " " + "─" * 500), words=200, overlap=40)) == 1
