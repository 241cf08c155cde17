"""Passages that come near to answering a question, and do not."""

from __future__ import annotations

from collections.abc import Sequence

from ragmoe.corpus.types import Passage, Question


def hard_distractors(question: Question, gold: Sequence[Passage], retrieved: Sequence[Passage]) -> list[Passage]:
    """Retrieved passages that do not answer the question, best first: neither gold nor holding an answer's words."""
    taken = {*(passage.id for passage in gold), *question.gold_ids}
    answers = [" ".join(answer.lower().split()) for answer in question.answers if answer.strip()]
    if question.answer_type == "yesno":
        answers = []
    return [
        passage
        for passage in retrieved
        if passage.id not in taken and not any(_says(passage.text, answer) for answer in answers)
    ]


def _says(text: str, answer: str) -> bool:
    """Whether an answer stands in a text as words of its own: 5 is not in 2015, nor Ada in Nevada."""
    text = " ".join(text.lower().split())
    place = text.find(answer)
    while place >= 0:
        end = place + len(answer)
        if not (_one_word(text[max(place - 1, 0) : place], answer[0]) or _one_word(answer[-1], text[end : end + 1])):
            return True
        place = text.find(answer, place + 1)
    return False


def _one_word(left: str, right: str) -> bool:
    """Whether two characters side by side are of one word. Who writes without capitals may write without spaces."""
    return all(x.isdigit() or x.lower() != x.upper() for x in (left, right)) and bool(left and right)
