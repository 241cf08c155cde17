"""The base of a run that trains a causal language model, on prompts or on documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ragmoe._errors import BundleError, ConfigError
from ragmoe._quiet import quiet_loading
from ragmoe.generation.batches import sees_neighbours
from ragmoe.generation.generator import Generator, is_generator, register_decoders
from ragmoe.generation.prompts import PromptStyle
from ragmoe.generation.tokenizer import open_tokenizer
from ragmoe.index import Index
from ragmoe.models.saving import BundleMixin
from ragmoe.training.adapters import adapt_decoder, added_parameters
from ragmoe.training.callbacks import load_record
from ragmoe.training.clusters import check_start
from ragmoe.training.config import DataConfig, TrainingConfig
from ragmoe.training.folder import HISTORY_NAME, forget_model
from ragmoe.training.trainer import check_balance, freeze

_WHOLE = "all"
_PARTS = ("gate", "experts", "gate+experts", "new_expert")
_LORA = "lora"
# What calibrates a reader's no-answer threshold.
_CALIBRATING = ("calibration_share", "calibration_limit", "unanswerable_share")


def is_decoder(base: str) -> bool:
    """Whether a base is the folder of a causal language model."""
    return Path(base).is_dir() and is_generator(base)


class Decoder(NamedTuple):
    """A causal language model, its tokenizer, and the PEFT model around it where adapters are trained."""

    model: Any
    tokenizer: Any
    adapted: Any


def open_decoder(config: TrainingConfig, index: Index | None, neighbours: int) -> Decoder:
    """The base and its tokenizer, ready to be trained in fp32.

    With ``model`` given it gets gates and experts first, as by ``ragmoe init``; else it is trained as it is.

    Args:
        index: None for a model whose gate sees no neighbours.
        neighbours: how many the gate will see.

    Raises:
        ConfigError: a setting is a reader's, or means nothing to this base; or its gate wants an index, or cannot start
            from clusters.
        ModelError: the base cannot be what ``model`` says, or its gate has learned from another encoder.
    """
    from transformers import AutoModelForCausalLM

    from ragmoe.models.initialising import make

    _check(config)
    register_decoders()
    with quiet_loading():
        given = given_settings(config, None if index is None else index.width)
        if given is not None:
            model = make(config.base, seed=config.seed, **given).model.float()
        else:
            model = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
    if config.train.what in _PARTS and not getattr(model, "sparse_layers", None):
        raise ConfigError(f"train.what is {config.train.what!r}, but the base {config.base} has no sparse layer")
    if config.train.balance_bias_rate and not getattr(model, "sparse_layers", None):
        raise ConfigError(
            f"train.balance_bias_rate is given, but the base {config.base} has no sparse layer to balance"
        )
    check_balance(config)
    check_start(model, config)
    adapted = adapt_decoder(model, config.train.lora) if config.train.what == _LORA else None
    freeze(model, config.train.what)
    if sees_neighbours(model):
        if index is None:
            raise ConfigError(
                f"the gate {model.config.gate!r} sees neighbours, but data.index names no index to take them from",
                hint="ragmoe index build SOURCE --out DIR makes one, data.index (experts add: --index DIR) names it; "
                "the gate token needs none",
            )
        model.check_index(index)
        encoder = index.manifest.encoder
        model.config.neighbours = neighbours
        model.config.encoder = {"id": encoder.id, "digest": encoder.digest}
        model.config.index_digest = index.digest
    return Decoder(model, open_tokenizer(config.base, model), adapted)


def given_settings(config: TrainingConfig, width: int | None) -> dict[str, Any] | None:
    """What ``model`` gives the base; None for one that is trained as it is.

    Args:
        width: of the index's embeddings, None without one.
    """
    if not config.model:
        return None
    # An arm of an experiment takes back with null what all arms were given.
    given = {name: value for name, value in config.model.items() if value is not None}
    return {**({"neighbour_width": width} if width is not None else {}), **given}


def decoder_parameters(model: Any) -> dict[str, int]:
    """Total and active parameters of a model, sparse or not, as it will be saved, and how many are trained."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    counts = model.parameter_counts() if hasattr(model, "parameter_counts") else {"total": total, "active": total}
    extra = added_parameters(model)
    return {**{name: count - extra for name, count in counts.items()}, "trained": trained}


@torch.no_grad()
def save_checked(
    model: Any, tokenizer: Any, style: PromptStyle | None, batch: Mapping[str, Tensor], folder: Path
) -> None:
    """Save a trained model, and make sure that what was saved says on a batch what was trained, to the last bit.

    Args:
        style: how it is asked; None for a model that was not taught how.

    Raises:
        BundleError: it does not.
    """
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    generator = Generator(model.eval().float().cpu(), tokenizer, style)
    known = {"message": "train", "extra": load_record(folder / HISTORY_NAME, model.config)}
    generator.save(folder, **(known if isinstance(model, BundleMixin) else {}))
    again = Generator.load(folder).model.float()
    difference = (model(**inputs).logits - again(**inputs).logits).abs().max().item()
    if difference != 0.0:
        forget_model(folder)
        raise BundleError(f"{folder} was saved, but its logits differ from the trained model's by {difference:.2e}")


def _check(config: TrainingConfig) -> None:
    """Refuse what only a reader has."""
    for name, given in (("start", config.start), ("expert_noise", config.expert_noise)):
        if given:
            raise ConfigError(
                f"{name} is {given!r}, but the base {config.base} is a causal language model",
                hint=f"leave {name} out; how its experts start is model.init and model.amount",
            )
    if config.new_expert is not None and not config.data.documents:
        raise ConfigError(
            "new_expert is given, but data.documents is empty, which a causal language model's expert learns from",
            hint="ragmoe experts add BUNDLE --name NAME --corpus FILE",
        )
    for name in _CALIBRATING:
        value, usual = getattr(config.data, name), DataConfig.model_fields[name].default
        if value not in (usual, 0) and not (config.new_expert and name == "calibration_share"):
            raise ConfigError(
                f"data.{name} is {value}, but a causal language model has no no-answer threshold to be calibrated",
                hint=f"leave data.{name} out",
            )
    if config.train.what not in (_WHOLE, *_PARTS, _LORA):
        raise ConfigError(
            f"train.what is {config.train.what!r}; for a causal language model expected one of: "
            f"{', '.join((_WHOLE, *_PARTS, _LORA))}"
        )
    if config.train.dropout is not None or config.train.attention_dropout is not None:
        raise ConfigError("train.dropout is set, but a causal language model is trained with its own: leave it out")
