"""The BM25 side, over bm25s: title and text of each passage, English stems, no stop words.

Saved as plain numpy arrays and JSON under the index's generation; loaded at first use.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import IndexFolderError
from ragmoe.index.store import map_npy

#: Recorded in the manifest. What they find: eval/results/retrieval_core7.md.
SETTINGS: dict[str, Any] = {"method": "lucene", "k1": 1.2, "b": 0.75, "stopwords": "english", "stemmer": "english"}
#: Texts in memory at a time.
_BLOCK = 4096


def bm25_name(generation: int) -> str:
    """The folder of the BM25 index."""
    return f"bm25-{generation}"


def build_bm25(folder: Path, texts: Iterable[str], scratch: Path) -> list[Path]:
    """Index texts and write the result to ``folder``; returns its files.

    bm25s itself holds all tokens of all texts in memory. Here they are counted block by block, and the scores are
    sorted into place on the disk; only the vocabulary stays in memory.

    Args:
        scratch: a folder for what is needed in between, about as large as the result; made and removed here.
    """
    import bm25s

    index = bm25s.BM25(method=SETTINGS["method"], k1=SETTINGS["k1"], b=SETTINGS["b"])
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    counted = _Counted(scratch, texts)
    index.scores = counted.scores()
    # Only other methods than this one score words that are not there.
    index.nonoccurrence_array = None
    index.vocab_dict = {**counted.vocabulary, "": len(counted.vocabulary)}
    folder.mkdir(parents=True, exist_ok=True)
    index.save(str(folder), show_progress=False)
    del index, counted
    shutil.rmtree(scratch)
    return sorted(path for path in folder.iterdir() if path.is_file())


class _Counted:
    """How often each text has each of its words.

    Files: the numbers of the words and the counts of each text, and for each text how many words it has, each once and
    in all.
    """

    def __init__(self, scratch: Path, texts: Iterable[str]) -> None:
        self.vocabulary: dict[str, int] = {}
        self._scratch = scratch
        self._blocks: list[tuple[int, int]] = []
        self._texts = self._tokens = 0
        found: Counter[int] = Counter()
        with self._files("wb") as (words, counts, sizes):
            for block in _token_blocks(texts):
                rows = [Counter(self._number(token) for token in tokens) for tokens in block]
                flat = [number for row in rows for number in row]
                found.update(flat)
                words.write(np.asarray(flat, dtype=np.int32).tobytes())
                counts.write(np.asarray([n for row in rows for n in row.values()], dtype=np.int32).tobytes())
                lengths = [len(tokens) for tokens in block]
                pairs = list(zip(map(len, rows), lengths, strict=True))
                sizes.write(np.asarray(pairs, dtype=np.int32).tobytes())
                self._blocks.append((len(block), len(flat)))
                self._texts += len(block)
                self._tokens += sum(lengths)
        self._found = np.asarray([found[number] for number in range(len(self.vocabulary))], dtype=np.int64)

    def scores(self) -> dict[str, Any]:
        """What bm25s keeps: for each word the texts that have it, in order, and the score it gives each."""
        starts = np.concatenate([[0], np.cumsum(self._found)])
        data = _on_disk(self._scratch / "data", np.dtype(np.float32), int(starts[-1]))
        rows = _on_disk(self._scratch / "rows", np.dtype(np.int32), int(starts[-1]))
        # As bm25s has it, so that scores are the same to the last bit: natural logarithm, rounded to single precision.
        idf = np.log(1 + (self._texts - self._found + 0.5) / (self._found + 0.5)).astype(np.float32)
        free = starts[:-1].copy()
        first, k1, b = 0, SETTINGS["k1"], SETTINGS["b"]
        for words, counts, sizes in self._read():
            owner = np.repeat(np.arange(len(sizes)), sizes[:, 0])
            length = b * sizes[owner, 1] / (self._tokens / self._texts)
            scores = idf[words] * (counts / (k1 * ((1 - b) + length) + counts))
            order = np.argsort(words, kind="stable")
            sorted_words = words[order]
            kinds, begins, many = np.unique(sorted_words, return_index=True, return_counts=True)
            place = free[sorted_words] + np.arange(len(order)) - np.repeat(begins, many)
            data[place], rows[place] = scores[order], first + owner[order]
            free[kinds] += many
            first += len(sizes)
        return {"data": data, "indices": rows, "indptr": starts, "num_docs": self._texts}

    def _read(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int32]]]:
        with self._files("rb") as (words, counts, sizes):
            for texts, entries in self._blocks:
                many = np.frombuffer(counts.read(4 * entries), dtype=np.int32).astype(np.float64)
                pairs = np.frombuffer(sizes.read(8 * texts), dtype=np.int32).reshape(-1, 2)
                yield np.frombuffer(words.read(4 * entries), dtype=np.int32), many, pairs

    @contextmanager
    def _files(self, mode: str) -> Iterator[list[Any]]:
        with ExitStack() as stack:
            yield [stack.enter_context((self._scratch / name).open(mode)) for name in ("words", "counts", "sizes")]

    def _number(self, token: str) -> int:
        return self.vocabulary.setdefault(token, len(self.vocabulary))


class Bm25Searcher:
    """Search of a BM25 folder; passages that share no word with the query are never returned."""

    def __init__(self, folder: Path, rows: int) -> None:
        import bm25s

        try:
            # Mapped, an array whose header names more than its file holds is refused; read, it would be allotted first.
            for path in folder.glob("*.npy"):
                map_npy(path)
            # The one backend that checks its bounds, whatever the file says.
            self._index: Any = bm25s.BM25.load(str(folder), load_corpus=False, allow_pickle=False, backend="numpy")
        except (OSError, TypeError, ValueError, KeyError, EOFError) as error:
            raise IndexFolderError(f"{folder} is damaged: {error}") from error
        self._rows = rows
        self._folder = folder

    def search(self, queries: Sequence[str], k: int) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """For each query the best rows and their BM25 scores, best first (ties by row), at most ``k``."""
        return [self._search_one(tokens, k) for tokens in text_tokens(queries)]

    def _search_one(self, tokens: list[str], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        known = [token for token in tokens if token in self._index.vocab_dict]
        if not known:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        try:
            scores = np.asarray(self._index.get_scores(known), dtype=np.float32)
        except (IndexError, TypeError, ValueError) as error:
            raise IndexFolderError(f"{self._folder} is damaged: {error}") from error
        if len(scores) != self._rows:
            raise IndexFolderError(f"{self._folder} is damaged: it scores {len(scores)} passages of {self._rows}")
        rows = np.flatnonzero(scores > 0)
        if len(rows) > k:
            # Everything that ties with the k-th stays in, so that the order below decides, not the partition.
            threshold = np.partition(scores[rows], len(rows) - k)[len(rows) - k]
            rows = rows[scores[rows] >= threshold]
        order = np.lexsort((rows, -scores[rows]))[:k]
        return rows[order].astype(np.int64), scores[rows[order]]


def _token_blocks(texts: Iterable[str]) -> Iterator[list[list[str]]]:
    """The tokens of the texts, a block at a time."""
    rest = iter(texts)
    first = True
    while block := list(islice(rest, _BLOCK)):
        tokens = text_tokens(block)
        if first and not any(tokens):
            # Perhaps all are stop words, and bm25s cannot search without a vocabulary: a word that no query has.
            tokens[0] = ["\0"]
        first = False
        yield tokens


def text_tokens(texts: Sequence[str]) -> list[list[str]]:
    """The stems of each text, without stop words."""
    import bm25s
    import Stemmer  # type: ignore[import-not-found]

    stemmer = Stemmer.Stemmer(SETTINGS["stemmer"])
    return bm25s.tokenize(
        list(texts), stopwords=SETTINGS["stopwords"], stemmer=stemmer, return_ids=False, show_progress=False
    )


def _on_disk(path: Path, dtype: np.dtype, size: int) -> NDArray[Any]:
    """An array over a file of its own, all of it allotted now: a full disk raises here and not at a write to it."""
    left = max(size * dtype.itemsize, 1)
    with path.open("wb") as file:
        while left:
            left -= file.write(bytes(min(left, 1 << 20)))
    return np.memmap(path, dtype=dtype, mode="r+", shape=(size,))
