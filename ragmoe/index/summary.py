"""What an index looks like: how long its passages are, how many are nearly the same, and the sentence that answers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ragmoe.index.bm25 import text_tokens
from ragmoe.index.folder import Index
from ragmoe.index.vectors import unit_rows

#: A cosine above which two passages say nearly the same.
NEARLY = 0.95
_SAMPLE = 500
_BINS = 8
_SENTENCE = re.compile(r"[^.!?]+(?:[.!?]+(?![\s\"')\]”’])[^.!?]*)*[.!?]*[\"')\]”’]*")


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of an index.

    Attributes:
        lengths: passages by length in bytes of text: (from, up to, how many).
        near_duplicates: share of passages that another one is nearly the same as, by their vectors.
        sampled: passages that this share was estimated from, evenly spread.
    """

    lengths: list[tuple[int, int, int]]
    near_duplicates: float
    sampled: int


def summarise(index: Index) -> Summary:
    """The figures of an index; nothing is encoded."""
    sizes = index.text_bytes()
    edges = np.unique(np.linspace(0, sizes.max(), _BINS + 1).round().astype(np.int64))
    counts, _ = np.histogram(sizes, edges)
    lengths = [(int(a), int(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    rows = np.unique(np.linspace(0, len(index) - 1, min(_SAMPLE, len(index))).astype(np.int64))
    found = index.faiss.search(unit_rows(index.embeddings, rows), 2)
    # Of two that are the same, either may come first.
    near = [bool((scores[hits != row] >= NEARLY).any()) for row, (hits, scores) in zip(rows, found, strict=True)]
    return Summary(lengths, float(np.mean(near)), len(rows))


def best_sentence(text: str, query: str) -> tuple[int, int]:
    """Where the sentence begins and ends that shares most words with a query; the first of equals."""
    spans = [match.span() for match in _SENTENCE.finditer(text) if match.group().strip()] or [(0, len(text))]
    asked, *given = [set(tokens) for tokens in text_tokens([query, *(text[a:b] for a, b in spans)])]
    start, end = spans[max(range(len(spans)), key=lambda i: len(asked & given[i]))]
    # The space before a sentence is not of it.
    return start + len(text[start:end]) - len(text[start:end].lstrip()), end
