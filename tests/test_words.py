from __future__ import annotations

import pytest

from ragmoe._words import many


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 passages"), (1, "1 passage"), (2, "2 passages"), (12_000, "12,000 passages")]
)
def test_one_is_singular(count: int, said: str) -> None:
    assert many(count, "passage") == said
