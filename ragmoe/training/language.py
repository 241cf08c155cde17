"""Language modelling on a corpus, with neighbours of what precedes: documents cut in chunks, and nothing that leaks.

A chunk's neighbours are what the text before it retrieves, so they are known before any of its tokens is predicted;
the first chunk of a document has none. Source of the scheme: Borgeaud et al. 2022, "Improving Language Models by
Retrieving from Trillions of Tokens".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ragmoe._errors import DataError, ModelError
from ragmoe.corpus import read_documents
from ragmoe.corpus.leaks import LeakGuard, document_of
from ragmoe.corpus.types import Passage
from ragmoe.generation.batches import decode_batch, labelled_batch, pad_token
from ragmoe.index import Index
from ragmoe.neighbours import Neighbours
from ragmoe.training.config import DataConfig, LanguageConfig, TrainingConfig
from ragmoe.training.data import Say, say_replayed
from ragmoe.training.digests import digest, is_held
from ragmoe.training.raft import drop_neighbours
from ragmoe.training.retrieved import Retrieved, embedded, neighbours_of

# Of the passages that a chunk retrieves many are of its own document, most of all in the corpus that is indexed.
_SPARE = 100


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A stretch of a document.

    Attributes:
        document: place of its document.
        number: of the chunk in it, from 0.
        before: tokens that are read and not predicted; a document begins with the tokenizer's first token.
        ids: tokens that are predicted.
        text: of ``ids``.
    """

    document: int
    number: int
    before: tuple[int, ...]
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class LanguageExample:
    """A chunk and its neighbours (one row); None without an index."""

    chunk: TextChunk
    neighbours: Neighbours | None


def learned_documents(config: TrainingConfig, say: Say | None = None) -> tuple[list[Passage], list[Passage]]:
    """The documents that are learned from, those replayed included; and those kept aside to judge a new expert by.

    Args:
        say: told where there is too little to replay.

    Raises:
        DataError: a domain that is to be left out is not there, or nothing is left.
    """
    data = config.data
    found = list(read_documents(data.documents))
    if unknown := sorted({*data.without} - {document.domain for document in found}):
        there = ", ".join(sorted({document.domain for document in found if document.domain}))
        raise DataError(f"data.without names the domain {unknown[0]!r}; the documents are of {there or 'none'}")
    found = [document for document in found if document.domain not in data.without]
    if data.limit is not None:
        kept = {document.id for document in _drawn(found)[: data.limit]}
        found = [document for document in found if document.id in kept]
    share = data.calibration_share if config.new_expert is not None else 0.0
    held = [document for document in found if is_held(document_of(document), share)]
    fit = [document for document in found if not is_held(document_of(document), share)]
    if held and not fit:
        raise DataError(
            f"all {len(found)} documents are kept aside to judge the new expert by (data.calibration_share is {share})",
            hint="data.calibration_share=0 keeps none aside",
        )
    if not fit:
        raise DataError(f"none of the {len(found)} documents is left to learn from")
    return fit + _replayed(data, found, sum(len(document.text) for document in fit), say), held


def _replayed(data: DataConfig, known: Sequence[Passage], own: int, say: Say | None) -> list[Passage]:
    """Others than the known documents, of as many characters as make up their share beside ``own``."""
    if not data.replay:
        return []
    ids = {document.id for document in known}
    wanted, replayed, found = own * data.replay_share / (1 - data.replay_share), [], 0
    for document in _drawn(list(read_documents(data.replay))):
        if found >= wanted:
            break
        if document.id not in ids and document.domain not in data.without:
            replayed.append(document)
            found += len(document.text)
    if say:
        say_replayed(say, found, wanted, own, data.replay_share)
    return replayed


def _drawn(documents: Sequence[Passage]) -> list[Passage]:
    """In an order that only their ids decide."""
    return sorted(documents, key=lambda document: digest(document.id))


