"""What a question is read with while training."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from ragmoe import Neighbours, Passage, Question
from ragmoe.corpus.distractors import hard_distractors
from ragmoe.corpus.types import Span
from ragmoe.training.config import RaftConfig
from ragmoe.training.raft import Example, drop_neighbours, sample

GOLD = Passage("gold", "The keeper is Anna.")
OTHERS = [Passage(f"other{i}", f"Something else, number {i}.") for i in range(5)]
LEAK = Passage("leak", "Elsewhere too ANNA is named.")
QUESTION = Question("q", "who?", ("Anna",), gold_ids=("gold",), answer_spans=(Span("gold", 14, "Anna"),))
RETRIEVED = [LEAK, OTHERS[0], GOLD, *OTHERS[1:]]


def neighbours() -> Neighbours:
    ids = [passage.id for passage in RETRIEVED]
    return Neighbours(torch.eye(len(ids)).unsqueeze(0), torch.ones(1, len(ids)), torch.ones(1, len(ids)).bool(), [ids])


def draw(seed: int = 0, question: Question = QUESTION, **changes: float) -> Example:
    config = RaftConfig(**{"passages": 3, "drop_all": 0.0, "drop_each": 0.0, **changes})  # type: ignore[arg-type]
    gold = [GOLD] if question.gold_ids else []
    return sample(question, gold, RETRIEVED, neighbours(), config, seed)


def test_with_gold_it_is_read_and_stays_a_neighbour() -> None:
    example = draw(gold_probability=1.0)
    assert example.gold is not None and example.passages[example.gold] == GOLD
    assert example.span == QUESTION.answer_spans[0]
    assert "gold" in example.neighbours.passage_ids[0]


def test_without_gold_it_leaves_the_neighbours_too() -> None:
    example = draw(gold_probability=0.0)
    assert example.gold is None and example.span is None and GOLD not in example.passages
    assert "gold" not in example.neighbours.passage_ids[0]
    place = RETRIEVED.index(GOLD)
    assert not example.neighbours.mask_BN[0, place]
    assert not example.neighbours.embeddings_BNR[0, place].any()
    assert len(example.passages) == 3


def test_without_gold_all_of_them_leave() -> None:
    """Also one that has no span, from which the answer could not be learned."""
    other = OTHERS[0]
    question = replace(QUESTION, gold_ids=("gold", other.id))
    example = draw(gold_probability=0.0, question=question)
    assert not {"gold", other.id} & {*example.neighbours.passage_ids[0]}
    assert other not in example.passages


def test_the_gold_passage_is_never_put_among_the_neighbours() -> None:
    found = neighbours().without([["gold"]])
    config = RaftConfig(passages=2, gold_probability=1.0, drop_all=0.0, drop_each=0.0)
    assert "gold" not in sample(QUESTION, [GOLD], RETRIEVED, found, config, 0).neighbours.passage_ids[0]


def test_gold_is_there_with_its_probability() -> None:
    share = sum(draw(seed, gold_probability=0.7).gold is not None for seed in range(600)) / 600
    assert share == pytest.approx(0.7, abs=0.06)


def test_distractors_are_hard_and_hold_no_answer() -> None:
    assert hard_distractors(QUESTION, [GOLD], RETRIEVED) == OTHERS
    yes = Question("q", "is it?", ("no",), answer_type="yesno", gold_ids=("gold",))
    # "no" stands in every other word; for yes, no and maybe the text is not the answer.
    assert hard_distractors(yes, [GOLD], RETRIEVED) == [LEAK, *OTHERS]


@pytest.mark.parametrize(
    ("answer", "text", "says"),
    [
        ("5", "Founded in 2015.", False),
        ("5", "In 2015 they were 5.", True),
        ("$5", "It costs $5.20, they say.", True),
        ("Ada", "Nevada", False),
        ("Ada", "ADA's bridge", True),
        ("the  old\nmill", "At The old mill.", True),
        ("東京", "彼は東京に住む", True),
        ("Ada", "彼はAdaに会う", True),
        (" ", "Anything.", False),
    ],
)
def test_a_distractor_says_the_answer_as_words_of_its_own(answer: str, text: str, says: bool) -> None:
    passage = Passage("p", text)
    assert hard_distractors(replace(QUESTION, answers=(answer,)), [GOLD], [passage]) == ([] if says else [passage])


def test_the_seed_alone_decides() -> None:
    assert draw(3, drop_each=0.5).passages == draw(3, drop_each=0.5).passages
    assert torch.equal(draw(3, drop_each=0.5).neighbours.mask_BN, draw(3, drop_each=0.5).neighbours.mask_BN)
    places = {draw(seed, gold_probability=1.0).gold for seed in range(40)}
    assert places == {0, 1, 2}


def test_neighbour_dropout_hides_all_or_each() -> None:
    rng = random.Random(0)
    assert not drop_neighbours(neighbours(), 1.0, 0.0, rng).mask_BN.any()
    assert drop_neighbours(neighbours(), 0.0, 0.0, rng).mask_BN.all()
    kept = sum(int(drop_neighbours(neighbours(), 0.0, 0.25, rng).mask_BN.sum()) for _ in range(300))
    assert kept / (300 * len(RETRIEVED)) == pytest.approx(0.75, abs=0.04)


def test_an_unanswerable_question_has_no_target() -> None:
    example = draw(question=Question("u", "weight?", context_ids=("gold",)), gold_probability=1.0)
    assert example.gold is None and len(example.passages) == 3
