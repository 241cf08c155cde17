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
from ragmoe._threads import import_faiss, import_torch
from ragmoe._words import many
from ragmoe.index.digests import VerifiedRows
from ragmoe.index.manifest import FaissRecord
from ragmoe.index.store import release

FLAT_LIMIT = 50_000
_BLOCK = 65_536
_RECALL_TARGET = 0.98
# A doubling of the lists that finds less than this share more will not come to the target either.
_LEAST_GAIN = 0.001
_SAMPLE = 200
_BEST = 20
# Candidates that may be ranked again for the best 20.
_DEPTHS = (100, 200, 400)
# Rows read from the mapped embeddings at a time: the system maps what lies around each too, of 1,024 rows 235 MB.
_ROWS_AT_ONCE = 256
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
    """The FAISS index for ``count`` vectors of ``width``: exact to 50,000, then lists of codes that find candidates.

    The codes are product quantisers of 4 bits, compared 32 at a time in registers (Andre, Kermarrec and Le Scouarnec,
    "Quicker ADC", TPAMI 2019), on three dimensions each where the width allows; eval/bench/scale.py has the others.
    """
    if count <= FLAT_LIMIT:
        return Choice(
            "Flat", f"{many(count, 'passage')}, at most {FLAT_LIMIT:,}: exact search is fast enough", 4 * width
        )
    lists = list_count(count)
    train = 4 * width * min(count, _TRAIN_EACH * lists)
    beyond = f"{count:,} passages are more than {FLAT_LIMIT:,}: {lists} lists (4 roots of the count) of"
    parts = next((parts for parts in range(width // 3, width // 8, -1) if width % parts == 0), None)
    if parts is None:
        return Choice(f"IVF{lists},SQ8", f"{beyond} vectors at 8 bits a dimension, ranked again", width + 8, train)
    reason = f"{beyond} vectors as {parts} codes of 4 bits, ranked again by the stored embeddings"
    return Choice(f"IVF{lists},PQ{parts}x4fs", reason, -(-parts // 2) + 8, train)


def list_count(count: int) -> int:
    """The lists for so many vectors: about 4 roots of their number, a power of two."""
    return int(2 ** np.round(np.log2(4 * np.sqrt(count))))


def build_faiss(
    path: Path, embeddings: NDArray[np.float16], choice: Choice, progress: Callable[[int], None]
) -> FaissRecord:
    """Build and write the FAISS file from stored embeddings (rows, R), a block at a time.

    The lists are in memory while it is built, which is ``choice.bytes_each`` a passage: of a hundred million passages
    of 384 dimensions 7.2 GB. FAISS's merge of shards on disk does not take the codes compared in registers (it refuses
    them), and what it writes is two files of which one names the other by its path.
    """
    faiss = import_faiss()
    rows, width = embeddings.shape
    index = faiss.index_factory(width, choice.factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        sample = np.random.default_rng(0).choice(rows, size=min(rows, _TRAIN_EACH * index.nlist), replace=False)
        sample.sort()
        index.train(unit_rows(embeddings, sample))
    _add_all(index, embeddings, progress)
    nprobe, depth, recall = _tune(index, embeddings) if choice.factory.startswith("IVF") else (None, None, None)
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(errno.EIO, "faiss could not write it whole", str(path)) from error
    return FaissRecord(factory=choice.factory, reason=choice.reason, nprobe=nprobe, depth=depth, recall_at_20=recall)


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
        # Indexes of before say nothing of it, and rank as many again as the best 20 had then.
        self._depth = record.depth or _DEPTHS[0]
        if record.nprobe is not None:
            self.index.nprobe = record.nprobe

    def search(self, vectors: NDArray[np.float32], k: int) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """For each query vector (B, R) the best rows and their cosines, best first, at most ``k``."""
        queries_BR = np.ascontiguousarray(vectors, dtype=np.float32)
        wanted = self.candidates(k)
        scores_BK, rows_BK = self.index.search(queries_BR, wanted, params=self._probes(wanted))
        if not self._full:
            scores_BK = _rescored(self._embeddings, queries_BR, rows_BK)
        return _ranked(rows_BK, scores_BK, k)

    def candidates(self, k: int) -> int:
        """How many faiss is asked for where the best ``k`` are wanted: more where they are ranked again."""
        return min(k if self._full else max(self._depth, self._depth * k // _BEST), len(self._embeddings))

    def _probes(self, wanted: int) -> Any:
        """How many lists are searched: as tuned (None), but so many that they hold what is wanted, all for all rows."""
        lists = getattr(self.index, "nlist", None)
        if lists is None or wanted <= self._depth:
            return None
        needed = lists if wanted == len(self._embeddings) else -(-2 * wanted * lists // len(self._embeddings))
        return import_faiss().SearchParametersIVF(nprobe=min(lists, max(needed, self.index.nprobe)))

    def cosines(self, vector: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The cosines of one query vector (R,) and some rows, float32 (len(rows),)."""
        return unit_rows(self._embeddings, rows) @ vector


def _add_all(index: Any, embeddings: NDArray[np.float16], progress: Callable[[int], None]) -> None:
    rows = len(embeddings)
    for start in range(0, rows, _BLOCK):
        index.add(unit_rows(embeddings, np.arange(start, min(start + _BLOCK, rows))))
        progress(min(start + _BLOCK, rows))


def without_direction(vectors: NDArray[Any]) -> NDArray[np.int64]:
    """Which of some vectors (rows, R) are zero or not finite, int64 (of them,): nothing has a cosine with these."""
    norms = np.linalg.norm(np.asarray(vectors, dtype=np.float32), axis=1)
    return np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))


def unit_rows(embeddings: NDArray[np.float16], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Some stored rows as float32 of unit length (rounding to half precision left them slightly off)."""
    vectors = np.asarray(embeddings[rows], dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def exact_search(embeddings: NDArray[np.float16], queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The exact best ``k`` rows of each query, int64 (B, k), a block of the embeddings in memory at a time."""
    faiss = import_faiss()
    best_rows = np.zeros((len(queries), 0), dtype=np.int64)
    best_scores = np.zeros((len(queries), 0), dtype=np.float32)
    for start in range(0, len(embeddings), _BLOCK):
        block = unit_rows(embeddings, np.arange(start, min(start + _BLOCK, len(embeddings))))
        scores, rows = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.concatenate([best_scores, scores], axis=1)
        rows = np.concatenate([best_rows, rows + start], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best_rows, best_scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
    return best_rows


def _rescored(
    embeddings: NDArray[np.float16], queries: NDArray[np.float32], rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The cosines of queries (B, R) and the candidates of each (B, depth) from what is stored; any for a candidate -1.

    Some rows at a time, and what is mapped of the file, if anything, goes after them: else a process that has searched
    long enough would hold all embeddings, where the file's cache, which all processes share, serves as well.
    """
    torch = import_torch()
    scores = np.empty(rows.shape, dtype=np.float32)
    step = max(_ROWS_AT_ONCE // max(rows.shape[1], 1), 1)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        # A candidate -1 stands for none; its score does not count.
        at = np.maximum(rows[part], 0)
        found = embeddings.gather(at) if isinstance(embeddings, VerifiedRows) else np.asarray(embeddings[at])
        found_BKR = torch.from_numpy(found).float()
        dots_BK = (found_BKR @ torch.from_numpy(queries[part]).unsqueeze(2)).squeeze(2)
        norms_BK = torch.linalg.vector_norm(found_BKR, dim=2).clamp_min(1e-12)
        scores[part] = (dots_BK / norms_BK).numpy()
        release(embeddings)
    return scores


def _ranked(
    rows_BK: NDArray[np.int64], scores_BK: NDArray[np.float32], k: int
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Each query's best ``k`` candidates, by score and then by row; -1 stands for none."""
    if rows_BK.min(initial=0) >= 0 and (scores_BK[:, 1:] < scores_BK[:, :-1]).all():
        # As faiss gives them mostly: nothing is missing, nothing out of order, and no tie to be broken.
        return [(rows[:k], scores[:k]) for rows, scores in zip(rows_BK, scores_BK, strict=True)]
    order_BK = np.lexsort((rows_BK, np.where(rows_BK < 0, np.inf, -scores_BK)), axis=-1)[:, :k]
    rows_BK, scores_BK = np.take_along_axis(rows_BK, order_BK, 1), np.take_along_axis(scores_BK, order_BK, 1)
    counts = (rows_BK >= 0).sum(axis=1).tolist()
    return [(rows[:n], scores[:n]) for rows, scores, n in zip(rows_BK, scores_BK, counts, strict=True)]


def _tune(index: Any, embeddings: NDArray[np.float16]) -> tuple[int, int, float]:
    """The fewest lists, a power of two, and then the fewest candidates that hold 98 % of the exact top 20 of a sample.

    The sample is of passages that are stored, each without itself; questions lie further off, and less is found of
    theirs. Returns lists, candidates and the share found, which is less where the codes are too coarse for more.
    """
    rows = np.random.default_rng(1).choice(len(embeddings), size=min(_SAMPLE, len(embeddings)), replace=False)
    rows.sort()
    queries = unit_rows(embeddings, rows)
    k = min(_BEST, len(embeddings) - 1)
    exact = [own[own != row][:k] for own, row in zip(exact_search(embeddings, queries, k + 1), rows, strict=True)]

    def shares(nprobe: int) -> list[float]:
        index.nprobe = nprobe
        _, found = index.search(queries, min(_DEPTHS[-1], len(embeddings)))
        hits = [[len(np.intersect1d(a, b[:depth])) / k for depth in _DEPTHS] for a, b in zip(exact, found, strict=True)]
        return [float(share) for share in np.mean(hits, axis=0)]

    nprobe, reached = 1, shares(1)
    while reached[-1] < _RECALL_TARGET and nprobe < index.nlist:
        more = shares(2 * nprobe)
        if more[-1] - reached[-1] < _LEAST_GAIN:
            break
        nprobe, reached = 2 * nprobe, more
    enough = min(_RECALL_TARGET, reached[-1])
    depth, recall = next(pair for pair in zip(_DEPTHS, reached, strict=True) if pair[1] >= enough)
    return nprobe, depth, round(recall, 4)
