"""The neighbours of many questions, or their embeddings, kept between runs so that none is made twice.

Q questions, N neighbours, R encoder width.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ragmoe._folders import share
from ragmoe.index import Index
from ragmoe.neighbours import Neighbours
from ragmoe.training.digests import digest

# The folder in an index's own where neighbours of questions are kept between runs.
CACHE_NAME = ".neighbours"
# Questions that are retrieved for at a time.
_CHUNK = 256
# What was retrieved is kept at least so often: as much is lost where a run is killed.
_KEEP_SECONDS = 60.0

# Of one question, and of some whose texts are given.
Found = tuple[NDArray[Any], ...]
Finds = Callable[[Sequence[str]], Iterable[Found]]
Progress = Callable[[int, int], None]


class Retrieved:
    """The neighbours of many questions, retrieved once: ids and scores; embeddings stay in the index."""

    def __init__(self, index: Index, rows_QN: NDArray[np.int64], scores_QN: NDArray[np.float32]) -> None:
        self.index = index
        self.rows_QN = rows_QN
        self.scores_QN = scores_QN

    @classmethod
    def of(
        cls,
        index: Index,
        texts: Sequence[str],
        n: int,
        retriever: str | None,
        cache: Path,
        *,
        progress: Progress | None = None,
    ) -> Retrieved:
        """Retrieve for those of some questions that nothing was kept for, by the same index, retriever and number.

        What is found is kept as it is found: a run that was stopped goes on where it was, and another that shares
        questions with it takes them over.

        Args:
            cache: folder of what is kept; where it cannot be written, the next run retrieves again.
            progress: called with questions done and questions to retrieve for; not where all are known.
        """
        retriever = retriever or index.retriever
        named = f"neighbours-{digest(chr(31).join([index.digest, str(n), retriever]))}"
        kept = _Kept(cache / named, ("rows", "scores"))
        found = kept.all_of(texts, partial(_retrieve, index, n, retriever), progress)
        rows_QN = np.stack([rows_N for rows_N, _ in found]) if found else np.empty((0, n), np.int64)
        scores_QN = np.stack([scores_N for _, scores_N in found]) if found else np.empty((0, n), np.float32)
        return cls(index, rows_QN, scores_QN)

    def ids(self, question: int) -> list[str]:
        """Passage ids, best first."""
        names = self.index.passage_ids
        return [names[row] for row in self.rows_QN[question] if row >= 0]

    def neighbours(self, question: int, n: int) -> Neighbours:
        """The first n neighbours of one question."""
        return neighbours_of(self.index, self.rows_QN[question, :n], self.scores_QN[question, :n])

    def found(self, question: int, n: int, allowed: Callable[[int], bool]) -> Iterator[tuple[int, float]]:
        """Rows of the index and their scores: the first n found for one question of those that are allowed."""
        rows, scores = self.rows_QN[question].tolist(), self.scores_QN[question].tolist()
        return islice(((row, score) for row, score in zip(rows, scores) if row >= 0 and allowed(row)), n)


def neighbours_of(index: Index, rows_N: NDArray[np.int64], scores_N: NDArray[np.float32]) -> Neighbours:
    """The passages of some rows of an index as the neighbours of one question; row -1 stands for none."""
    mask_BN = torch.from_numpy(rows_N >= 0).unsqueeze(0)
    embeddings = np.asarray(index.embeddings[np.maximum(rows_N, 0)], dtype=np.float32)
    embeddings_BNR = torch.from_numpy(embeddings).unsqueeze(0) * mask_BN.unsqueeze(-1)
    names = [index.passage_ids[row] for row in rows_N if row >= 0]
    return Neighbours(embeddings_BNR, torch.from_numpy(scores_N).unsqueeze(0), mask_BN, [names])


def embedded(
    index: Index, texts: Sequence[str], cache: Path, *, progress: Progress | None = None
) -> NDArray[np.float32]:
    """The embeddings of questions as an index's encoder makes them, float32 (Q, R); kept as ``Retrieved.of`` keeps."""
    # The encoder alone does not say how long texts are treated.
    kept = _Kept(cache / f"embeddings-{digest(index.digest)}", ("embeddings",))
    found = kept.all_of(texts, lambda asked: ((vector_R,) for vector_R in index.encode(asked)), progress)
    return np.stack([vector_R for (vector_R,) in found]) if found else np.empty((0, index.width), np.float32)


class _Kept:
    """What is known of questions by the digests of their texts: files of a folder, each written once and whole.

    Processes that work at a time each write files of their own, so none waits for another.
    """

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.folder, self.names = folder, names
        self.found: dict[str, Found] = {}
        self._unsaved: list[str] = []
        self._saved_at = time.monotonic()
        for path in sorted(folder.glob("*.safetensors")):
            # What cannot be read is found again.
            with contextlib.suppress(SafetensorError, OSError, KeyError):
                self._read(path)

    def _read(self, path: Path) -> None:
        stored = load_file(path)
        parts = [stored[name] for name in ("questions", *self.names)]
        for key, *found in zip(*parts, strict=True):
            self.found[key.tobytes().decode("ascii")] = tuple(found)

    def all_of(self, texts: Sequence[str], find: Finds, progress: Progress | None) -> list[Found]:
        """What is known of questions, in their order; what is not is found first, and kept as it is found."""
        keys = [digest(text) for text in texts]
        wanted = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.found}
        if wanted:
            self._find(wanted, find, progress or (lambda done, total: None))
        return [self.found[key] for key in keys]

    def _find(self, wanted: dict[str, str], find: Finds, progress: Progress) -> None:
        keys, texts = list(wanted), list(wanted.values())
        progress(0, len(texts))
        try:
            for begin in range(0, len(texts), _CHUNK):
                asked = slice(begin, begin + _CHUNK)
                for key, found in zip(keys[asked], find(texts[asked]), strict=True):
                    self.found[key] = found
                    self._unsaved.append(key)
                self.save(now=False)
                progress(min(begin + _CHUNK, len(texts)), len(texts))
        finally:
            self.save()

    def save(self, *, now: bool = True) -> None:
        """Write what was added since; without ``now``, only if the last time is long enough ago."""
        if not self._unsaved or not (now or time.monotonic() - self._saved_at >= _KEEP_SECONDS):
            return
        found = zip(*(self.found[key] for key in self._unsaved), strict=True)
        questions = np.frombuffer("".join(self._unsaved).encode("ascii"), np.uint8)
        tensors = {
            "questions": questions.reshape(len(self._unsaved), -1).copy(),
            **{name: np.stack(parts) for name, parts in zip(self.names, found, strict=True)},
        }
        name = digest("".join(self._unsaved))
        # An index may lie where nothing can be written; then the next run finds it again.
        part = self.folder / f"{name}.{os.getpid()}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part)
            share(part)
            part.replace(self.folder / f"{name}.safetensors")
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        self._unsaved, self._saved_at = [], time.monotonic()


def _retrieve(index: Index, n: int, retriever: str, texts: Sequence[str]) -> Iterator[Found]:
    """Rows and scores of the n neighbours of each question; row -1 where there are fewer."""
    found = index.neighbours(texts, n, retriever=retriever)
    for at, ids in enumerate(found.passage_ids):
        rows_N, scores_N = np.full(n, -1, dtype=np.int64), np.zeros(n, dtype=np.float32)
        rows_N[: len(ids)] = index.rows(ids)
        scores_N[: len(ids)] = found.scores_BN[at, : len(ids)].numpy()
        yield rows_N, scores_N
