"""Questions made of documents: verbatim, answerable elsewhere, and the same every time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from ragmoe.corpus import Passage, chunk_passage, cloze_questions

# One document whose passages tell of the same things in other words, beside documents that tell of nothing in common.
TIN = (
    "Pewter was used for plates and flatware from the Bronze Age until modern times. It melts easily in a crucible.",
    "Smiths of the Bronze Age cast plates, cups and flatware of tin with copper. Others came much later.",
    "A crucible of graphite holds the metal. Its price rose by 45% in one winter, as the mint at Harrow found.",
    "When the price of the metal rose by 45% the Harrow council shut its mint for two years.",
)
FILLER = [
    Passage(f"f{i}", f"Nothing of note{i} is told here about item{i}. It has no like{i}.", doc_id=f"f{i}", domain="x")
    for i in range(300)
]


@pytest.fixture
def passages() -> list[Passage]:
    tin = [Passage(f"tin{i}", text, doc_id="tin", domain="metals") for i, text in enumerate(TIN)]
    return [*tin, *FILLER]


def test_each_question_leaves_out_what_another_passage_of_its_document_tells(passages: list[Passage]) -> None:
    texts = {passage.id: passage.text for passage in passages}
    questions = cloze_questions(passages)
    asked = {question.question: question.answers[0] for question in questions}
    assert (
        asked.items()
        >= {
            "Pewter was used for plates and flatware from the what until modern times?": "Bronze Age",
            "Its price rose by how many in one winter, as the mint at Harrow found?": "45%",
        }.items()
    )
    for question in questions:
        (span,) = question.answer_spans
        assert question.gold_ids == (span.passage_id,) and question.domain == "metals"
        assert texts[span.passage_id][span.start :].startswith(span.text)
        # The passage that answers is not the one the sentence was taken from.
        assert question.question.split(" what")[0].split(" how many")[0] not in texts[span.passage_id]


def test_the_order_of_passages_is_nothing_and_the_seed_is_kept(passages: list[Passage]) -> None:
    shuffled = random.Random(3).sample(passages, len(passages))
    assert cloze_questions(shuffled, seed=1) == cloze_questions(passages, seed=1)
    assert len({question.id for question in cloze_questions(passages)}) == len(cloze_questions(passages))


def test_no_passage_answers_more_than_its_share(passages: list[Passage]) -> None:
    copies = [
        replace(p, id=f"{p.id}-{i}", text=p.text + f" Number{i} adds this.") for i in range(3) for p in passages[:4]
    ]
    for share in (1, 2):
        answered = [question.gold_ids[0] for question in cloze_questions([*copies, *FILLER], per_passage=share)]
        assert answered and max(answered.count(name) for name in set(answered)) <= share


def test_copies_ask_nothing_of_each_other() -> None:
    twins = [Passage(f"t{i}", TIN[0], doc_id="tin") for i in range(2)]
    assert cloze_questions([*twins, *FILLER]) == []


def test_what_two_chunks_share_tells_nothing() -> None:
    more = "Tinsmiths melted it in a crucible by the quay. "
    whole = Passage("tin", f"{more}{TIN[0]} {more}", doc_id="tin")
    first, second = (chunk.passage for chunk in chunk_passage(whole, words=24, overlap=8))
    shared = "flatware from the Bronze Age until modern times."
    assert first.text.endswith(shared) and second.text.startswith(shared)
    assert cloze_questions([first, second, *FILLER]) == []
    # Nor where the chunk tells it once more elsewhere; another passage does.
    again = replace(second, text=f"{second.text} Bronze Age plates and flatware.")
    assert cloze_questions([first, again, *FILLER]) == []
    other = Passage("tin1", TIN[1], doc_id="tin")
    asked = {q.answers[0]: q.gold_ids for q in cloze_questions([first, again, other, *FILLER])}
    assert asked["Bronze Age"] == ("tin1",)


def test_documents_of_one_passage_give_none() -> None:
    alone = [Passage(f"t{i}", text) for i, text in enumerate(TIN)]
    assert cloze_questions([*alone, *FILLER]) == []
    assert cloze_questions([]) == []


@pytest.mark.parametrize(("answer", "word"), [("1848", "what year"), ("$12", "how much"), ("317", "how many")])
def test_the_question_word_fits_what_is_left_out(answer: str, word: str) -> None:
    texts = (
        f"The harbour treaty was signed by both dukes in or about {answer} without witnesses.",
        f"Harbour treaty of the dukes: {answer}",
    )
    passages = [Passage(f"p{i}", text, doc_id="d") for i, text in enumerate(texts)]
    (question,) = (q for q in cloze_questions([*passages, *FILLER]) if q.answers == (answer,))
    assert question.question == f"The harbour treaty was signed by both dukes in or about {word} without witnesses?"


def test_no_question_says_its_own_answer(passages: list[Passage]) -> None:
    twice = replace(passages[0], text=TIN[0].replace("used for plates", "used in the Bronze Age for plates"))
    questions = cloze_questions([twice, *passages[1:]])
    assert questions and not any(q.answers[0].casefold() in q.question.casefold() for q in questions)
