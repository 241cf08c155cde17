"""A task's questions, each with what it is read with, or why it cannot be scored."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ragmoe._errors import DataError
from ragmoe.evaluation.protocols import Searchable
from ragmoe.evaluation.samples import Status, digest_of
from ragmoe.evaluation.task import Task

if TYPE_CHECKING:
    from ragmoe.corpus.types import Question


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


def _item(task: Task, question: Question, have: Set[str], doc_id: str) -> Item:
    asked = task.asked(question)
    example = digest_of(question.id, asked, question.answers, question.answer_type)
    if task.setting == "open":
        return Item(question, asked, (), doc_id, example)
    # Where several passages hold the answer, all are given: not every dataset says which alternative is from which.
    read = question.gold_ids if question.answers else question.context_ids
    item = Item(question, asked, tuple(read), doc_id, example)
    if not read:
        field = "gold_ids" if question.answers else "context_ids"
        return replace(item, problem=f"the question has no {field}: there is no passage to read", status="unscored")
    if missing := [name for name in read if name not in have]:
        return replace(item, problem=f"not in the index: {', '.join(missing)}", status="error")
    return item
