"""Questions out of documents alone: a sentence with one thing left out, which another passage of its document tells.

    "Pewter was used for flatware from what Age until the 20th century?"   Bronze, in another passage about tin

What is left out recurs in the document (Ram et al. 2021, "Few-Shot Question Answering by Pretraining Span Selection"),
and a question word takes its place (Lewis et al. 2019, "Unsupervised Question Answering by Cloze Translation").
The passage to be read shares words with the sentence beyond the answer, and does not hold the sentence itself, nor a
part of it about the answer, as passages do that were cut with an overlap.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

from ragmoe.corpus.types import Passage, Question, Span

# What ``Question.meta`` calls where a question comes from.
ORIGIN = "origin"
CLOZE = "cloze"

_WORD = re.compile(r"[$£€]?\w+(?:[-'’.,/]\w+)*%?")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]”’]*\s+|\n+")
_YEAR = re.compile(r"1\d{3}|20\d{2}")
# Words of a sentence that can stand for a question, and of an answer.
_QUESTION_WORDS = range(6, 36)
_ANSWER_WORDS = 5
# What stands in more places than that of one document is its subject, and no answer.
_MOST_PLACES = 12
# An answer is a number, a name, or holds a word of at most this share of all passages.
_RARE_WEIGHT = -math.log(0.005)
# Words that question and passage share at least near the answer, and of the question's at most: or they are copies.
_SHARED_NEAR = 2
_SHARED_AT_MOST = 0.8
# Words on either side by which two places are known to be one, which both passages have.
_AROUND = 3


class _Word(NamedTuple):
    text: str
    start: int
    end: int
    sentence: int


class _Place(NamedTuple):
    """Where a recurring span stands: the passage's number in its document, and its first word."""

    text: int
    word: int


@dataclass(frozen=True)
class _Text:
    passage: Passage
    sentences: list[tuple[int, int]]
    words: list[_Word]
    content: list[set[str]]
    holds: set[str]

    @classmethod
    def of(cls, passage: Passage) -> _Text:
        ends = [*_SENTENCE_END.finditer(passage.text)]
        starts = [0, *(end.end() for end in ends)]
        sentences = list(zip(starts, [*(end.start() for end in ends), len(passage.text)], strict=True))
        words: list[_Word] = []
        content: list[set[str]] = [set() for _ in sentences]
        for number, (start, end) in enumerate(sentences):
            for match in _WORD.finditer(passage.text, start, end):
                word = match.group().lower()
                words.append(_Word(word, match.start(), match.end(), number))
                if _is_content(word):
                    content[number].add(word)
        return cls(passage, sentences, words, content, set().union(*content))

    def near(self, sentence: int) -> set[str]:
        """Content words of a sentence and of those beside it."""
        return set().union(*self.content[max(0, sentence - 1) : sentence + 2])


def cloze_questions(passages: Sequence[Passage], *, per_passage: int = 3, seed: int = 0) -> list[Question]:
    """Make questions of passages whose documents (``doc_id``) have several.

    Args:
        per_passage: at most so many of them have the same passage for an answer.

    Returns:
        Questions with one verbatim span each, of the domain of their passage; documents of one passage give none. The
        same passages and seed give the same questions, in any order of passages.
    """
    documents: dict[str, list[_Text]] = defaultdict(list)
    holders: Counter[str] = Counter()
    for passage in sorted(passages, key=lambda passage: passage.id):
        text = _Text.of(passage)
        documents[passage.doc_id or passage.id].append(text)
        holders.update(text.holds)
    weights = {word: math.log(len(passages) / count) for word, count in holders.items()}
    found: list[Question] = []
    for name, texts in sorted(documents.items()):
        if len(texts) > 1:
            found += _of_document(texts, weights, per_passage, random.Random(f"{seed} {name}"))
    return found


def _of_document(
    texts: Sequence[_Text], weights: dict[str, float], per_passage: int, draw: random.Random
) -> list[Question]:
    spans = sorted((span, at) for span, at in _recurring(texts).items() if _tells(texts, span, at, weights))
    draw.shuffle(spans)
    room = [per_passage] * len(texts)
    asked: set[tuple[int, int]] = set()
    found = []
    for span, places in spans:
        free = [
            place
            for place in places
            if (place.text, _sentence(texts, place)) not in asked
            and not _tells_itself(texts[place.text], place.word, len(span))
        ]
        open_to = [place for place in places if room[place.text]]
        pairs = [
            (value, asking, told)
            for asking in free
            if (wanted := _wanted(texts, span, asking))
            # Its own passage is among those that have it.
            for copies in [{place.text for place in places if _is_copy(texts, asking, place, len(span))}]
            for told in open_to
            if told.text not in copies and (value := _relatedness(texts, wanted, told, weights)) is not None
        ]
        if pairs:
            _, asking, told = max(pairs)
            room[told.text] -= 1
            asked.add((asking.text, _sentence(texts, asking)))
            found.append(_question(texts[asking.text], asking.word, texts[told.text], told.word, len(span)))
    return found


