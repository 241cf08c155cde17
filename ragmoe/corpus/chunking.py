"""Cutting long texts into chunks that know where they came from, and moving questions' gold ids and spans onto them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ragmoe._errors import DataError, UsageError
from ragmoe.corpus.types import Passage, Question, Span

_WORD = re.compile(r"\S+")
# Longer than this and of a script that is written without spaces (Thai to Khmer, kana, Chinese), it is no word but a
# text of which two characters count as one; the mark that ends a sentence stays with it.
_NO_WORD = 24
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_PIECE = re.compile(r"[^。！？]{1,2}[。！？]*[”’」』)]*|[。！？”’」』)]+")
_SENTENCE_END = re.compile(r"[.!?。！？][\"')\]”’」』]*$")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage and where it stands in what it was cut from: ``source.text[start : start + len(text)] == text``.

    Attributes:
        passage: what is indexed.
        source_id: id of the passage or document it was cut from; its own where nothing was cut.
        start: character offset of its text in the source's.
    """

    passage: Passage
    source_id: str
    start: int = 0


def chunk_passage(passage: Passage, *, words: int = 200, overlap: int = 40) -> list[Chunk]:
    """Cut a passage into chunks of at most ``words`` words that share about ``overlap``, verbatim.

    In a text written without spaces, such as Chinese, two characters count as a word. A chunk ends with a sentence
    where one ends in its last quarter. A passage that fits stays as it is, id included; the chunks of one that does
    not are named ``ID#1``, ``ID#2``, and so on, all of the passage's document.
    """
    check_sizes(words, overlap)
    spans = _words(passage.text)
    if len(spans) <= words:
        return [Chunk(passage, passage.id)]
    chunks: list[Chunk] = []
    first = 0
    while True:
        last = _end(passage.text, spans, first, min(first + words, len(spans)), words)
        start, end = spans[first][0], spans[last - 1][1]
        piece = replace(passage, id=chunk_id(passage.id, len(chunks) + 1), text=passage.text[start:end])
        chunks.append(Chunk(piece, passage.id, start))
        if last == len(spans):
            return chunks
        first = max(last - overlap, first + 1)


def _words(text: str) -> list[tuple[int, int]]:
    """Where each word stands."""
    spans: list[tuple[int, int]] = []
    for match in _WORD.finditer(text):
        word, start = match[0], match.start()
        if len(word) <= _NO_WORD or 2 * len(_UNSPACED.findall(word)) < len(word):
            spans.append(match.span())
        else:
            spans += [(start + piece.start(), start + piece.end()) for piece in _PIECE.finditer(word)]
    return spans


def chunk_id(passage_id: str, number: int) -> str:
    """The id of a chunk of a passage, by its number from 1."""
    return f"{passage_id}#{number}"


def check_sizes(words: int, overlap: int) -> None:
    """Refuse chunk sizes that make no sense."""
    if words < 1 or not 0 <= overlap <= words // 2:
        raise UsageError(
            f"chunks of {words} words with an overlap of {overlap}: expected at least 1 word, "
            f"and an overlap from 0 to half of a chunk ({max(words, 0) // 2})",
            hint=f"--chunk-overlap {words // 5}" if words > 0 else None,
        )


def remap_questions(questions: Sequence[Question], chunks: Sequence[Chunk]) -> list[Question]:
    """Move gold ids and spans onto chunks; what it returns is checked verbatim.

    A question's gold passages become the chunks that hold one of its spans whole; where a gold passage has no span,
    all of its chunks are gold. Spans that lie in two overlapping chunks are kept in both.

    Raises:
        DataError: a gold passage was not among the sources, or a span lies in no chunk or is not verbatim.
    """
    by_source: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        by_source[chunk.source_id].append(chunk)
    return [_remap(question, by_source) for question in questions]


def _remap(question: Question, by_source: dict[str, list[Chunk]]) -> Question:
    wanted = (*question.gold_ids, *question.context_ids, *(span.passage_id for span in question.answer_spans))
    missing = sorted(set(wanted) - set(by_source))
    if missing:
        have = f"{len(by_source)} passages, such as {next(iter(by_source))!r}" if by_source else "none"
        raise DataError(f"question {question.id!r}: no chunk comes from its passage {missing[0]!r}; there are {have}")
    spans = [moved for span in question.answer_spans for moved in _move(question, span, by_source[span.passage_id])]
    # Alternatives of different length may fall into different chunks; all chunks that hold one are gold.
    held = dict.fromkeys(span.passage_id for span in spans)
    sources_with_span = {span.passage_id for span in question.answer_spans}
    gold: dict[str, None] = {}
    for source in question.gold_ids:
        names = [chunk.passage.id for chunk in by_source[source]]
        gold.update(dict.fromkeys(name for name in names if source not in sources_with_span or name in held))
    context = dict.fromkeys(chunk.passage.id for source in question.context_ids for chunk in by_source[source])
    return replace(question, gold_ids=tuple(gold), answer_spans=tuple(spans), context_ids=tuple(context))


def _move(question: Question, span: Span, chunks: Sequence[Chunk]) -> list[Span]:
    moved = []
    for chunk in chunks:
        start = span.start - chunk.start
        if start >= 0 and start + len(span.text) <= len(chunk.passage.text):
            found = chunk.passage.text[start : start + len(span.text)]
            if found != span.text:
                raise DataError(
                    f"question {question.id!r}: its answer {span.text!r} is not at {span.start} "
                    f"of {span.passage_id!r}; there stands {found!r}"
                )
            moved.append(Span(chunk.passage.id, start, span.text))
    if not moved:
        raise DataError(
            f"question {question.id!r}: its answer of {len(span.text.split())} words at {span.start} "
            f"of {span.passage_id!r} lies whole in no chunk",
            hint="build with larger chunks or a larger overlap: --chunk-words, --chunk-overlap",
        )
    return moved


def _end(text: str, spans: Sequence[tuple[int, int]], first: int, last: int, words: int) -> int:
    if last == len(spans):
        return last
    for i in range(last, max(last - words // 4, first + 1), -1):
        if _SENTENCE_END.search(text[slice(*spans[i - 1])]):
            return i
    return last
