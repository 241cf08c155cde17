"""Nor does the memory that an export, an import and a merge take; by itself, as each of the two takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_streaming import expect_the_same_peaks


@pytest.mark.slow
def test_the_peak_is_the_same_at_two_sizes(tmp_path: Path) -> None:
    expect_the_same_peaks("exchange", ("export", "import", "merge"), (560, 1200), tmp_path)
