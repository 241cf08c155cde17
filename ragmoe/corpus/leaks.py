"""What a language model must not be shown while it predicts a document: the document itself, and its near-copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ragmoe.corpus.duplicates import THRESHOLD, GramReader, Grams, contained, near_duplicates
from ragmoe.corpus.types import Passage


class LeakGuard:
    """Judges passages of an index as neighbours of chunks of some documents.

    A passage is held back from a chunk where

    - it is of the chunk's own document, by its ``doc_id``,
    - it is of a document that is a near-duplicate of that one: the Jaccard similarity of their sets of 13-grams is at
      least ``threshold``,
    - so large a share of its 13-grams stands in the chunk's document, or
    - so large a share of the chunk's 13-grams stands in it.

    The last two find what is quoted in a document that is another one otherwise. A chunk of fewer words than a gram, as
    a document's last may be, is no quotation: it is judged by the others alone.

    Args:
        documents: those that are predicted.
        passages: those of the index, by row.
    """

    def __init__(
        self, documents: Sequence[Passage], passages: Iterable[Passage], *, threshold: float = THRESHOLD
    ) -> None:
        self.threshold = threshold
        self.grams = GramReader()
        self._texts = [document.text for document in documents]
        self._documents = [self.grams(text) for text in self._texts]
        self._passages: list[Grams] = []
        # Of passages that are shorter than a gram, how many words they have; and documents' grams of so many.
        self._short: dict[int, int] = {}
        self._shorter: dict[tuple[int, int], Grams] = {}
        self._owners: list[str] = []
        parts: dict[str, list[Grams]] = {}
        for passage in passages:
            self._passages.append(self.grams(passage.text))
            if (length := self.grams.length(passage.text)) < self.grams.words:
                self._short[len(self._passages) - 1] = length
            self._owners.append(document_of(passage))
            parts.setdefault(self._owners[-1], []).append(self._passages[-1])
        self._ids = [document_of(document) for document in documents]
        self._near(parts)

    def allows(self, document: int, chunk: Grams, row: int) -> bool:
        """Whether a chunk of a document may be predicted with a passage.

        Args:
            document: its place among the documents.
            chunk: what ``grams`` makes of the chunk.
            row: of the passage in the index.
        """
        if self._hides(document, self._owners[row]):
            return False
        passage = self._passages[row]
        return (
            contained(passage, self._grams_of(document, self._short.get(row))) < self.threshold
            and contained(chunk, passage) < self.threshold
        )

    def _grams_of(self, document: int, words: int | None) -> Grams:
        """A predicted document's grams, of so many words each as a short passage has."""
        if words is None:
            return self._documents[document]
        if (document, words) not in self._shorter:
            self._shorter[document, words] = self.grams(self._texts[document], words)
        return self._shorter[document, words]

    def hidden(self) -> set[str]:
        """The documents of the index that are one of those predicted, or nearly one."""
        ids = set(self._ids)
        contents = set().union(*(self._alike.get(content, ()) for content in set(self._contents)))
        return {owner for owner, content in self._content.items() if owner in ids or content in contents}

    def _near(self, parts: dict[str, list[Grams]]) -> None:
        """Find what is nearly the same; documents of one content count once, however many they are."""
        sets: dict[bytes, Grams] = {}
        places: dict[bytes, int] = {}

        def content(grams: Grams) -> int:
            key = grams.tobytes()
            sets.setdefault(key, grams)
            return places.setdefault(key, len(places))

        self._contents = [content(grams) for grams in self._documents]
        self._content = {name: content(np.unique(np.concatenate(pieces))) for name, pieces in parts.items()}
        # Nothing is nearly the same as what has no words.
        self._alike = {place: {place} for key, place in places.items() if key}
        for i, j in near_duplicates(list(sets.values()), self.threshold):
            self._alike[i].add(j)
            self._alike[j].add(i)

    def _hides(self, document: int, owner: str) -> bool:
        return owner == self._ids[document] or self._content[owner] in self._alike.get(self._contents[document], ())


def document_of(passage: Passage) -> str:
    """The id of a passage's document: its own where it names none."""
    return passage.doc_id or passage.id
