"""Near-duplicates: grams by hand, and all pairs against the plain double loop."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ragmoe.corpus.duplicates import GramReader, contained, jaccard, near_duplicates


def plain(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.lower().replace(".", "").replace(",", "").split()
    n = min(n, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if words else set()


def test_grams_are_those_of_words() -> None:
    grams = GramReader(3)
    assert len(grams("a b c d")) == 2
    assert np.array_equal(grams("The quay, the LOCK."), grams("the quay the lock"))
    assert not np.array_equal(grams("a b c"), grams("c b a"))
    # Ten times the same three words are one gram, and less than three words are one.
    assert len(grams("a a a " * 10)) == len(grams("a b")) == 1
    assert len(grams(" ... ")) == 0
    assert np.array_equal(GramReader(3)("x y z w"), grams("x y z w"))


def test_by_hand() -> None:
    grams = GramReader(2)
    a, b = grams("a b c d"), grams("b c d e f")
    # {ab, bc, cd} and {bc, cd, de, ef}.
    assert jaccard(a, b) == jaccard(b, a) == pytest.approx(2 / 5)
    assert contained(a, b) == pytest.approx(2 / 3) and contained(b, a) == pytest.approx(2 / 4)
    assert jaccard(grams(""), grams("")) == contained(grams(""), a) == 0.0


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_all_pairs_equal_the_double_loop(threshold: float) -> None:
    draw = random.Random(int(100 * threshold))
    texts: list[str] = [""]
    for _ in range(120):
        if len(texts) < 10 or draw.random() < 0.4:
            texts.append(" ".join(draw.choice("abcdefghij") for _ in range(draw.randint(1, 60))))
            continue
        words = draw.choice(texts).split()
        for _ in range(draw.randint(0, 3)):
            if words:
                words[draw.randrange(len(words))] = draw.choice("abcdefghij")
        texts.append(" ".join(words[draw.randint(0, 2) :]))
    sets = [plain(text, 3) for text in texts]
    wanted = [
        (i, j)
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if sets[i] and len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold
    ]
    assert wanted
    grams = GramReader(3)
    assert near_duplicates([grams(text) for text in texts], threshold) == wanted


def test_nothing_is_near_nothing() -> None:
    assert near_duplicates([]) == []
    assert near_duplicates([GramReader()("") for _ in range(3)]) == []
