"""ROUGE-L: how much of a longer answer is said in the same order as in a reference.

Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3, at the level of sentences and
with beta 1. Words are runs of letters and digits in lower case, unstemmed.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"[^\W_]+")


def rouge_l(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the longest common subsequence of words, 0.0 to 1.0.

    Where either has no word, 1.0 if both have none and 0.0 otherwise.
    """
    have, want = _WORD.findall(prediction.lower()), _WORD.findall(answer.lower())
    if not have or not want:
        return float(have == want)
    return 2 * common_subsequence(have, want) / (len(have) + len(want))


def common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence.

    All of one row of the table at a time, as the bits of a number. Source: Hyyro 2004, "Bit-parallel LCS-length
    computation revisited".
    """
    places: dict[Hashable, int] = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    whole = (1 << len(a)) - 1
    row = whole
    for item in b:
        met = row & places.get(item, 0)
        row = (row + met | row - met) & whole
    return len(a) - row.bit_count()