def cut_documents(documents: Sequence[Passage], tokenizer: Any, config: LanguageConfig) -> list[TextChunk]:
    """All chunks in order; every token of every document is predicted exactly once.

    Raises:
        DataError: there is nothing to predict.
        ModelError: the tokenizer has no token that a document could begin with.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ModelError("the tokenizer has neither bos_token nor eos_token for a document to begin with: expected one")
    chunks: list[TextChunk] = []
    for place, document in enumerate(documents):
        ids = [first, *tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]]
        for number, begin in enumerate(range(1, len(ids), config.chunk_tokens)):
            own = tuple(ids[begin : begin + config.chunk_tokens])
            before = tuple(ids[max(0, begin - config.context_tokens) : begin])
            chunks.append(TextChunk(place, number, before, own, tokenizer.decode(own)))
    if not chunks:
        raise DataError(f"{len(documents)} documents hold no token to predict")
    return chunks


class LanguageDataset(Dataset):
    """The chunks of some documents with their neighbours, in an order that the seed alone decides.

    Args:
        index: None for models whose gate sees no neighbours.
        examples: how many are shown, pass after pass, each in a new order; None shows each chunk once, in its place.
        cache: folder where neighbours are kept between runs.
        recall: what the model adds to the neighbours of a document of some domain (see ``MemoryMixin.recall``).
        retrieves: False finds no neighbours, for a gate that makes nothing of them (``reads_neighbours``).
        progress: called with chunks retrieved for and chunks in all.
    """

    def __init__(
        self,
        documents: Sequence[Passage],
        index: Index | None,
        tokenizer: Any,
        config: LanguageConfig,
        *,
        cache: Path,
        examples: int | None = None,
        seed: int = 0,
        recall: Callable[[Neighbours, str], Neighbours] | None = None,
        retrieves: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.retrieves = retrieves
        self.recall = recall or (lambda neighbours, domain: neighbours)
        self.documents, self.config, self.seed = list(documents), config, seed
        self.chunks = cut_documents(documents, tokenizer, config)
        self.order = _order(len(self.chunks), examples, seed)
        # Tokens of each chunk with what is read before it.
        self.lengths = [len(chunk.before) + len(chunk.ids) for chunk in self.chunks]
        self.index, self.guard = index, None
        # The neighbours of a chunk that some were retrieved for: which retrieval's, and its question there.
        self._found: dict[int, tuple[Retrieved, int]] = {}
        # The embeddings of what is asked before a chunk, where those are shown.
        self._embedded: dict[int, NDArray[np.float32]] = {}
        if index is None or not retrieves:
            return
        if config.shown == "passages":
            self.guard = LeakGuard(documents, index.iterate())
        self.cache = cache
        self.retrieve(self.order, progress)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: int) -> LanguageExample:
        return self.example(self.order[at], random.Random(f"{self.seed}/{at}"))

    def example(self, place: int, draw: random.Random | None = None) -> LanguageExample:
        """A chunk with its neighbours, of which some are dropped where there is something to draw by."""
        found = self.neighbours(place)
        if found is not None and draw is not None:
            found = drop_neighbours(found, self.config.drop_all, self.config.drop_each, draw)
        return LanguageExample(self.chunks[place], found)

    def retrieve(self, places: Iterable[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Find the neighbours of some chunks by their places, where they are not known; nothing without an index.

        Those that are shown are known from the start. Of a large corpus a short run shows few, so no others are.
        """
        index = self.index if self.retrieves else None
        known = self._embedded if self.config.shown == "queries" else self._found
        asked = sorted({at for place in places for at in self._asking(place)} - known.keys())
        if index is None or not asked:
            return
        texts = [self.query(at) for at in asked]
        if self.config.shown == "queries":
            vectors_QR = embedded(index, texts, self.cache, progress=progress)
            self._embedded.update(zip(asked, vectors_QR, strict=True))
            return
        n = min(self.config.neighbours + _SPARE, len(index))
        retrieved = Retrieved.of(index, texts, n, self.config.retriever, self.cache, progress=progress)
        self._found.update((at, (retrieved, query)) for query, at in enumerate(asked))

    def _asking(self, place: int) -> range:
        """The places of the chunks whose queries find the neighbours of a chunk: none before a document's second."""
        return range(place - min(self.config.queries, self.chunks[place].number) + 1, place + 1)

    def query(self, place: int) -> str:
        """What retrieves the neighbours of a chunk: the text of the chunks before it, of the same document."""
        begin = max(place - self.config.query_chunks, place - self.chunks[place].number)
        return "".join(chunk.text for chunk in self.chunks[begin:place])

    def neighbours(self, place: int) -> Neighbours | None:
        """The neighbours of a chunk, without what would tell it (see ``LeakGuard``); None without an index.

        They are the best by score of what its own query found and, where ``queries`` says so, those of the chunks
        before it; or these queries themselves, where they are ``shown``. The chunk is one of those that are shown, or
        that ``retrieve`` was asked for.
        """
        index, guard, chunk = self.index, self.guard, self.chunks[place]
        domain = self.documents[chunk.document].domain
        if index is None:
            return None
        if self.retrieves and self.config.shown == "queries":
            return self.recall(self._queries(place, index.width), domain)
        if guard is None:
            return self.recall(Neighbours.empty(1, index.width, self.config.neighbours), domain)
        grams, n = guard.grams(chunk.text), self.config.neighbours
        best: dict[int, float] = {}
        for at in self._asking(place):
            retrieved, query = self._known(self._found, at, place)
            for row, score in retrieved.found(query, n, lambda row: guard.allows(chunk.document, grams, row)):
                best[row] = max(score, best.get(row, score))
        # What one query found stays as its retriever ranked it.
        shown = sorted(best, key=lambda row: -best[row])[:n] if len(best) > n else list(best)
        rows_N, scores_N = np.full(n, -1, dtype=np.int64), np.zeros(n, dtype=np.float32)
        rows_N[: len(shown)], scores_N[: len(shown)] = shown, [best[row] for row in shown]
        return self.recall(neighbours_of(index, rows_N, scores_N), domain)

    def _queries(self, place: int, width: int) -> Neighbours:
        """The embeddings of what is asked for a chunk in the place of neighbours, all of one weight and without ids."""
        vectors = [torch.from_numpy(self._known(self._embedded, at, place)) for at in self._asking(place)]
        if not vectors:
            return Neighbours.empty(1, width, self.config.queries)
        embeddings_BNR = torch.stack(vectors).unsqueeze(0)
        scores_BN = torch.zeros(embeddings_BNR.shape[:2])
        return Neighbours(embeddings_BNR, scores_BN, torch.ones_like(scores_BN, dtype=torch.bool), [])

    @staticmethod
    def _known(known: Mapping[int, Any], at: int, place: int) -> Any:
        if at not in known:
            raise ValueError(f"chunk {place} is none of those shown, and no neighbours were retrieved for it")
        return known[at]


class LanguageCollator:
    """Chunks to ``input_ids``, ``attention_mask``, ``labels`` and, where there is an index, neighbours."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, examples: Sequence[LanguageExample]) -> dict[str, Tensor]:
        rows = [example.neighbours for example in examples if example.neighbours is not None]
        pairs = [(example.chunk.before, example.chunk.ids) for example in examples]
        return labelled_batch(pairs, pad_token(self.tokenizer), Neighbours.stack(rows) if rows else None)

    def decoded(self, batch: Mapping[str, Tensor]) -> list[dict[str, str]]:
        """What a batch says; see ``decode_batch``."""
        return decode_batch(self.tokenizer, batch)


def _order(chunks: int, examples: int | None, seed: int) -> list[int]:
    if examples is None:
        return list(range(chunks))
    draw = random.Random(seed)
    order: list[int] = []
    while len(order) < examples:
        order += draw.sample(range(chunks), chunks)
    return order[:examples]
