"""Multiple choice by log-likelihood: the answer that a generator finds most likely is its choice.

A question's choices are ``choices`` in its ``meta``, and the right ones among them its ``answers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragmoe._errors import DataError

if TYPE_CHECKING:
    from ragmoe.corpus.types import Question
    from ragmoe.generation.generator import Generator
    from ragmoe.index import Index


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen of a question's choices.

    Attributes:
        id: of the question; ``domain`` likewise.
        nats: log-likelihood of each choice.
        by_sum: the most likely one; ``by_length``: the most likely one for a character, as lm-evaluation-harness has
            it in ``acc_norm``, so that short answers are not preferred for being short.
        right: which are right.
    """

    id: str
    domain: str
    nats: tuple[float, ...]
    by_sum: int
    by_length: int
    right: frozenset[int]


def choose(nats: Sequence[float], choices: Sequence[str]) -> tuple[int, int]:
    """The most likely choice, and the most likely one for a character; the first of equals."""
    places = range(len(choices))
    return max(places, key=lambda i: nats[i]), max(places, key=lambda i: nats[i] / max(len(choices[i]), 1))


def multiple_choice(
    generator: Generator,
    questions: Sequence[Question],
    index: Index,
    *,
    passages: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Choice]:
    """Let a generator choose, with what each question retrieves.

    Args:
        passages: how many are put into the prompt; 0 asks from memory.

    Raises:
        DataError: a question has fewer than two choices, or no answer among them.
    """
    right = {question.id: _right(question) for question in questions}
    generator.check_index(index)
    seen = int(generator.config.neighbours) if generator.gate_sees_neighbours else 0
    made = []
    for at, question in enumerate(questions):
        found = index.neighbours([question.question], max(seen, passages, 1))
        read = index.passages(found.passage_ids[0][:passages])
        shown = generator.recall(found.first(seen), index, [question.domain]) if seen else None
        choices = question.meta["choices"]
        judged = generator.likelihoods(question.question, read, choices, shown)
        nats = tuple(likelihood.nats for likelihood in judged)
        made.append(Choice(question.id, question.domain, nats, *choose(nats, choices), right[question.id]))
        if progress:
            progress(at + 1, len(questions))
    return made


def accuracy(choices: Sequence[Choice]) -> dict[str, dict[str, float | int]]:
    """By domain, and over all as ``all``: ``accuracy`` and ``accuracy_by_length`` (0 to 100), and ``n``.

    Raises:
        DataError: nothing was chosen.
    """
    if not choices:
        raise DataError("no question was asked: there is no accuracy")
    groups = {domain: [c for c in choices if c.domain == domain] for domain in dict.fromkeys(c.domain for c in choices)}
    return {
        name: {
            "accuracy": 100 * sum(c.by_sum in c.right for c in group) / len(group),
            "accuracy_by_length": 100 * sum(c.by_length in c.right for c in group) / len(group),
            "n": len(group),
        }
        for name, group in {"all": list(choices), **groups}.items()
    }


def _right(question: Question) -> frozenset[int]:
    choices = question.meta.get("choices")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(text, str) and text.strip() for text in choices)
    ):
        raise DataError(
            f"question {question.id}: meta.choices is {choices!r}; expected a list of two texts or more",
            hint='{"id": ..., "question": ..., "answers": ["one"], "meta": {"choices": ["one", "other"]}}',
        )
    right = frozenset(i for i, text in enumerate(choices) if text in question.answers)
    if not right:
        raise DataError(
            f"question {question.id}: none of its choices {choices} is among its answers {question.answers}"
        )
    return right
