"""From questions and an index to the batches a generator learns from: a prompt an example, loss on the answer alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ragmoe.corpus.types import Passage, Question
from ragmoe.generation.batches import decode_batch, labelled_batch, pad_token
from ragmoe.generation.prompts import REFUSAL, Prompt, PromptMaker, WithoutGold
from ragmoe.index import Index
from ragmoe.neighbours import Neighbours
from ragmoe.training.config import GenerateConfig
from ragmoe.training.data import RaftDataset
from ragmoe.training.raft import Example


def gold_passages(question: Question) -> list[str]:
    """The passages a generator can learn the answer from: all gold ones, since it need not point at any words."""
    return list(question.gold_ids) if question.answers else []


def answerable_from(question: Question) -> bool:
    """Whether a generator can learn from a question: its answer has a gold passage, or there is no answer at all."""
    return bool(gold_passages(question)) or not question.answers


def fitting(
    questions: Sequence[Question], index: Index, maker: PromptMaker, passages: int, *, raw: bool = False
) -> tuple[list[Question], list[Question]]:
    """Part the questions: (those with room for them, their answer and any of their gold passages, the others)."""
    fit: list[Question] = []
    long: list[Question] = []
    for question in questions:
        gold: list[Passage | None] = [index.passage(name) for name in gold_passages(question)] or [None]
        said = [*question.answers, *(span.text for span in question.answer_spans), REFUSAL]
        longest = max(said, key=lambda text: len(maker.answer_ids(text)))
        asked = question.raw if raw else question.question
        fits = all(maker.fits(asked, passage, longest, passages) for passage in gold)
        (fit if fits else long).append(question)
    return fit, long


class GeneratorDataset(RaftDataset):
    """``RaftDataset`` for generators: any gold passage will do, and now and then there is no passage at all."""

    def __init__(self, *args: Any, generate: GenerateConfig, **kwargs: Any) -> None:
        super().__init__(*args, gold=gold_passages, **kwargs)
        self.generate = generate

    def __getitem__(self, at: int) -> Example:
        example = super().__getitem__(at)
        if random.Random(example.seed).random() >= self.generate.no_context:
            return example
        neighbours = example.neighbours.without([self.gold(example.question)])
        return replace(example, passages=[], gold=None, span=None, neighbours=neighbours)


def target(example: Example, without_gold: WithoutGold) -> str:
    """What should be said, without its citation."""
    question = example.question
    if example.span is not None:
        return example.span.text
    if question.answers and (example.gold is not None or without_gold == "memory"):
        return question.answers[0]
    return REFUSAL


class GeneratorCollator:
    """Examples to ``input_ids``, ``attention_mask``, ``labels`` and, where the gate sees them, neighbours."""

    def __init__(self, maker: PromptMaker, *, sees_neighbours: bool, raw: bool = False) -> None:
        self.maker = maker
        self.tokenizer = maker.tokenizer
        self.sees_neighbours = sees_neighbours
        self.raw = raw

    def prompt(self, example: Example) -> Prompt:
        """The prompt of an example with its answer; DataError where there is no room (see ``fitting``)."""
        asked = example.question.raw if self.raw else example.question.question
        said = target(example, self.maker.style.without_gold)
        return self.maker.make(asked, example.passages, gold=example.gold, answer=said)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        prompts = [self.prompt(example) for example in examples]
        seen = Neighbours.stack([example.neighbours for example in examples]) if self.sees_neighbours else None
        return labelled_batch([(p.ids, p.answer_ids) for p in prompts], pad_token(self.tokenizer), seen)

    def decoded(self, batch: Mapping[str, Tensor]) -> list[dict[str, str]]:
        """What a batch says; see ``decode_batch``."""
        return decode_batch(self.tokenizer, batch)
