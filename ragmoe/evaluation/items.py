"""A task's questions, each with what it is read with, or why it cannot be scored."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ragmoe._errors import DataError
from ragmoe.evaluation.protocols import Searchable
from ragmoe.evaluation.samples import Status, digest_of
from ragmoe.evaluation.task import Task

if TYPE_CHECKING:
    from ragmoe.corpus.types import Question

# Of questions that all lack the same, so many are named.
_NAMED = 5


@dataclass(frozen=True)
class Item:
    """A question as this task asks it; ``problem`` says why it cannot be scored."""

    question: Question
    asked: str
    read: tuple[str, ...]
    doc_id: str
    example: str
    problem: str | None = None
    status: Status = "ok"


def prepare(task: Task, index: Searchable) -> list[Item]:
    """The questions with what they are read with; DataError where the index is plainly not theirs."""
    questions = task.load_questions()
    have = set(index.passage_ids)
    wanted = {question.id: question.gold_ids or question.context_ids for question in questions}
    named = [name for ids in wanted.values() for name in ids]
    if named and not have.intersection(named):
        raise DataError(
            f"task {task.name}: none of the {len(set(named))} passages its questions are about (such as {named[0]}) "
            f"is among the {len(have)} of the index (for example {min(have, default='none')})",
            hint="give the index of these questions' corpus with --index DIR",
        )
    first_of = {i: next((name for name in ids if name in have), None) for i, ids in wanted.items()}
    about = sorted({name for name in first_of.values() if name is not None})
    documents = dict(zip(about, (p.doc_id or p.id for p in index.passages(about)), strict=True))
    return [_item(task, q, have, documents.get(first_of[q.id] or "", q.id)) for q in questions]


def check_gold(task: Task, questions: Sequence[Question]) -> str | None:
    """What to tell of questions that the ``gold`` setting cannot ask; None where there are none.

    Raises:
        DataError: it can ask none of those that have an answer (or none at all).
    """
    lacking = [question for question in questions if not _given(question)[1]] if task.setting == "gold" else []
    if not lacking:
        return None
    fields = " or ".join(dict.fromkeys(_given(question)[0] for question in lacking))
    said = (
        f"task {task.name}: {len(lacking)} of {len(questions)} questions have no {fields}, which name the passage that "
        f"the setting gold gives to the reader: {_places(task, lacking)}"
    )
    wanted = [question for question in questions if question.answers] or questions
    if not any(_given(question)[1] for question in wanted):
        raise DataError(
            said, hint="add them, or put `setting: open` into the task: it reads what is retrieved and needs none"
        )
    return f"{said}; they are left out (`setting: open` needs no {fields})"


def _given(question: Question) -> tuple[str, tuple[str, ...]]:
    """What names the passages that the ``gold`` setting gives to the reader, and these."""
    return ("gold_ids", question.gold_ids) if question.answers else ("context_ids", question.context_ids)


def _places(task: Task, questions: Sequence[Question]) -> str:
    """The first few questions, each with file and line."""
    from ragmoe.corpus.questions import parse_questions

    named = {question.id for question in questions[:_NAMED]}
    places = {
        question.id: place
        for path in task.question_files()
        for place, question, _ in parse_questions(path)
        if question is not None and question.id in named
    }
    more = f" and {len(questions) - len(named)} more" if len(questions) > len(named) else ""
    return ", ".join(f"{name} ({place})" for name, place in places.items()) + more


def _item(task: Task, question: Question, have: Set[str], doc_id: str) -> Item:
    asked = task.asked(question)
    example = digest_of(question.id, asked, question.answers, question.answer_type)
    if task.setting == "open":
        return Item(question, asked, (), doc_id, example)
    # Where several passages hold the answer, all are given: not every dataset says which alternative is from which.
    field, read = _given(question)
    item = Item(question, asked, tuple(read), doc_id, example)
    if not read:
        return replace(item, problem=f"the question has no {field}: there is no passage to read", status="unscored")
    if missing := [name for name in read if name not in have]:
        return replace(item, problem=f"not in the index: {', '.join(missing)}", status="error")
    return item
