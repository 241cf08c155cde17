"""Retrievers: what ranks an index's passages for a query. One class and ``@retriever`` each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import UsageError
from ragmoe.index.bm25 import Bm25Searcher
from ragmoe.index.vectors import FaissSearcher

#: Rows, best first, and the retriever's own scores.
Ranking = tuple[NDArray[np.int64], NDArray[np.float32]]

#: The most right passages in the first place, and as many as hybrid in the first 20 (eval/results/retrieval_core7.md).
DEFAULT = "blend"


class Searchable(Protocol):
    """What a retriever needs of an index."""

    @property
    def faiss(self) -> FaissSearcher: ...

    @property
    def bm25(self) -> Bm25Searcher: ...

    def encode(self, queries: Sequence[str]) -> NDArray[np.float32]: ...


class Queries:
    """Some queries, encoded once and only if somebody asks for their vectors."""

    def __init__(self, texts: Sequence[str], index: Searchable) -> None:
        self.texts = texts
        self._index = index

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        """float32 (B, R), unit length."""
        return self._index.encode(self.texts)

    def of(self, places: Sequence[int]) -> Queries:
        """Some of them, by their places; none is encoded again."""
        return _Some(self, list(places))


class _Some(Queries):
    def __init__(self, whole: Queries, places: list[int]) -> None:
        self.texts = [whole.texts[place] for place in places]
        self._whole, self._places = whole, places

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        return self._whole.vectors[self._places]


class Retriever(ABC):
    """Ranks the passages of one index."""

    def __init__(self, index: Searchable) -> None:
        self.index = index

    @abstractmethod
    def rank(self, queries: Queries, k: int) -> list[Ranking]:
        """The best rows of each query, at most ``k``, best first."""


_REGISTRY: dict[str, type[Retriever]] = {}
_R = TypeVar("_R", bound=type[Retriever])


def retriever(name: str) -> Callable[[_R], _R]:
    """Register a retriever under the name users give."""

    def register(cls: _R) -> _R:
        _REGISTRY[name] = cls
        return cls

    return register


def retriever_names() -> list[str]:
    """The names of all retrievers."""
    return sorted(_REGISTRY)


def make_retriever(name: str, index: Searchable) -> Retriever:
    """The retriever of a name over an index.

    Raises:
        UsageError: there is no such retriever.
    """
    if name not in _REGISTRY:
        raise UsageError(f"retriever {name!r} is unknown; there are: {', '.join(retriever_names())}")
    return _REGISTRY[name](index)


@retriever("dense")
class Dense(Retriever):
    """Cosine of the encoder's vectors."""

    def rank(self, queries: Queries, k: int) -> list[Ranking]:
        return self.index.faiss.search(queries.vectors, k)


@retriever("bm25")
class Bm25(Retriever):
    """Words in common, weighted (BM25); passages without any are left out."""

    def rank(self, queries: Queries, k: int) -> list[Ranking]:
        return self.index.bm25.search(queries.texts, k)


@retriever("hybrid")
class Hybrid(Retriever):
    """Reciprocal-rank fusion of dense and BM25 (Cormack, Clarke and Buettcher, SIGIR 2009).

    Constant, depth and weights were chosen on train questions of the seven core domains.
    """

    constant = 10
    depth = 100
    weights = (0.5, 1.0)

    def rank(self, queries: Queries, k: int) -> list[Ranking]:
        parts = _both(self.index, queries, max(self.depth, k))
        return [fuse([dense[0], bm25[0]], self.weights, self.constant, k) for dense, bm25 in parts]


@retriever("blend")
class Blend(Retriever):
    """A weighted sum of the cosine and the BM25 score, the latter as a share of the query's best.

    Unlike ranks, scores say by how much one passage is better than the next. The weight was chosen on train questions
    of the seven core domains (a convex combination, as in Bruch, Gai and Ingber, TOIS 2023).
    """

    depth = 100
    weight = 0.6

    def rank(self, queries: Queries, k: int) -> list[Ranking]:
        parts = _both(self.index, queries, max(self.depth, k))
        return [
            self._blend(vector, dense, bm25, k) for vector, (dense, bm25) in zip(queries.vectors, parts, strict=True)
        ]

    def _blend(self, vector: NDArray[np.float32], dense: Ranking, bm25: Ranking, k: int) -> Ranking:
        rows = np.union1d(dense[0], bm25[0])
        scores = self.weight * self.index.faiss.cosines(vector, rows)
        if len(bm25[0]):
            scores[np.searchsorted(rows, bm25[0])] += (1 - self.weight) * bm25[1] / bm25[1].max()
        order = np.lexsort((rows, -scores))[:k]
        return rows[order].astype(np.int64), scores[order].astype(np.float32)


def _both(index: Searchable, queries: Queries, depth: int) -> list[tuple[Ranking, Ranking]]:
    """The dense and the BM25 ranking of each query."""
    dense, bm25 = (make_retriever(name, index).rank(queries, depth) for name in ("dense", "bm25"))
    return list(zip(dense, bm25, strict=True))


def fuse(rankings: Sequence[NDArray[np.int64]], weights: Sequence[float], constant: int, k: int) -> Ranking:
    """Reciprocal-rank fusion: a row's score is the sum of weight / (constant + rank), ranks from 1; ties by row."""
    if not any(len(rows) for rows in rankings):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    rows, at = np.unique(np.concatenate(rankings), return_inverse=True)
    gains = [weight / (constant + np.arange(1, len(part) + 1)) for part, weight in zip(rankings, weights, strict=True)]
    scores = np.bincount(at, weights=np.concatenate(gains), minlength=len(rows))
    order = np.lexsort((rows, -scores))[:k]
    return rows[order].astype(np.int64), scores[order].astype(np.float32)
