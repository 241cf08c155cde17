"""Citations in an answer: the numbers of the passages it rests on, in brackets, as in ``in 1893 [2]``."""

from __future__ import annotations

import re

_CITATION = re.compile(r"\s*\[(\d{1,3}(?:\s*,\s*\d{1,3})*)\]")


def cite(answer: str, number: int) -> str:
    """An answer with the number of the passage it comes from."""
    return f"{answer} [{number}]"


def cited_numbers(text: str) -> list[int]:
    """The numbers a text cites, each once, in its order; ``[1, 3]`` cites two."""
    found = (int(number) for match in _CITATION.finditer(text) for number in match.group(1).split(","))
    return list(dict.fromkeys(found))


def without_citations(text: str) -> str:
    """The text alone."""
    return _CITATION.sub("", text).strip()
