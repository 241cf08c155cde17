"""A task's questions, each with what it is read with, or why it cannot be scored."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ragmoe._errors import DataError
from ragmoe.evaluation.metrics import YES_NO_MAYBE, yes_no_maybe
from ragmoe.evaluation.protocols import Searchable
from ragmoe.evaluation.samples import Status, digest_of
from ragmoe.evaluation.task import Task

if TYPE_CHECKING:
    from ragmoe.corpus.types import Question

# Of questions that all lack the same, so many are named.
_NAMED = 5
# What the id of a question ends with where it is asked without the passages that hold its answer.
WITHOUT = "#rejection"


@dataclass(frozen=True)
class Item:
    """A question as this task asks it; ``problem`` says why it cannot be scored.

    Attributes:
        read: passages that are read whatever is retrieved; with ``distractors_of``, a question, its hard distractors
            among what is retrieved are read too.
        hidden: passages that are as if they were not in the index.
    """

    question: Question
    asked: str
    read: tuple[str, ...]
    doc_id: str
    example: str
    problem: str | None = None
    status: Status = "ok"
    distractors_of: Question | None = None
    hidden: tuple[str, ...] = ()


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
    if task.setting == "rejection" and (twins := wanted.keys() & {question.id + WITHOUT for question in questions}):
        twin = min(twins)
        raise DataError(
            f"task {task.name}: {twin!r} is the id of a question, and what {twin.removesuffix(WITHOUT)} is called "
            "where it is asked without its passages",
            hint="give one of the two another id",
        )
    made = _rejecting if task.setting == "rejection" else _plain
    return [item for q in questions for item in made(task, q, have, documents.get(first_of[q.id] or "", q.id))]


def check_gold(task: Task, questions: Sequence[Question]) -> str | None:
    """What to tell of questions whose passages a task gives to the reader and nothing names; None where there are none.

    Raises:
        DataError: it can ask none of those that have an answer (or none at all).
    """
    # What is unanswerable by nature is rejected over whatever is retrieved.
    named = [q for q in questions if q.answers or task.setting == "gold"] if task.setting != "open" else []
    lacking = [question for question in named if not _given(question)[1]]
    if not lacking:
        return None
    fields = " or ".join(dict.fromkeys(_given(question)[0] for question in lacking))
    said = (
        f"task {task.name}: {len(lacking)} of {len(questions)} questions have no {fields}, which name the passage that "
        f"the setting {task.setting} gives to the reader: {_places(task, lacking)}"
    )
    wanted = [question for question in questions if question.answers] or questions
    if not any(_given(question)[1] for question in wanted):
        raise DataError(
            said, hint="add them, or put `setting: open` into the task: it reads what is retrieved and needs none"
        )
    return f"{said}; they are left out (`setting: open` needs no {fields})"


def _given(question: Question) -> tuple[str, tuple[str, ...]]:
    """What names the passages that a question is read with, and these."""
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


def _plain(task: Task, question: Question, have: Set[str], doc_id: str) -> list[Item]:
    """A question as the settings ``gold`` and ``open`` ask it."""
    asked = task.asked(question)
    example = digest_of(question.id, asked, question.answers, question.answer_type)
    if told := _nothing_is_right(question):
        return [Item(question, asked, (), doc_id, example, problem=told, status="unscored")]
    if task.setting == "open":
        return [Item(question, asked, (), doc_id, example)]
    # Where several passages hold the answer, all are given: not every dataset says which alternative is from which.
    field, read = _given(question)
    item = Item(question, asked, tuple(read), doc_id, example)
    if not read:
        why = f"the question has no {field}: there is no passage to read"
        return [replace(item, problem=why, status="unscored")]
    if missing := [name for name in read if name not in have]:
        return [replace(item, problem=f"not in the index: {', '.join(missing)}", status="error")]
    return [item]


def _nothing_is_right(question: Question) -> str | None:
    """Why nothing that is said could be right: yes, no or maybe is asked for, and none of them is the answer."""
    said = question.answers if question.answer_type == "yesno" else ()
    if not said or any(yes_no_maybe(answer) in YES_NO_MAYBE for answer in said):
        return None
    return f"answers {list(said)} to a yesno question; expected yes, no or maybe"


def _rejecting(task: Task, question: Question, have: Set[str], doc_id: str) -> list[Item]:
    """A question twice: with the passages that hold its answer, and without; an unanswerable one once."""
    asked = task.asked(question)
    if not question.answers:
        example = digest_of(question.id, asked, (), question.answer_type)
        read = tuple(name for name in question.context_ids if name in have)
        return [Item(question, asked, read, doc_id, example, distractors_of=question)]
    (present,) = _plain(task, question, have, doc_id)
    if not question.gold_ids or _nothing_is_right(question):
        # Nobody knows what it would have to be asked without.
        return [present]
    without = replace(question, id=question.id + WITHOUT, answers=(), answer_spans=(), gold_ids=())
    # Which passages are distractors, the answers decide.
    example = digest_of(without.id, asked, question.answers, question.answer_type)
    hidden = tuple(question.gold_ids)
    absent = Item(without, asked, (), doc_id, example, distractors_of=question, hidden=hidden)
    return [replace(present, distractors_of=question), absent]
