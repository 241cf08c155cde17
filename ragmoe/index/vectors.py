"""The FAISS side: which index fits a number of passages, building it from stored embeddings, and searching it.

Cosine throughout: vectors have unit length and the metric is the inner product. Whatever approximates finds
candidates only; their scores are computed from the stored embeddings.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import IndexFolderError
from ragmoe._threads import import_faiss
from ragmoe.index.manifest import FaissRecord

FLAT_LIMIT = 50_000
_FULL_LIMIT = 1_000_000
_SCALAR_LIMIT = 10_000_000
_BLOCK = 65_536
_RECALL_TARGET = 0.98
_SAMPLE = 200
# Queries whose candidates are in memory at a time: 100 vectors of 384 each are 10 MB.
_RANKED = 64
# faiss asks for 39 at least, and takes 256 at most, which for 16,384 lists would be gigabytes.
_TRAIN_EACH = 64


@dataclass(frozen=True, slots=True)
class Choice:
    """A FAISS factory string, why it was chosen, the memory it takes in bytes a passage, and that of its training."""

    factory: str
    reason: str
    bytes_each: int
    train_bytes: int = 0


def choose_factory(count: int, width: int) -> Choice:
    """The FAISS index for ``count`` vectors of ``width``: exact to 50,000, then lists, compressed beyond a million."""
    if count <= FLAT_LIMIT:
        return Choice("Flat", f"{count:,} passages are at most {FLAT_LIMIT:,}: exact search is fast enough", 4 * width)
    lists = int(2 ** np.round(np.log2(4 * np.sqrt(count))))
    train = 4 * width * min(count, _TRAIN_EACH * lists)
    if count <= _FULL_LIMIT:
        reason = (
            f"{count:,} passages are more than {FLAT_LIMIT:,}: {lists} lists (4 roots of the count) of full vectors"
        )
        return Choice(f"IVF{lists},Flat", reason, 4 * width + 8, train)
    if count <= _SCALAR_LIMIT:
        reason = f"{count:,} passages are more than {_FULL_LIMIT:,}: {lists} lists of vectors at 8 bits a dimension"
        return Choice(f"IVF{lists},SQ8", reason, width + 8, train)
    parts = next(parts for parts in range(max(width // 4, 1), 0, -1) if width % parts == 0)
    reason = f"{count:,} passages are more than {_SCALAR_LIMIT:,}: {lists} lists of vectors as {parts} codes of 8 bits"
    return Choice(f"IVF{lists},PQ{parts}", reason, parts + 8, train)


def build_faiss(
    path: Path, embeddings: NDArray[np.float16], choice: Choice, progress: Callable[[int], None]
) -> FaissRecord:
    """Build and write the FAISS file from stored embeddings (rows, R), a block at a time."""
    faiss = import_faiss()
    rows, width = embeddings.shape
    index = faiss.index_factory(width, choice.factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        sample = np.random.default_rng(0).choice(rows, size=min(rows, _TRAIN_EACH * index.nlist), replace=False)
        sample.sort()
        index.train(unit_rows(embeddings, sample))
    _add_all(index, embeddings, progress)
    nprobe, recall = (None, None) if choice.factory == "Flat" else _tune(index, embeddings)
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(errno.EIO, "faiss could not write it whole", str(path)) from error
    return FaissRecord(factory=choice.factory, reason=choice.reason, nprobe=nprobe, recall_at_20=recall)


class FaissSearcher:
    """Search of a FAISS file, or exact search without one; scores are cosines of the stored embeddings."""

    def __init__(self, path: Path | None, embeddings: NDArray[np.float16], record: FaissRecord) -> None:
        faiss = import_faiss()
        try:
            if path is None:
                self.index: Any = faiss.IndexFlatIP(embeddings.shape[1])
                _add_all(self.index, embeddings, lambda done: None)
            else:
                self.index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise IndexFolderError(f"{path} is damaged: faiss cannot read it") from error
        if (self.index.ntotal, self.index.d) != embeddings.shape:
            got = f"{self.index.ntotal} vectors of width {self.index.d}"
            raise IndexFolderError(f"{path} is damaged: it holds {got}, the embeddings are {embeddings.shape}")
        self._embeddings = embeddings
        # What holds whole vectors has computed their cosines already, so nothing is to be ranked again.
        self._full = record.factory.endswith("Flat")
        if record.nprobe is not None:
            self.index.nprobe = record.nprobe

    def search(self, vectors: NDArray[np.float32], k: int) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """For each query vector (B, R) the best rows and their cosines, best first, at most ``k``."""
        depth = min(k if self._full else max(4 * k, 100), len(self._embeddings))
        scores_BK, rows_BK = self.index.search(np.ascontiguousarray(vectors, dtype=np.float32), depth)
        found: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        for start in range(0, len(rows_BK), _RANKED):
            part = slice(start, start + _RANKED)
            found += self._rank(vectors[part], rows_BK[part], scores_BK[part], k)
        return found

    def cosines(self, vector: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The cosines of one query vector (R,) and some rows, float32 (len(rows),)."""
        return unit_rows(self._embeddings, rows) @ vector

    def _rank(
        self, vectors_BR: NDArray[np.float32], rows_BK: NDArray[np.int64], scores_BK: NDArray[np.float32], k: int
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Some queries' best ``k`` of what was found, by score and then by row; -1 stands for nothing found."""
        if not self._full:
            candidates_BKR = unit_rows(self._embeddings, np.maximum(rows_BK, 0))
            scores_BK = np.matmul(candidates_BKR, vectors_BR[:, :, None])[:, :, 0]
        order_BK = np.lexsort((rows_BK, np.where(rows_BK < 0, np.inf, -scores_BK)), axis=-1)[:, :k]
        rows_BK, scores_BK = np.take_along_axis(rows_BK, order_BK, 1), np.take_along_axis(scores_BK, order_BK, 1)
        counts = (rows_BK >= 0).sum(axis=1).tolist()
        return [(rows[:n], scores[:n]) for rows, scores, n in zip(rows_BK, scores_BK, counts, strict=True)]


def _add_all(index: Any, embeddings: NDArray[np.float16], progress: Callable[[int], None]) -> None:
    rows = len(embeddings)
    for start in range(0, rows, _BLOCK):
        index.add(unit_rows(embeddings, np.arange(start, min(start + _BLOCK, rows))))
        progress(min(start + _BLOCK, rows))


def unit_rows(embeddings: NDArray[np.float16], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Some stored rows as float32 of unit length (rounding to half precision left them slightly off)."""
    vectors = np.asarray(embeddings[rows], dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def exact_search(embeddings: NDArray[np.float16], queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The exact best ``k`` rows of each query, int64 (B, k), by plain multiplication."""
    best_rows = np.zeros((len(queries), 0), dtype=np.int64)
    best_scores = np.zeros((len(queries), 0), dtype=np.float32)
    for start in range(0, len(embeddings), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(embeddings)))
        scores = np.concatenate([best_scores, queries @ unit_rows(embeddings, rows).T], axis=1)
        rows = np.concatenate([best_rows, np.broadcast_to(rows, (len(queries), len(rows)))], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best_rows, best_scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
    return best_rows


def _tune(index: Any, embeddings: NDArray[np.float16]) -> tuple[int, float]:
    """The fewest lists, a power of two, that find 98 % of the exact top 20 of a sample; and the share found."""
    sample = np.sort(
        np.random.default_rng(1).choice(len(embeddings), size=min(_SAMPLE, len(embeddings)), replace=False)
    )
    queries = unit_rows(embeddings, sample)
    k = min(20, len(embeddings))
    exact = exact_search(embeddings, queries, k)
    nprobe = 1
    while True:
        index.nprobe = nprobe
        _, found = index.search(queries, min(100, len(embeddings)))
        recall = float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(exact, found, strict=True)]))
        if recall >= _RECALL_TARGET or nprobe >= index.nlist:
            return nprobe, round(recall, 4)
        nprobe *= 2
