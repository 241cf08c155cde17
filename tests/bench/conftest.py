"""The benchmarks as modules."""

from __future__ import annotations

import sys
from pathlib import Path

# Scripts find what they share beside them.
sys.path.append(str(Path(__file__).parents[2] / "eval" / "bench"))
