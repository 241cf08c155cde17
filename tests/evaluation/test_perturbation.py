from __future__ import annotations

import pytest

from ragmoe import ConfigError
from ragmoe.corpus.types import Question
from ragmoe.evaluation.perturbation import partners

QUESTIONS = [
    Question(id=f"{domain}{i}", question=f"{domain} {i // 2}", domain=domain) for domain in "ab" for i in range(10)
]
ASKED = [question.question for question in QUESTIONS]


def test_real_and_null_have_no_partner() -> None:
    assert partners(QUESTIONS, ASKED, "real") is None
    assert partners(QUESTIONS, ASKED, "null") is None


def test_shuffled_is_never_a_question_of_the_same_words() -> None:
    chosen = partners(QUESTIONS, ASKED, "shuffled")
    assert chosen is not None
    assert all(ASKED[other] != ASKED[own] for own, other in enumerate(chosen))
    assert len(set(chosen)) > 5
    assert any(QUESTIONS[own].domain == QUESTIONS[other].domain for own, other in enumerate(chosen))


def test_wrong_domain_is_of_another_domain() -> None:
    chosen = partners(QUESTIONS, ASKED, "wrong_domain")
    assert chosen is not None
    assert all(QUESTIONS[own].domain != QUESTIONS[other].domain for own, other in enumerate(chosen))


def test_the_draw_is_fixed() -> None:
    assert partners(QUESTIONS, ASKED, "shuffled") == partners(QUESTIONS, ASKED, "shuffled")
    assert partners(QUESTIONS, ASKED, "shuffled") != partners(QUESTIONS, ASKED, "wrong_domain")


def test_a_rare_other_question_is_found() -> None:
    questions = [Question(id=str(i), question="same", domain="a") for i in range(300)]
    questions.append(Question(id="x", question="other", domain="a"))
    chosen = partners(questions, [q.question for q in questions], "shuffled")
    assert chosen is not None
    assert chosen[:300] == [300] * 300


def test_what_cannot_be_drawn_is_an_error() -> None:
    one_domain = QUESTIONS[:10]
    with pytest.raises(ConfigError, match="needs questions of two domains; there is only a"):
        partners(one_domain, ASKED[:10], "wrong_domain")
    with pytest.raises(ConfigError, match="needs two different questions"):
        partners(QUESTIONS[:2], ASKED[:2], "shuffled")
    mixed = [QUESTIONS[0], Question(id="b", question=ASKED[0], domain="b"), QUESTIONS[5]]
    with pytest.raises(ConfigError, match="every other question asks the same"):
        partners(mixed, [q.question for q in mixed], "wrong_domain")
