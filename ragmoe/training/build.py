"""The model a configuration asks for: base, adapter, upcycling, and what of it is trained."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ragmoe._errors import ConfigError, ModelError
from ragmoe.bundle import is_bundle
from ragmoe.gates import selection_class
from ragmoe.models import RagmoeBertConfig, RagmoeBertForQuestionAnswering
from ragmoe.models.exchange import GATE_FIELDS, exchange_gate
from ragmoe.models.starter import resolve_bundle
from ragmoe.models.upcycling import base_path
from ragmoe.models.xlora import XLoraReader
from ragmoe.training.adapters import adapt_reader
from ragmoe.training.clusters import check_start
from ragmoe.training.config import TrainingConfig
from ragmoe.training.trainer import TRAINS_GATES, check_balance, freeze

WARM_START = Path(__file__).parents[1] / "models" / "warm_start"
_ELSEWHERE = {
    "neighbours": "raft.neighbours",
    "neighbour_width": "data.index",
    "hidden_dropout_prob": "train.dropout",
    "attention_probs_dropout_prob": "train.attention_dropout",
}
# Products that are timed to decide on bf16, and seconds after which no further one is.
_RUNS, _SECONDS = 50, 0.5
# What of a bundle may change when it is trained on: nothing that changes a shape.
_CHANGEABLE = {
    "balance_loss", "capacity_factor", "gate_jitter", "gate_noise", "losses", "max_answer_tokens", "max_length",
    "neighbours", "overflow", "overflow_priority", "stride", "token_dropout", "z_loss",
}  # fmt: skip


def build_model(config: TrainingConfig, index: Any, *, on_cpu: bool) -> RagmoeBertForQuestionAnswering:
    """The untrained model of a configuration.

    Raises:
        ModelError, ConfigError: for settings that do not fit the base.
    """
    settings = model_settings(config, index.width, on_cpu=on_cpu)
    encoder = index.manifest.encoder
    if is_bundle(config.base):
        model = _train_on(config, settings, index)
        if config.train.what == "xlora":
            model = XLoraReader(model, seed=config.seed)
    elif config.train.what == "xlora":
        raise ConfigError(
            f"train.what is 'xlora', but the base {config.base} is no bundle: expected one with trained LoRA experts",
            hint="train the experts first (train.what: gate+experts), and give their bundle as base",
        )
    else:
        base = base_path(config.base)
        source: Any = base
        if config.start is not None:
            source = RagmoeBertForQuestionAnswering.from_dense(base, sparse_layers=[], seed=config.seed)
            source = apply_start(source, config.start)
        model = RagmoeBertForQuestionAnswering.from_dense(
            source, expert_noise=config.expert_noise, seed=config.seed, **settings
        )
        from transformers import AutoTokenizer

        model.tokenizer = AutoTokenizer.from_pretrained(base)
        # The tokenizer of an encoder is told to cut at the encoder's length; reading has its own windows.
        model.tokenizer.model_max_length = model.config.max_position_embeddings
    check_length(config, model.config)
    check_start(model, config)
    model.config.encoder = {"id": encoder.id, "digest": encoder.digest}
    model.config.index_digest = index.digest
    return model


def model_settings(config: TrainingConfig, neighbour_width: int, *, on_cpu: bool) -> dict[str, Any]:
    """The fields of ``RagmoeBertConfig`` that a configuration and its index set; ConfigError for one that has a place
    of its own."""
    settings = dict(config.model)
    for name, instead in _ELSEWHERE.items():
        if name in settings:
            raise ConfigError(f"model.{name} is set by {instead}: set that", hint=f"ragmoe train ... {instead}=VALUE")
    dropout = config.train.dropout if config.train.dropout is not None else (0.0 if on_cpu else None)
    if dropout is not None:
        settings |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if config.train.attention_dropout is not None:
        settings["attention_probs_dropout_prob"] = config.train.attention_dropout
    return settings | {"neighbour_width": neighbour_width, "neighbours": config.raft.neighbours}


def check_length(config: TrainingConfig, model: RagmoeBertConfig) -> None:
    """ConfigError where sequences would be longer than the model has positions."""
    longest = max(model.max_length, config.raft.max_length)
    if longest > model.max_position_embeddings:
        raise ConfigError(f"max_length is {longest}, but the base has {model.max_position_embeddings} positions")


def _train_on(config: TrainingConfig, settings: dict[str, Any], index: Any) -> RagmoeBertForQuestionAnswering:
    opened, exchanged = opened_config(config, settings)
    model = RagmoeBertForQuestionAnswering.from_pretrained(config.base, config=opened)
    made = exchange_gate(model, seed=config.seed, **exchanged) if exchanged else model
    if model.gate_sees_neighbours:
        # What goes on with what it has learned of embeddings must be shown those of the encoder that it learned from.
        made.check_index(index)
    return made


def opened_config(config: TrainingConfig, settings: dict[str, Any]) -> tuple[RagmoeBertConfig, dict[str, Any]]:
    """The configuration of the bundle that is trained on, and the settings by which its gate is exchanged.

    Raises:
        ModelError, ConfigError: for settings that cannot be changed.
    """
    if config.start is not None:
        raise ConfigError(f"start is {config.start!r}, but the base {config.base} is a bundle: expected no start")
    opened = RagmoeBertConfig.from_pretrained(config.base)
    exchanged = {}
    for name, value in settings.items():
        if name in _CHANGEABLE or name.endswith("dropout_prob"):
            setattr(opened, name, value)
        elif getattr(opened, name, None) == value:
            continue
        elif name in GATE_FIELDS:
            exchanged[name] = value
        else:
            raise ModelError(
                f"model.{name} is {value!r}, but the bundle {config.base} has {getattr(opened, name, None)!r}"
            )
    if exchanged and config.train.what not in TRAINS_GATES:
        raise ConfigError(
            f"model.{next(iter(exchanged))} is changed, but train.what is {config.train.what!r}, which trains no gate",
            hint="set train.what: gate to train it alone, or gate+experts",
        )
    return opened, exchanged


def apply_start(model: RagmoeBertForQuestionAnswering, start: str) -> RagmoeBertForQuestionAnswering:
    """A dense reader further on: with an adapter and its head merged, or with the dense network of a bundle.

    Raises:
        ConfigError: ``start`` is neither.
        ModelError: the bundle has no dense network of that shape.
    """
    folder = WARM_START if start == "warm-start" else resolve_bundle(start)
    if is_bundle(folder):
        return take_dense(model, folder)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"start: {folder} holds no PEFT adapter (adapter_config.json), and is no bundle",
            hint="use start: warm-start, start: starter, or the adapter folder of a run with train.what: lora",
        )
    return merge_adapter(model, folder)


def take_dense(model: RagmoeBertForQuestionAnswering, bundle: Path) -> RagmoeBertForQuestionAnswering:
    """A dense reader with the weights of a bundle that are no gate's and no expert's."""
    trained = RagmoeBertForQuestionAnswering.from_pretrained(bundle)
    state = {name: x for name, x in trained.state_dict().items() if ".moe." not in name and ".summary." not in name}
    own = model.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        raise ModelError(
            f"start: the bundle {bundle} has no {missing[0]}: full experts stand in the place of its dense networks",
            hint="start from a bundle with LoRA experts or a shared expert",
        )
    if wrong := [name for name in own if own[name].shape != state[name].shape]:
        raise ModelError(
            f"start: {wrong[0]} is {tuple(state[wrong[0]].shape)} in the bundle {bundle}, but "
            f"{tuple(own[wrong[0]].shape)} in the base: expected the base that the bundle was made of"
        )
    model.load_state_dict({name: state[name] for name in own})
    return model


def merge_adapter(model: RagmoeBertForQuestionAnswering, folder: Path) -> RagmoeBertForQuestionAnswering:
    """Merge a PEFT adapter with its head into a dense reader."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged


