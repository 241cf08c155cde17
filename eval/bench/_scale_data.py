"""Vectors for the benchmark of sizes: real passages' vectors over and over, each time with other noise.

R is the width of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ragmoe.index import Index
from ragmoe.index.store import write_npy_header

_BLOCK = 16_384


class Source:
    """Vectors around those of real passages.

    A vector is a passage's plus ``noise`` times a draw of mean length 1 from the normal distribution that has the
    covariance of all passages, brought to unit length: what it is moved by points where real texts differ. White noise
    would be harder to compress and easier to tell apart than any text.

    Args:
        real_PR: vectors of passages, unit length.
        noise: the mean length of what is added (its root mean square).
    """

    def __init__(self, real_PR: NDArray[np.float32], noise: float) -> None:
        self.real_PR, self._noise = real_PR, noise
        values, vectors = np.linalg.eigh(np.cov(real_PR.T))
        root_RR = vectors * np.sqrt(np.maximum(values, 0))
        self._root_RR = (root_RR.T / np.sqrt(np.maximum(values, 0).sum())).astype(np.float32)

    def draw(self, first: int, count: int) -> NDArray[np.float32]:
        """Vectors ``first`` and on, float32 (count, R), unit length: the same whenever they are asked for."""
        rows, width = np.arange(first, first + count) % len(self.real_PR), self.real_PR.shape[1]
        white = np.random.default_rng([first, count]).standard_normal((count, width), dtype=np.float32)
        made = self.real_PR[rows] + self._noise * (white @ self._root_RR)
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    def write(self, path: Path, count: int) -> None:
        """The first ``count`` vectors as an index stores them: float16 in an ``.npy`` file."""
        with path.open("wb") as file:
            write_npy_header(file, np.dtype(np.float16), (count, self.real_PR.shape[1]))
            for start in range(0, count, _BLOCK):
                file.write(self.draw(start, min(_BLOCK, count - start)).astype(np.float16).tobytes())

    def queries(self, count: int) -> NDArray[np.float32]:
        """Vectors made in the same way of passages evenly spread; none of them is among those written."""
        step = max(len(self.real_PR) // count, 1)
        return np.concatenate([self.draw(10**9 + number * step, 1) for number in range(count)])


def real_vectors(folders: Sequence[Path]) -> NDArray[np.float32]:
    """The embeddings of built indexes, one after the other, float32 (P, R)."""
    parts = [np.asarray(Index.open(folder).embeddings, dtype=np.float32) for folder in folders]
    return np.concatenate(parts)
