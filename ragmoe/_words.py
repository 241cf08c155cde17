"""Numbers with their nouns, as people read them."""

from __future__ import annotations


def many(count: int, noun: str) -> str:
    """``1 passage``, ``2,000 passages``; for nouns that end in s when there are several."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
