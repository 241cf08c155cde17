"""A training run as ``ragmoe plan`` counts it: its model's configuration, its batch, and what of it is trained.

Neither weights nor questions are read, and the index only for the width of its embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ragmoe._errors import ConfigError
from ragmoe.bundle import is_bundle
from ragmoe.index.manifest import NAME as MANIFEST
from ragmoe.index.manifest import read_manifest
from ragmoe.models.config import RagmoeBertConfig
from ragmoe.models.initialising import decoder_config
from ragmoe.models.plan.source import Planned, read_source
from ragmoe.models.upcycling import base_path, dense_config, upcycled_config
from ragmoe.training.adapters import adapt_decoder
from ragmoe.training.build import check_length, make_trainable, model_settings, opened_config, trained_parameters
from ragmoe.training.config import LanguageConfig, TrainingConfig, load_config
from ragmoe.training.decoders import given_settings, is_decoder
from ragmoe.training.new_expert import wanted_expert
from ragmoe.training.trainer import freeze, part_of

_FP32 = "Ragmoe train keeps weights in fp32, also where it computes in bf16: then activations are smaller."


def planned_training(name: str, source: Path | Mapping[str, Any], overrides: Sequence[str]) -> Planned:
    """What a training file asks for.

    Raises:
        ConfigError, ModelError, UsageError: as ``ragmoe train`` would, as far as no weights are needed to tell.
    """
    training = load_config(source, overrides)
    if training.train.what == "xlora":
        raise ConfigError(
            f"{name}: train.what is 'xlora', whose classifier reads with all experts at once: a plan knows only gates",
            hint="ragmoe train FILE --dry-run counts it",
        )
    if is_decoder(training.base):
        return _planned_decoder(name, training)
    width, notes = _width(training.data.required_index)
    settings = model_settings(training, width, on_cpu=True)
    if is_bundle(training.base):
        config, exchanged = opened_config(training, settings)
        for key, value in exchanged.items():
            setattr(config, key, value)
    else:
        config = upcycled_config(dense_config(base_path(training.base)), settings)
    if wanted_expert(training) is not None:
        config.experts += 1
        config.expert_ids = config.expert_names = config.expert_thresholds = None
    check_length(training, config)
    return Planned(
        name,
        config,
        batch=training.train.batch_size * training.raft.passages,
        length=training.raft.max_length,
        counts=partial(_counts, training),
        notes=notes,
    )


def _planned_decoder(name: str, training: TrainingConfig) -> Planned:
    """A causal language model, as it is or with the gates and experts that ``model`` gives it."""
    width, notes = (None, [_FP32]) if training.data.index is None else _width(training.data.index)
    given = given_settings(training, width)
    config = read_source(training.base).config if given is None else decoder_config(training.base, **given)
    if wanted_expert(training) is not None:
        config.experts += 1
        config.expert_ids = config.expert_names = None
    language = training.language or LanguageConfig()
    length = language.context_tokens + language.chunk_tokens if training.data.documents else training.raft.max_length
    return Planned(
        name,
        config,
        batch=training.train.batch_size,
        length=length,
        counts=partial(_decoder_counts, training),
        notes=notes,
    )


def _width(index: str) -> tuple[int, list[str]]:
    """The width of an index's embeddings, or the usual one, and what is to be said of it."""
    if (Path(index) / MANIFEST).is_file():
        return read_manifest(Path(index)).encoder.width, [_FP32]
    width = RagmoeBertConfig.neighbour_width
    return width, [_FP32, f"There is no index at {index} yet; its embeddings are taken to be {width} wide."]


def _decoder_counts(training: TrainingConfig, model: Any) -> tuple[int, int]:
    """As `_counts`, of a causal language model."""
    if training.new_expert is not None:
        return _counts(training, model)
    with torch.device("meta"):
        adapted = adapt_decoder(model, training.train.lora) if training.train.what == "lora" else None
    freeze(model, training.train.what)
    return sum(p.numel() for p in (adapted or model).parameters()), trained_parameters(model)


def _counts(training: TrainingConfig, model: Any) -> tuple[int, int]:
    """Parameters that are held while training, adapters included, and those that are trained."""
    wanted = training.new_expert
    if wanted is None:
        with torch.device("meta"):
            adapted = make_trainable(model, training)
        return sum(p.numel() for p in (adapted or model).parameters()), trained_parameters(model)
    rows = model.expert_tensors()
    own = [p for name, p in model.named_parameters() if name in rows and (wanted.train_gate or part_of(name) != "gate")]
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in own) // model.config.experts
