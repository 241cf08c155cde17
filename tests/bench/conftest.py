"""The benchmarks as modules, on one thread: on tensors this small, waiting for a second one takes longer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Scripts find what they share beside them.
sys.path.append(str(Path(__file__).parents[2] / "eval" / "bench"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
