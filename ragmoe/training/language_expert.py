"""A new expert for a language model: it learns to predict its own documents, and its gate rows when to be called.

What an expert starts with, and what it is when it is done, is as in new_expert.py. The gate's lesson reads chunks of
its own documents and of others, each with the neighbours of what precedes it.

P chunks that are read, E experts, R encoder width.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragmoe._errors import ConfigError, DataError
from ragmoe.corpus import read_documents
from ragmoe.corpus.leaks import LeakGuard, document_of
from ragmoe.corpus.types import Passage
from ragmoe.index import Index
from ragmoe.models.growth import grow
from ragmoe.training.callbacks import Shows
from ragmoe.training.config import LanguageConfig, NewExpertConfig, TrainingConfig
from ragmoe.training.digests import digest
from ragmoe.training.language import LanguageCollator, LanguageDataset
from ragmoe.training.lesson import CallingLesson, gate_inputs, lesson_size
from ragmoe.training.new_expert import (
    HEARD,
    PLACED,
    TRIED,
    Batches,
    NewExpert,
    freeze_gates,
    joined,
    nearest_centroid,
    start_cluster,
    start_rows,
    wanted_expert,
)

_BATCH = 16


@dataclass(frozen=True)
class LanguageExpert(NewExpert):
    """A language model's, with the chunks of its own documents."""

    own: Chunks

    def heard(self, model: Any) -> Batches:
        return self.own.batches(model, HEARD)

    def tried(self, model: Any) -> Batches:
        return self.own.batches(model, TRIED)


