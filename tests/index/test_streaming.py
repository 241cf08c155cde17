"""The memory that a build, an addition and a removal take does not depend on how many passages there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def expect_the_same_peaks(kind: str, steps: tuple[str, ...], sizes: tuple[int, int], folder: Path) -> None:
    """Each step holds no more at the larger size than at the smaller, in a process of its own."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("memory_driver.py"), folder, kind, *map(str, sizes)],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    small, large = json.loads(done.stdout)
    texts = (folder / "corpus.jsonl").stat().st_size / 1e6
    assert set(small) == {*steps, "pyarrow"}
    for step in steps:
        # Texts of 640 passages more, or even their ids, would show.
        assert large[step] < small[step] + 0.03 < small[step] + texts / 5, (step, small, large)
    assert large["pyarrow"] < 1, large


@pytest.mark.slow
def test_the_peak_is_the_same_at_two_sizes(tmp_path: Path) -> None:
    expect_the_same_peaks("change", ("build", "add", "remove"), (560, 1200), tmp_path)
