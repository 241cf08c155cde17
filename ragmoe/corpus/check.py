"""The check of question files against a corpus: gold ids exist, spans verbatim, ids unique, splits disjoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ragmoe.corpus.chunking import chunk_id
from ragmoe.corpus.files import stem
from ragmoe.corpus.questions import parse_questions
from ragmoe.corpus.types import Passage, Question

#: The passage of an id, None where there is no such id.
Find = Callable[[str], Passage | None]
#: How a problem ends that `ragmoe.corpus.remap_questions` would mend.
ONLY_CHUNKS = ", only chunks of it"
_SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong: where (``FILE:LINE``) and what."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(slots=True)
class Report:
    """What a check found.

    Attributes:
        questions: questions read, per file.
        spans: spans compared with the text of their passage.
        problems: in order of file and line.
    """

    questions: dict[str, int] = field(default_factory=dict)
    spans: int = 0
    problems: list[Problem] = field(default_factory=list)


def check_questions(files: Sequence[str | os.PathLike[str]], find: Find) -> Report:
    """Check question files against the passages that ``find`` returns (None where there is no such id).

    A file called ``train``, ``dev`` or ``test`` is of that split, any other is a split of its own; no document may
    hold gold passages of two splits, and where the corpus itself says the split of a gold passage's document, it must
    be the file's.

    Raises:
        DataError: a file does not exist.
    """
    report = Report()
    ids: dict[str, str] = {}
    documents: dict[str, tuple[str, str]] = {}
    for file in files:
        split = name if (name := stem(Path(file))) in _SPLITS else str(file)
        count = 0
        for place, question, problem in parse_questions(file):
            count += 1
            if question is None:
                report.problems.append(Problem(place, problem))
                continue
            first = ids.setdefault(question.id, place)
            if first is not place:
                report.problems.append(Problem(place, f"id {question.id!r} stands already at {first}"))
            gold = {name: find(name) for name in question.gold_ids}
            reasons = [
                *_check_gold(question, gold, find),
                *_check_spans(question, find),
                *_check_split(place, split, gold, documents),
            ]
            report.problems += [Problem(place, reason) for reason in reasons]
            report.spans += len(question.answer_spans)
        report.questions[str(file)] = count
        if not count:
            report.problems.append(Problem(str(file), "it holds no question"))
    return report


def _check_gold(question: Question, gold: dict[str, Passage | None], find: Find) -> Iterator[str]:
    if question.answers and not gold:
        yield "it has answers, but no gold passage"
    if not question.answers and gold:
        yield f"it has no answer, but a gold passage ({next(iter(gold))!r}); name that one in context_ids"
    for name, passage in gold.items():
        if passage is None:
            yield f"gold passage {_missing(name, find)}"
    if question.answer_type == "yesno" and not set(question.answers) <= {"yes", "no", "maybe"}:
        yield f"answers {list(question.answers)} to a yesno question; expected yes, no or maybe"
    if question.answer_type == "span" and question.answers and not question.answer_spans:
        yield "its answers are spans, but it has no answer_spans"


def _missing(name: str, find: Find) -> str:
    return f"{name!r} is not in the index" + (ONLY_CHUNKS if find(chunk_id(name, 1)) else "")


def _check_spans(question: Question, find: Find) -> Iterator[str]:
    for name in question.context_ids:
        if name not in question.gold_ids and find(name) is None:
            yield f"context passage {_missing(name, find)}"
    for span in question.answer_spans:
        passage = find(span.passage_id)
        if span.passage_id not in question.gold_ids:
            yield f"span {span.text!r} lies in {span.passage_id!r}, which is not among its gold passages"
        if passage is None:
            if span.passage_id not in question.gold_ids:
                yield f"span {span.text!r} lies in {span.passage_id!r}, which is not in the index"
            continue
        found = passage.text[span.start : span.start + len(span.text)]
        if found != span.text:
            at = passage.text.find(span.text)
            where = f"; it stands at {at}" if at >= 0 else "; it stands nowhere in that passage"
            yield f"span {span.text!r} is not at {span.start} of {span.passage_id!r}, there stands {found!r}{where}"


def _check_split(
    place: str, split: str, gold: dict[str, Passage | None], documents: dict[str, tuple[str, str]]
) -> Iterator[str]:
    for passage in gold.values():
        if passage is None:
            continue
        document = passage.doc_id or passage.id
        seen, first = documents.setdefault(document, (split, place))
        if seen != split:
            yield f"gold document {document!r} is of split {seen!r} already at {first}, and of {split!r} here"
        elif split in _SPLITS and passage.split in _SPLITS and passage.split != split:
            yield f"gold passage {passage.id!r} is of split {passage.split!r} in the index, and of {split!r} here"
