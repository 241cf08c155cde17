from __future__ import annotations

import pytest

from ragmoe.evaluation.metrics import best_over, class_f1, exact_match, f1, no_answer_auroc, normalise, yes_no_maybe


def test_normalise_is_that_of_squad() -> None:
    assert normalise("  The  Long-Bridge, a U.S. landmark! ") == "longbridge us landmark"
    assert normalise("theatre an hour") == "theatre hour"


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("gravel and coal", "Gravel and coal.", 1.0),
        # One of one predicted words is right, one of three wanted ones found: 2 * 1 * 1/3 / (4/3).
        ("coal", "gravel and coal", 0.5),
        # A word counts as often as both have it: two of three, two of two.
        ("coal coal gravel", "coal gravel", 0.8),
        ("barges", "gravel", 0.0),
        ("", "gravel", 0.0),
        ("the", "a", 1.0),
    ],
)
def test_f1_by_hand(prediction: str, answer: str, expected: float) -> None:
    assert f1(prediction, answer) == pytest.approx(expected)


def test_exact_match_ignores_case_punctuation_and_articles() -> None:
    assert exact_match("The Crown!", "crown") == 1.0
    assert exact_match("crowns", "crown") == 0.0


def test_the_best_alternative_counts() -> None:
    assert best_over(f1, "1911", ["in 1911", "1911"]) == 1.0
    assert best_over(f1, "1911", ["in 1911"]) == pytest.approx(2 / 3)


def test_yes_no_maybe_takes_the_word_and_nothing_else() -> None:
    assert [yes_no_maybe(text) for text in ("Yes.", "no", "Maybe", "yes it is", "")] == [
        "yes",
        "no",
        "maybe",
        "other",
        "other",
    ]


def test_class_f1_by_hand() -> None:
    # yes: 1 right of 2 said, 1 of 1 wanted: 2/3. no: 1 of 1 said, 1 of 2 wanted: 2/3. maybe: nothing said, 1 wanted: 0.
    predictions, answers = ["yes", "no", "yes", "gravel"], ["yes", "no", "no", "maybe"]
    assert class_f1(predictions, answers) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_auroc_by_hand() -> None:
    # Pairs of one unanswerable and one answerable: (3, 1) and (3, 2) right, (1.5, 1) right, (1.5, 2) wrong.
    assert no_answer_auroc([3.0, 1.5, 1.0, 2.0], [True, True, False, False]) == pytest.approx(0.75)
    assert no_answer_auroc([3.0, 1.0], [True, True]) is None
