"""What a text decides by nothing but itself: its place in an order, and whether it is kept aside."""

from __future__ import annotations

import hashlib


def digest(text: str) -> str:
    """Sixteen hexadecimal digits, of which no two texts are expected to share all."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_held(document: str, share: float) -> bool:
    """Whether a document, by its id, is among those that are kept aside."""
    return int(digest(document), 16) % 10_000 < share * 10_000
