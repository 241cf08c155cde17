"""Near-duplicates by 13-grams of words: exact, without an approximation of sets.

Pairs are found by prefix filtering: of two sets that are alike, some of the rarest grams of both are the same, so only
sets that share one of those are compared.
Sources: Brown et al. 2020, "Language Models are Few-Shot Learners", for grams of 13 words; Bayardo, Ma and Srikant
2007, "Scaling Up All Pairs Similarity Search", and Xiao et al. 2008, "Efficient Similarity Joins for Near Duplicate
Detection", for the filter.

G grams, P pairs.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WORDS = 13
THRESHOLD = 0.8

Grams = NDArray[np.uint64]

_WORD = re.compile(r"\w+")
_ODD = np.uint64(0x9E3779B97F4A7C15)


class GramReader:
    """Turns texts into sets of n-grams of words, as numbers of 64 bits; case and punctuation do not count.

    A text of fewer than n words is one gram. Two different grams get one number with a chance of 2**-64.
    """

    def __init__(self, words: int = WORDS) -> None:
        self.words = words
        self._numbers: dict[str, int] = {}

    def __call__(self, text: str, words: int | None = None) -> Grams:
        """The grams of a text, uint64 (G,), sorted, each once; of ``words`` words each in the place of its own number.

        A text of fewer words is one gram.
        """
        numbers = np.array([self._number(word) for word in _WORD.findall(text.casefold())], dtype=np.uint64)
        return self._grams(numbers, self.words if words is None else words)

    def length(self, text: str) -> int:
        """How many words a text has."""
        return len(_WORD.findall(text))

    def _grams(self, words: Grams, n: int) -> Grams:
        if not len(words):
            return words
        n = min(n, len(words))
        grams = np.zeros(len(words) - n + 1, dtype=np.uint64)
        # A polynomial of the words' random numbers, modulo 2**64.
        for i in range(n):
            grams = grams * _ODD + words[i : i + len(grams)]
        return np.unique(grams)

    def _number(self, word: str) -> int:
        if word not in self._numbers:
            self._numbers[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return self._numbers[word]


def jaccard(a: Grams, b: Grams) -> float:
    """The share of the grams of both that is common, 0 to 1; 0 where both are empty."""
    common = _common(a, b)
    return common / max(len(a) + len(b) - common, 1)


def contained(part: Grams, whole: Grams) -> float:
    """The share of the grams of ``part`` that ``whole`` has too, 0 to 1; 0 where there are none."""
    return _common(part, whole) / max(len(part), 1)


def near_duplicates(sets: Sequence[Grams], threshold: float = THRESHOLD) -> list[tuple[int, int]]:
    """All pairs (i, j), i < j, whose Jaccard similarity is at least ``threshold`` (above 0), in order."""
    sizes = np.array([len(grams) for grams in sets], dtype=np.int64)
    if not sizes.sum():
        return []
    grams_G = np.concatenate(list(sets))
    owners_G = np.repeat(np.arange(len(sets)), sizes)
    _, place_G, counts = np.unique(grams_G, return_inverse=True, return_counts=True)
    often_G = counts[place_G]
    # The rarest grams of each set first; among all, the order is the same for every set.
    order_G = np.lexsort((place_G, often_G, owners_G))
    rank_G = np.arange(len(order_G)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    needed = np.array([math.ceil(threshold * size - 1e-9) for size in sizes.tolist()])
    in_prefix_G = rank_G < (sizes - needed + 1)[owners_G[order_G]]
    kept = order_G[in_prefix_G & (often_G[order_G] > 1)]
    found = set()
    for i, j in _sharing(place_G[kept], owners_G[kept]):
        alike = min(sizes[i], sizes[j]) >= threshold * max(sizes[i], sizes[j]) - 1e-9
        if alike and jaccard(sets[i], sets[j]) >= threshold:
            found.add((i, j))
    return sorted(found)


def _sharing(grams: NDArray[np.int64], owners: NDArray[np.int64]) -> set[tuple[int, int]]:
    """The pairs of owners that have a gram in common."""
    order = np.lexsort((owners, grams))
    grams, owners = grams[order], owners[order]
    pairs: set[tuple[int, int]] = set()
    for group in np.split(owners, np.flatnonzero(np.diff(grams)) + 1):
        if len(group) > 1:
            names = group.tolist()
            pairs.update((a, b) for at, a in enumerate(names) for b in names[at + 1 :])
    return pairs


def _common(a: Grams, b: Grams) -> int:
    """How many grams two sorted sets share."""
    if not len(a) or not len(b):
        return 0
    few, many = (a, b) if len(a) <= len(b) else (b, a)
    at = np.searchsorted(many, few)
    return int((many[np.minimum(at, len(many) - 1)] == few).sum())
