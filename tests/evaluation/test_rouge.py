"""ROUGE-L by hand, and its subsequences against the table they are defined by."""

from __future__ import annotations

import random

import pytest

from ragmoe.evaluation.rouge import common_subsequence, rouge_l


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        # Lin 2004, section 3.1: S1 "police killed the gunman"; S2 has "police the gunman", S3 "the gunman".
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # In order are: the cat ... on the mat, five of six and of nine words.
        ("The cat sat on the mat.", "the black cat is lying on top, the mat", 2 * 5 / (6 + 9)),
        ("same, WORDS!", "Same words", 1.0),
        ("nothing", "in common", 0.0),
        ("", "words", 0.0),
        ("...", "", 1.0),
        ("snake_case", "snake case", 1.0),
    ],
)
def test_by_hand(prediction: str, answer: str, expected: float) -> None:
    assert rouge_l(prediction, answer) == pytest.approx(expected)
    assert rouge_l(answer, prediction) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(40))
def test_subsequences_equal_the_table(seed: int) -> None:
    draw = random.Random(seed)
    a, b = (draw.choices("abcde", k=draw.randint(0, 90)) for _ in range(2))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert common_subsequence(a, b) == table[-1][-1]
