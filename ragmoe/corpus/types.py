"""The two records everything is made of: a passage of a corpus and a question about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text that is retrieved and read as a whole.

    Attributes:
        id: unique within an index.
        doc_id: the source document; the passage's own id where the source names none.
        split: of the source document: ``train``, ``dev``, ``test`` or ``none``.
    """

    id: str
    text: str
    title: str = ""
    domain: str = ""
    doc_id: str = ""
    split: str = "none"


@dataclass(frozen=True, slots=True)
class Span:
    """A verbatim answer: ``passage.text[start : start + len(text)] == text``."""

    passage_id: str
    start: int
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question with what is known of its answer.

    Attributes:
        answers: acceptable alternatives; none means that nothing in the corpus answers it.
        answer_type: ``span``, ``yesno`` (answers are yes, no or maybe) or ``text`` (free text).
        gold_ids: passages that hold the answer.
        context_ids: passages it was asked over; names the passage of an unanswerable question.
        question_raw: as asked, where ``question`` had the name of its document put in front.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    answer_type: str = "span"
    gold_ids: tuple[str, ...] = ()
    domain: str = ""
    answer_spans: tuple[Span, ...] = ()
    context_ids: tuple[str, ...] = ()
    question_raw: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def raw(self) -> str:
        """The question without its document's name."""
        return self.question_raw or self.question
