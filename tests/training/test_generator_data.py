"""What a generator learns from: targets, labels, room, and examples that the seed alone decides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoder import byte_tokenizer, tiny_llama

from ragmoe import Index, Neighbours, Passage, Question
from ragmoe.generation import REFUSAL, PromptMaker, PromptStyle
from ragmoe.training.config import GenerateConfig, RaftConfig
from ragmoe.training.data import load_questions
from ragmoe.training.generator_data import (
    GeneratorCollator,
    GeneratorDataset,
    answerable_from,
    fitting,
    gold_passages,
)
from ragmoe.training.raft import Example
from ragmoe.training.retrieved import Retrieved

STYLE = PromptStyle(max_length=900)


@pytest.fixture(scope="module")
def questions(world: Path) -> list[Question]:
    found = load_questions([str(world / "questions.jsonl")])
    # Long-form answers: words of their own, with a gold passage.
    told = [
        Question(f"t{i}", f"tell of {i}", (f"It is kept by number {i}, until then.",), "text", (f"p{i}",), "river")
        for i in range(4)
    ]
    return found + told


@pytest.fixture
def dataset(world: Path, questions: list[Question], tmp_path: Path) -> Any:
    def make(seed: int = 0, no_context: float = 0.0, examples: int = 120, **raft: Any) -> GeneratorDataset:
        index = Index.open(world / "index")
        config = RaftConfig(**{"passages": 3, "neighbours": 4, "drop_all": 0.0, "drop_each": 0.0, **raft})
        found = Retrieved.of(index, [q.question for q in questions], 11, None, tmp_path)
        return GeneratorDataset(
            questions, index, found, config, examples=examples, batch_size=4, seed=seed,
            generate=GenerateConfig(no_context=no_context),
        )  # fmt: skip

    return make


def said(collator: GeneratorCollator, example: Example) -> str:
    batch = collator([example])
    labels = batch["labels"][0]
    learned = labels != -100
    assert torch.equal(labels[learned], batch["input_ids"][0][learned])
    # The answer is one stretch at the end, and nothing else is learned.
    assert learned.int().diff().sum() == 1 and learned[-1]
    return collator.tokenizer.decode(labels[learned]).strip().removesuffix("</s>")


def test_the_answer_is_said_with_the_number_of_its_passage(dataset: Any) -> None:
    collator = GeneratorCollator(PromptMaker(byte_tokenizer(), STYLE), sees_neighbours=False)
    kinds: Counter[str] = Counter()
    for example in map(dataset(gold_probability=1.0).__getitem__, range(120)):
        text, question = said(collator, example), example.question
        if not question.answers:
            assert text == REFUSAL
        else:
            assert example.gold is not None
            shown = collator.tokenizer.decode(collator([example])["input_ids"][0])
            assert text == f"{question.answers[0]} [{example.gold + 1}]"
            gold = example.passages[example.gold]
            assert gold.id in question.gold_ids and f"[{example.gold + 1}] {gold.title}\n{gold.text}" in shown
        kinds[question.answer_type if question.answers else "none"] += 1
    assert set(kinds) == {"span", "yesno", "text", "none"}


@pytest.mark.parametrize(("without_gold", "cites"), [("refuse", REFUSAL), ("memory", None)])
def test_without_gold_it_refuses_or_remembers(dataset: Any, without_gold: Any, cites: str | None) -> None:
    style = PromptStyle(without_gold, max_length=900)
    collator = GeneratorCollator(PromptMaker(byte_tokenizer(), style), sees_neighbours=False)
    for example in map(dataset(gold_probability=0.0).__getitem__, range(60)):
        assert not set(example.question.gold_ids) & {passage.id for passage in example.passages}
        answers = example.question.answers
        assert said(collator, example) == (cites or (answers[0] if answers else REFUSAL))


def test_no_context_takes_all_passages_and_the_gold_one_from_the_neighbours(dataset: Any) -> None:
    drawn = [dataset(no_context=0.4, examples=400)[at] for at in range(400)]
    bare = [example for example in drawn if not example.passages]
    assert len(bare) / 400 == pytest.approx(0.4, abs=0.08)
    for example in bare:
        assert example.gold is None and example.span is None
        assert not set(example.question.gold_ids) & set(example.neighbours.passage_ids[0])
        assert example.neighbours.mask_BN.any()
    kept = [example for example in drawn if example.gold is not None]
    assert any(set(e.question.gold_ids) & set(e.neighbours.passage_ids[0]) for e in kept)


def test_a_resumed_run_sees_the_same_examples(dataset: Any) -> None:
    collator = GeneratorCollator(PromptMaker(byte_tokenizer(), STYLE), sees_neighbours=True)
    first, again, other = (dataset(seed, 0.3, drop_each=0.4) for seed in (5, 5, 6))
    # Read from the middle on, as a resumed run does.
    batches = [collator([data[at] for at in range(60, 68)]) for data in (first, again, other)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    assert batches[0]["input_ids"].shape != batches[2]["input_ids"].shape or not torch.equal(
        batches[0]["input_ids"], batches[2]["input_ids"]
    )


def test_neighbours_travel_by_name_where_the_gate_sees_them(dataset: Any) -> None:
    maker = PromptMaker(byte_tokenizer(), STYLE)
    examples = [dataset()[at] for at in range(2)]
    seen = GeneratorCollator(maker, sees_neighbours=True)(examples)
    plain = GeneratorCollator(maker, sees_neighbours=False)(examples)
    assert set(seen) - set(plain) == {"neighbour_embeddings", "neighbour_scores", "neighbour_mask"}
    assert torch.equal(seen["neighbour_embeddings"][1], examples[1].neighbours.embeddings_BNR[0])


def test_loss_is_on_the_answers_alone_and_padding_is_nothing(dataset: Any) -> None:
    maker, model = PromptMaker(byte_tokenizer(), STYLE), tiny_llama()
    collator = GeneratorCollator(maker, sees_neighbours=False)
    examples = [dataset()[at] for at in (0, 5)]
    batch = collator(examples)
    assert batch["attention_mask"].min() == 0 and (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    total, count = 0.0, 0
    for example in examples:
        prompt = collator.prompt(example)
        logits = model(torch.tensor([[*prompt.ids, *prompt.answer_ids]])).logits[0].log_softmax(-1)
        for at, token in enumerate(prompt.answer_ids):
            total -= logits[len(prompt.ids) + at - 1, token].item()
            count += 1
    assert model(**batch).loss.item() == pytest.approx(total / count, rel=1e-5)


def test_questions_without_room_are_set_apart(world: Path, questions: list[Question]) -> None:
    index = Index.open(world / "index")
    maker = PromptMaker(byte_tokenizer(), PromptStyle(max_length=500))
    fit, long = fitting(questions, index, maker, 3)
    assert len(fit) == len(questions) and not long
    wordy = Question("long", "why " * 80, ("no",), "yesno", ("p0",))
    fit, long = fitting([*questions, wordy], index, maker, 3)
    assert long == [wordy] and len(fit) == len(questions)
    verbose = Question("verbose", "why?", ("so " * 100,), "text", ("p0",))
    assert fitting([verbose], index, maker, 3) == ([], [verbose])


def test_what_can_be_learned_from() -> None:
    assert answerable_from(Question("q", "?", ("free words",), "text", ("p0",)))
    assert not answerable_from(Question("q", "?", ("words",), "text"))
    assert answerable_from(Question("q", "?"))
    assert gold_passages(Question("q", "?", (), context_ids=("p0",))) == []


def test_an_example_keeps_its_number_when_others_are_left_out() -> None:
    passages = [Passage(f"d{i}", "word " * 60) for i in range(3)] + [Passage("g", "the answer is here")]
    question = Question("q", "what?", ("here",), "text", ("g",))
    example = Example(question, passages, 3, None, Neighbours.empty(1, 4), 0)
    collator = GeneratorCollator(PromptMaker(byte_tokenizer(), PromptStyle(max_length=330)), sees_neighbours=False)
    prompt = collator.prompt(example)
    assert prompt.left_out > 0 and said(collator, example) == f"here [{len(prompt.passages)}]"