def make_trainable(model: RagmoeBertForQuestionAnswering, config: TrainingConfig) -> Any:
    """Freeze what is not trained; returns the PEFT model for ``train.what: lora``, else None."""
    if config.train.what in ("gate", "experts", "gate+experts") and not model.sparse_layers:
        raise ConfigError(f"train.what is {config.train.what!r}, but the model has no sparse layer")
    check_balance(config)
    if config.train.balance_bias_rate and not selection_class(model.config.selection).takes_bias:
        raise ConfigError(
            f"train.balance_bias_rate is {config.train.balance_bias_rate}, but the selection "
            f"{model.config.selection!r} takes no bias: its load is even by construction",
            hint="leave train.balance_bias_rate out",
        )
    adapted = adapt_reader(model, config.train.lora) if config.train.what == "lora" else None
    freeze(model, config.train.what)
    return adapted


def trained_parameters(model: nn.Module) -> int:
    """How many parameters the optimiser moves: not those of a head that adapters have put aside."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and ".original_module." not in name)


def wants_bf16(precision: str) -> bool:
    """Whether to train in bf16: as told, or where it is measured to be at least 1.3 times as fast as fp32."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return matmul_seconds(torch.float32) > 1.3 * matmul_seconds(torch.bfloat16)


def matmul_seconds(dtype: torch.dtype) -> float:
    """The best of several runs of one feed-forward-sized product: on a busy machine only the best says anything.

    A processor without bf16 takes a hundred times as long for it: then one run says enough.
    """
    a, b = torch.ones(512, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
    times: list[float] = []
    while not times or (len(times) < _RUNS and sum(times) < _SECONDS):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return min(times)
