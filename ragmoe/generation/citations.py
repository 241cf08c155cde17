"""Citations in an answer: the numbers of the passages it rests on, in brackets, as in ``in 1893 [2]``.

They are set apart by a space, as ours are taught. Of a text that has no such citation those count that stand right
behind a word (``in 1893[2]``), as other models write; beside one that has, they are part of what is said
(``list[0] [2]``).
"""

from __future__ import annotations

import re

_NUMBERS = r"(?:\[\d{1,3}(?:\s*,\s*\d{1,3})*\])+"
_APART = re.compile(rf"(?:^|\s+)({_NUMBERS})")
_ATTACHED = re.compile(rf"({_NUMBERS})")


def cite(answer: str, number: int) -> str:
    """An answer with the number of the passage it comes from."""
    return f"{answer} [{number}]"


def cited_numbers(text: str) -> list[int]:
    """The numbers a text cites, each once, in its order; ``[1, 3]`` cites two."""
    found = (int(n) for match in _citations(text).finditer(text) for n in re.findall(r"\d+", match.group(1)))
    return list(dict.fromkeys(found))


def without_citations(text: str) -> str:
    """The text alone."""
    return _citations(text).sub("", text).strip()


def _citations(text: str) -> re.Pattern[str]:
    return _APART if _APART.search(text) else _ATTACHED
