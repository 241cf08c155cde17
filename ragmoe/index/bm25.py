"""The BM25 side, over bm25s: title and text of each passage, English stems, no stop words.

Saved as plain numpy arrays and JSON under the index's generation; loaded at first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import IndexFolderError

#: Recorded in the manifest. Stems and k1 were measured: see eval/results/retrieval_core7.md.
SETTINGS: dict[str, Any] = {"method": "lucene", "k1": 1.2, "b": 0.75, "stopwords": "english", "stemmer": "english"}


def bm25_name(generation: int) -> str:
    """The folder of the BM25 index."""
    return f"bm25-{generation}"


def build_bm25(folder: Path, texts: Sequence[str]) -> list[Path]:
    """Index texts and write the result to ``folder``; returns its files."""
    import bm25s

    tokens = _tokens(texts)
    if not any(tokens):
        # Stop words only: bm25s cannot make an empty vocabulary, so it gets a word that no query has.
        tokens[0] = ["\0"]
    index = bm25s.BM25(method=SETTINGS["method"], k1=SETTINGS["k1"], b=SETTINGS["b"])
    index.index(tokens, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    index.save(str(folder), show_progress=False)
    return sorted(path for path in folder.iterdir() if path.is_file())


class Bm25Searcher:
    """Search of a BM25 folder; passages that share no word with the query are never returned."""

    def __init__(self, folder: Path, rows: int) -> None:
        import bm25s

        try:
            self._index: Any = bm25s.BM25.load(str(folder), load_corpus=False)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise IndexFolderError(f"{folder} is damaged: {error}") from error
        self._rows = rows

    def search(self, queries: Sequence[str], k: int) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """For each query the best rows and their BM25 scores, best first (ties by row), at most ``k``."""
        return [self._search_one(tokens, k) for tokens in _tokens(queries)]

    def _search_one(self, tokens: list[str], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        known = [token for token in tokens if token in self._index.vocab_dict]
        if not known:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        scores = np.asarray(self._index.get_scores(known), dtype=np.float32)
        rows = np.flatnonzero(scores > 0)
        if len(rows) > k:
            # Everything that ties with the k-th stays in, so that the order below decides, not the partition.
            threshold = np.partition(scores[rows], len(rows) - k)[len(rows) - k]
            rows = rows[scores[rows] >= threshold]
        order = np.lexsort((rows, -scores[rows]))[:k]
        return rows[order].astype(np.int64), scores[rows[order]]


def _tokens(texts: Sequence[str]) -> list[list[str]]:
    import bm25s
    import Stemmer  # type: ignore[import-not-found]

    stemmer = Stemmer.Stemmer(SETTINGS["stemmer"])
    return bm25s.tokenize(
        list(texts), stopwords=SETTINGS["stopwords"], stemmer=stemmer, return_ids=False, show_progress=False
    )
