"""Language modelling by ``ragmoe train``: a causal language model on documents, by the same runs as a reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ragmoe._errors import ConfigError
from ragmoe.corpus.types import Passage
from ragmoe.generation.batches import reads_neighbours, sees_neighbours
from ragmoe.index import Index
from ragmoe.training.adapters import merge
from ragmoe.training.callbacks import Shows
from ragmoe.training.clusters import start_gates
from ragmoe.training.config import LanguageConfig, TrainingConfig
from ragmoe.training.decoders import decoder_parameters, is_decoder, open_decoder, save_checked
from ragmoe.training.generator import GeneratorTrainer
from ragmoe.training.language import LanguageCollator, LanguageDataset, learned_documents
from ragmoe.training.language_expert import LanguageExpert, begin_language_expert, recalling
from ragmoe.training.retrieved import CACHE_NAME
from ragmoe.training.totals import check_decoder_losses
from ragmoe.training.trainer import RagmoeTrainer
from ragmoe.training.votes import check_votes


@dataclass
class LanguageRun:
    """Everything a run needs, made from its configuration; see ``Run``. An index only where one is named."""

    config: TrainingConfig
    index: Index | None
    model: Any
    dataset: LanguageDataset
    collator: LanguageCollator
    adapted: Any = None
    new_expert: LanguageExpert | None = None

    trainer_class: ClassVar[type[RagmoeTrainer]] = GeneratorTrainer

    @property
    def material(self) -> Sequence[Passage]:
        """The documents."""
        return self.dataset.documents

    @property
    def counts(self) -> dict[str, int]:
        """What is learned from."""
        return {"documents": len(self.dataset.documents), "chunks": len(self.dataset.chunks)}

    @property
    def parameters(self) -> dict[str, int]:
        """Total, active and trained."""
        return decoder_parameters(self.model)

    def save(self, folder: Path) -> Path | None:
        """Save, and make sure that what was saved says what was trained; the folder of its adapter, if any."""
        self.model, adapter = merge(self.model, self.adapted, folder)
        if self.new_expert is not None:
            self.model = self.new_expert.finish(self.model)
        batch = self.collator([self.dataset[at] for at in range(min(2, len(self.dataset)))])
        save_checked(self.model, self.collator.tokenizer, None, batch, folder)
        return adapter


def prepare_language(config: TrainingConfig, *, cache: Path | None = None, show: Shows | None = None) -> LanguageRun:
    """``prepare`` for language modelling.

    Raises:
        ConfigError: the base is no causal language model, or does not reach over a chunk with its context.
        DataError: the documents hold nothing to predict.
        ModelError, BundleError: the bundle takes no such expert as is asked for.
    """
    if not is_decoder(config.base):
        raise ConfigError(
            f"data.documents is given, but the base {config.base} is no folder of a causal language model",
            hint="name one with base=FOLDER, or give data.questions to train a reader",
        )
    settings, train = config.language or LanguageConfig(), config.train
    index = None if config.data.index is None else Index.open(config.data.index)
    model, tokenizer, adapted = open_decoder(config, index, settings.neighbours)
    length = settings.context_tokens + settings.chunk_tokens
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError(f"a chunk with its context has {length} tokens, but the base has {positions} positions")
    cache = cache or (index.folder / CACHE_NAME if index is not None else Path(CACHE_NAME))
    documents = learned_documents(config, show.line if show else None)[0]
    check_decoder_losses(model.config, documents, sees_neighbours=sees_neighbours(model))
    dataset = LanguageDataset(
        documents,
        index if sees_neighbours(model) else None,
        tokenizer,
        settings,
        cache=cache,
        examples=train.steps * train.batch_size * train.accumulation,
        seed=config.seed,
        recall=recalling(model, index),
        retrieves=reads_neighbours(model),
        progress=partial(show.stage, "retrieving neighbours") if show else None,
    )
    start_gates(model, index, dataset, config, show)
    collator = LanguageCollator(tokenizer)
    expert = begin_language_expert(model, config, index, dataset, collator, cache, show)
    check_votes(model if expert is None else expert.model, index, show.line if show else None)
    return LanguageRun(config, index, model if expert is None else expert.model, dataset, collator, adapted, expert)