class Chunks:
    """Some chunks of documents, in an order that the seed alone decides.

    Only the first chunk of a document has no neighbours, so those are left out where there are others: a gate that
    read them would learn to go by that.
    """

    def __init__(
        self,
        data: LanguageDataset,
        collator: LanguageCollator,
        limit: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.data, self.collator, self.seed = data, collator, seed
        places = [at for at, chunk in enumerate(data.chunks) if chunk.number] or list(range(len(data.chunks)))
        self.places = random.Random(seed).sample(places, min(limit, len(places)))
        data.retrieve(self.places, progress)

    def batches(self, model: Any, limit: int) -> Iterator[dict[str, Tensor]]:
        """The first ``limit`` of them, where the model is."""
        device = next(model.parameters()).device
        places = self.places[:limit]
        for begin in range(0, len(places), _BATCH):
            batch = self.collator([self.data.example(place) for place in places[begin : begin + _BATCH]])
            yield {name: x.to(device) for name, x in batch.items()}

    def texts(self, limit: int) -> list[str]:
        """What the first ``limit`` of them say."""
        return [self.data.chunks[place].text for place in self.places[:limit]]


class ChunkBatches:
    """``LessonBatches``: chunks of the expert's own documents, then as many of others."""

    def __init__(self, own: Chunks, others: Chunks, size: int) -> None:
        self.sides, self.size = (own, others), size

    def __call__(self, at: int) -> dict[str, Tensor]:
        examples = [
            side.data.example(side.places[i % len(side.places)], random.Random(f"{side.seed}/{i}"))
            for side in self.sides
            for i in range(at * self.size, (at + 1) * self.size)
        ]
        return self.sides[0].collator(examples)


def begin_language_expert(
    model: Any,
    config: TrainingConfig,
    index: Index | None,
    data: LanguageDataset,
    collator: LanguageCollator,
    cache: Path,
    show: Shows | None = None,
) -> LanguageExpert | None:
    """Grow a language model by the expert that its configuration asks for; None where it asks for none.

    Args:
        model: as its bundle has it.
        index: None for a model whose gate sees no neighbours.
        data: what the expert is trained on; it recalls what the grown model wants afterwards.
        cache, show: as in ``begin_new_expert``.

    Raises:
        ConfigError, ModelError, BundleError, DataError: where the bundle takes no such expert.
    """
    wanted = wanted_expert(config)
    if wanted is None:
        return None
    if wanted.corpus:
        raise ConfigError(
            "new_expert.corpus is given, but a language model learns from data.documents",
            hint="leave new_expert.corpus out",
        )
    id = joined(model, config, wanted, index)
    progress = partial(show.stage, "retrieving for its own documents") if show else None
    own = Chunks(data, collator, wanted.documents, config.seed, progress)
    others = None
    if wanted.first_token:
        raise ConfigError(
            "new_expert.first_token is given, but a language model finds nothing at its first token",
            hint="leave it out: it is for readers, which find their no-answer score there",
        )
    if wanted.train_gate or wanted.start == "nearest":
        others = _other_chunks(wanted, config, index, data, collator, cache, show)
    rows = start_rows(model, wanted.start, partial(_nearest, model, index, own, others), seed=config.seed)
    if index is not None:
        rows |= start_cluster(model, rows, lambda: index.encode(own.texts(PLACED), passages=True))
    grown = grow(model, rows, id=id, name=wanted.name)
    lesson = None
    for chunks in (own, others):
        if chunks is not None:
            chunks.data.recall = recalling(grown, index)
    if wanted.train_gate and others is not None:
        lesson = CallingLesson(grown, ChunkBatches(own, others, lesson_size(config)), follow=False)
    else:
        freeze_gates(grown)
    return LanguageExpert(grown, wanted, lesson, own)


def recalling(model: Any, index: Index | None) -> Any:
    """What a dataset asks of a model for neighbours of a document of some domain (see ``MemoryMixin.recall``).

    Where they have no ids, they are queries that are shown in the place of passages.
    """
    return lambda neighbours, domain: model.recall(neighbours, index, [domain], guess=not neighbours.passage_ids)


def _other_chunks(
    wanted: NewExpertConfig,
    config: TrainingConfig,
    index: Index | None,
    data: LanguageDataset,
    collator: LanguageCollator,
    cache: Path,
    show: Shows | None,
) -> Chunks:
    """Chunks of documents that the expert is not for."""
    language = config.language or LanguageConfig()
    # Not only what it learns from: an index also holds what is kept aside to judge it by, or left out by a limit.
    own = [document for document in read_documents(config.data.documents) if document.domain not in config.data.without]
    unseen = list(read_documents(wanted.unseen))
    hidden = {document_of(document) for document in [*data.documents, *own, *unseen]}
    if wanted.others:
        found = list(read_documents(wanted.others))
    else:
        found = indexed_documents(index) if index is not None else []
    found = [document for document in found if document_of(document) not in hidden]
    # The same text may be there under another name: ids of files depend on the folder that was named.
    hidden = LeakGuard([*own, *unseen], found).hidden()
    found = [document for document in found if document_of(document) not in hidden]
    if not found:
        raise DataError(
            "there are no documents but the new ones, and those that it is judged by: nothing says when not to call "
            f"the expert {wanted.name}",
            hint="name some with --others FILE, or leave its gate rows as they start with new_expert.train_gate=false",
        )
    excerpts = cut_excerpts(found, collator.tokenizer, language, wanted.documents, config.seed)
    progress = partial(show.stage, "retrieving for other documents") if show else None
    others = LanguageDataset(
        excerpts, data.index, collator.tokenizer, language, cache=cache, recall=data.recall, progress=progress
    )
    return Chunks(others, collator, wanted.documents, config.seed)


def indexed_documents(index: Index) -> list[Passage]:
    """The documents that an index was cut from, as far as it holds them: their passages one after the other."""
    parts: dict[str, list[Passage]] = defaultdict(list)
    for passage in index.iterate():
        parts[document_of(passage)].append(passage)
    return [
        replace(passages[0], id=name, doc_id=name, text="\n".join(passage.text for passage in passages))
        for name, passages in parts.items()
    ]


def cut_excerpts(
    documents: Sequence[Passage], tokenizer: Any, config: LanguageConfig, limit: int, seed: int
) -> list[Passage]:
    """At most ``limit`` stretches of documents, evenly from their domains, each a chunk with what retrieves for it.

    So no more is retrieved for than is read. Of a document at most as many are taken as are needed.
    """
    length = (config.query_chunks + config.queries) * config.chunk_tokens
    by_domain: dict[str, list[Passage]] = defaultdict(list)
    for document in sorted(documents, key=lambda document: digest(document.id)):
        by_domain[document.domain].append(document)
    turns = [document for turn in zip_longest(*by_domain.values()) for document in turn if document is not None]
    each = -(-limit // len(turns))
    found: list[Passage] = []
    for document in turns[:limit]:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        begins = range(0, max(1, len(ids) - length + 1), length)
        chosen = random.Random(f"{seed}/{document.id}").sample(begins, min(each, len(begins)))
        for begin in sorted(chosen):
            text = tokenizer.decode(ids[begin : begin + length])
            found.append(replace(document, id=f"{document.id}@{begin}", doc_id=document_of(document), text=text))
    return found[:limit]


def _nearest(model: Any, index: Index | None, own: Chunks, others: Chunks | None) -> int:
    """The place of the expert whose chunks are nearest to the new ones; see ``nearest_expert``."""
    if index is None:
        raise ConfigError(
            "the nearest expert is found by an index's encoder, and data.index names no index",
            hint="start from a certain expert: --from NAME",
        )
    assert others is not None, "they are cut where the nearest expert is asked for"
    load_PE = np.concatenate([_loads(model, batch) for batch in others.batches(model, PLACED)])
    return nearest_centroid(load_PE, index.encode(others.texts(PLACED)), index.encode(own.texts(PLACED)))


@torch.no_grad()
def _loads(model: Any, batch: dict[str, Tensor]) -> np.ndarray:
    """The share of each sequence's choices that falls on each expert, a mean over layers: (P, E)."""
    mask_PT = batch["attention_mask"].bool()
    shares = []
    for gate, args in gate_inputs(model.eval(), batch):
        chosen_PTE = gate(*args).choices_SE().view(*mask_PT.shape, -1) * mask_PT.unsqueeze(-1)
        counts_PE = chosen_PTE.sum(dim=1).double()
        shares.append(counts_PE / counts_PE.sum(dim=1, keepdim=True).clamp(min=1))
    return np.asarray(torch.stack(shares).mean(dim=0).cpu())