def _recurring(texts: Sequence[_Text]) -> dict[tuple[str, ...], list[_Place]]:
    """The longest spans that stand in several passages, with their places."""
    places: dict[tuple[str, ...], list[_Place]] = defaultdict(list)
    for number, text in enumerate(texts):
        for first, last in _spans(text):
            places[tuple(word.text for word in text.words[first:last])].append(_Place(number, first))
    found = {
        span: at for span, at in places.items() if len(at) <= _MOST_PLACES and len({place.text for place in at}) > 1
    }
    for span in list(found):
        for part in (span[1:], span[:-1]):
            if part in found and span in found and len(found[part]) == len(found[span]):
                del found[part]
    return found


def _spans(text: _Text) -> Iterator[tuple[int, int]]:
    """Runs of words within a sentence, nothing but a space between them, that begin and end with a content word."""
    words = text.words
    for first, word in enumerate(words):
        if not _is_content(word.text):
            continue
        for last in range(first, min(first + _ANSWER_WORDS, len(words))):
            if last > first and text.passage.text[words[last - 1].end : words[last].start] != " ":
                break
            if _is_content(words[last].text):
                yield first, last + 1


def _tells(texts: Sequence[_Text], span: tuple[str, ...], places: Sequence[_Place], weights: dict[str, float]) -> bool:
    """Whether a span can be an answer: a number, a name, or what few passages speak of."""
    if any(_is_number(word) or weights.get(word, 0.0) > _RARE_WEIGHT for word in span):
        return True
    for place in places:
        text = texts[place.text]
        word = text.words[place.word]
        if text.passage.text[word.start].isupper() and word.start != text.sentences[word.sentence][0]:
            return True
    return False


def _wanted(texts: Sequence[_Text], span: tuple[str, ...], asking: _Place) -> set[str]:
    """The content words of a sentence without the span; none where it has not the length of a question."""
    asks, number = texts[asking.text], _sentence(texts, asking)
    start, end = asks.sentences[number]
    if len(asks.passage.text[start:end].split()) not in _QUESTION_WORDS:
        return set()
    return asks.content[number] - set(span)


def _relatedness(texts: Sequence[_Text], wanted: set[str], told: _Place, weights: dict[str, float]) -> float | None:
    """How much of what is wanted stands around a place; None for too little, or so much that one is a copy."""
    tells = texts[told.text]
    shared = wanted & tells.holds
    if not _SHARED_NEAR <= len(shared) <= _SHARED_AT_MOST * len(wanted):
        return None
    near = shared & tells.near(_sentence(texts, told))
    if len(near) < _SHARED_NEAR:
        return None
    return sum(weights[word] for word in near) / math.sqrt(len(wanted))


def _is_copy(texts: Sequence[_Text], asking: _Place, other: _Place, words: int) -> bool:
    """Whether the same stands around two places, as far as both passages go."""
    around = zip(_around(texts, asking, words), _around(texts, other, words), strict=True)
    return all(mine == theirs for sides in around for mine, theirs in zip(*sides, strict=False))


def _around(texts: Sequence[_Text], place: _Place, words: int) -> tuple[list[str], list[str]]:
    """The words before and behind a span, the nearest first."""
    all_words, end = texts[place.text].words, place.word + words
    before, behind = all_words[max(0, place.word - _AROUND) : place.word], all_words[end : end + _AROUND]
    return [word.text for word in reversed(before)], [word.text for word in behind]


def _tells_itself(asks: _Text, asked: int, words: int) -> bool:
    """Whether the sentence that asks says its own answer once more."""
    start, end = asks.sentences[asks.words[asked].sentence]
    first, last = asks.words[asked].start, asks.words[asked + words - 1].end
    rest = f"{asks.passage.text[start:first]} {asks.passage.text[last:end]}".casefold()
    return re.search(rf"\b{re.escape(asks.passage.text[first:last].casefold())}\b", rest) is not None


def _question(asks: _Text, asked: int, tells: _Text, told: int, words: int) -> Question:
    start, end = asks.sentences[asks.words[asked].sentence]
    first, last = asks.words[asked].start, asks.words[asked + words - 1].end
    text = asks.passage.text
    asking = f"{text[start:first]}{_question_word(text[first:last])}{text[last:end]}"
    asking = " ".join(asking.split()).rstrip(".!?;:, ") + "?"
    begin = tells.words[told].start
    answer = tells.passage.text[begin : tells.words[told + words - 1].end]
    digest = hashlib.sha256(f"{asking}\n{tells.passage.id}\n{begin}".encode()).hexdigest()[:16]
    return Question(
        id=f"{CLOZE}-{digest}",
        question=asking,
        answers=(answer,),
        gold_ids=(tells.passage.id,),
        domain=tells.passage.domain,
        answer_spans=(Span(tells.passage.id, begin, answer),),
        meta={ORIGIN: CLOZE},
    )


def _question_word(answer: str) -> str:
    if _YEAR.fullmatch(answer):
        return "what year"
    if answer[0] in "$£€":
        return "how much"
    return "how many" if re.fullmatch(r"[\d.,]+%?", answer) else "what"


def _sentence(texts: Sequence[_Text], place: _Place) -> int:
    return texts[place.text].words[place.word].sentence


@lru_cache(1 << 16)
def _is_content(word: str) -> bool:
    return (len(word) > 2 or _is_number(word)) and word not in _stopwords()


def _is_number(word: str) -> bool:
    return any(map(str.isdigit, word))


@cache
def _stopwords() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    return frozenset(STOPWORDS_EN_PLUS)
