"""Named points at which a build may die, so that tests can kill it there. Does nothing unless a test sets ``hook``."""

from __future__ import annotations

from collections.abc import Callable

#: In the order in which a build passes them.
POINTS = ("locked", "block", "encoded", "passages", "faiss", "bm25", "manifest-written", "committed", "cleaned")

hook: Callable[[str], None] | None = None


def reached(point: str) -> None:
    """Tell a test, if there is one, that the build has come to ``point``."""
    if hook is not None:
        hook(point)
