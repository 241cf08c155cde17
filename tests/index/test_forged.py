"""Forged files that the manifest agrees with: errors of ours or right answers, never a crash, a hang or much memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stub_encoder import StubEncoder
from test_verify import reseal

from ragmoe import Index
from ragmoe.index import verify_index


def forged(folder: Path, root: Path, seed: int, count: int) -> list[str]:
    """What was raised that is no error of ours, each after the forgery; and how the process ended, if it died."""
    tests = Path(__file__).parents[1]
    (root / "forge").mkdir()
    shutil.copytree(folder, root / "forge" / "index")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("forge_driver.py")), str(root / "forge"), str(seed), str(count)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests, tests / "index"))),
            # Another user's: what its FAISS file says is not believed.
            "XDG_STATE_HOME": str(root / "state"),
            "RAGMOE_CACHE": str(root / "cache"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        return [*lines[-1:], f"ended with {done.returncode}: {done.stderr[-500:]}"]
    assert sum(not line.startswith("failed") for line in lines) == count
    return [f"{lines[at - 1]}: {line}" for at, line in enumerate(lines) if line.startswith("failed")]


def test_some_forgeries(folder: Path, tmp_path: Path) -> None:
    assert forged(folder, tmp_path, 80, 30) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_forgeries(folder: Path, tmp_path: Path) -> None:
    assert forged(folder, tmp_path, 1_000, 3_000) == []


def test_vectors_that_are_no_numbers_are_found(folder: Path) -> None:
    path = folder / "embeddings-1.npy"
    vectors = np.load(path, allow_pickle=False)
    vectors[3] = np.nan
    np.save(path, vectors)
    reseal(folder)
    assert len(Index.open(folder, encoder=StubEncoder())) == 24
    assert any("passages encoded again differ" in problem for problem in verify_index(folder, encoder=StubEncoder()))
