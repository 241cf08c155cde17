"""What a question is read with while training: its gold passage with probability P, and hard distractors.

Source: Zhang et al. 2024, "RAFT: Adapting Language Model to Domain Specific RAG". Everything random about an example is
drawn from its own seed, so that a resumed run, and every arm of a comparison, sees the same examples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ragmoe.corpus.distractors import hard_distractors
from ragmoe.corpus.types import Passage, Question, Span
from ragmoe.neighbours import Neighbours
from ragmoe.training.config import RaftConfig


@dataclass(frozen=True, slots=True)
class Example:
    """A question as it is shown once.

    Attributes:
        passages: what is read, in a random order.
        gold: place of the gold passage among them, or None where it was left out.
        span: which of the answers is the target; None for yes, no, maybe, where there is no answer, and where it is in
            words of its own.
        neighbours: what the gate sees (one row).
        seed: for what is still to be drawn (where a window begins).
    """

    question: Question
    passages: list[Passage]
    gold: int | None
    span: Span | None
    neighbours: Neighbours
    seed: int


def sample(
    question: Question,
    gold: Sequence[Passage],
    retrieved: Sequence[Passage],
    neighbours: Neighbours,
    config: RaftConfig,
    seed: int,
) -> Example:
    """Draw what a question is read with.

    Args:
        gold: the passages that hold its answer; none for an unanswerable question.
        retrieved: passages retrieved for it, best first.
        neighbours: one row, as retrieved: the gold passage is there if it was found, and is never put in.
    """
    draw = random.Random(seed)
    read = draw.choice(list(gold)) if gold else None
    if read is not None and draw.random() >= config.gold_probability:
        read = None
    if read is None and gold:
        # All gold passages are left out, also those from which the answer cannot be learned.
        neighbours = neighbours.without([[*(passage.id for passage in gold), *question.gold_ids]])
    passages = hard_distractors(question, gold, retrieved)[: config.passages - (read is not None)]
    if read is not None:
        passages.append(read)
    draw.shuffle(passages)
    span = None
    if read is not None and question.answer_type != "yesno":
        spans = [span for span in question.answer_spans if span.passage_id == read.id]
        # An answer in words of its own stands in no passage.
        span = draw.choice(spans) if spans else None
    return Example(
        question,
        passages,
        passages.index(read) if read is not None else None,
        span,
        drop_neighbours(neighbours, config.drop_all, config.drop_each, draw),
        draw.getrandbits(32),
    )


def drop_neighbours(neighbours: Neighbours, drop_all: float, drop_each: float, draw: random.Random) -> Neighbours:
    """Hide all neighbours of a question with one probability, each of the rest with another."""
    none = draw.random() < drop_all
    keep = [not none and draw.random() >= drop_each for _ in range(neighbours.mask_BN.shape[1])]
    return neighbours.masked(torch.tensor([keep]))
