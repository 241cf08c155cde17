"""How decoders come to have a gate that sees neighbours: dense ones are upcycled, sparse ones exchange their gates.

What makes a bundle of either is ``ragmoe.models.initialising.init``.
Source: Komatsuzaki et al. 2022, "Sparse Upcycling".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ragmoe._errors import ModelError
from ragmoe._quiet import quiet_loading
from ragmoe.experts import start_class
from ragmoe.gates import gate_class
from ragmoe.models.families import FAMILIES, RoutingConfig


@dataclass(frozen=True)
class Made:
    """A model with new gates, and how it came about.

    Attributes:
        how: ``upcycling`` or ``gate exchange``.
        layers: the layers that were changed.
        deviation: the largest absolute deviation of an expert's weight from the dense one's; 0.0 for exact copies.
        notes: what one should know, a sentence each.
    """

    model: Any
    how: str
    base_type: str
    layers: list[int]
    deviation: float = 0.0
    notes: list[str] = field(default_factory=list)


class Upcycled(NamedTuple):
    """What a dense model becomes: the family, the fields that it needs, and those whose effect it has no place for."""

    family: str
    fields: Callable[[Any], dict[str, Any]]
    unknown: tuple[str, ...]


UPCYCLED = {
    "llama": Upcycled("mixtral", lambda dense: {"sliding_window": None}, ("attention_bias", "mlp_bias")),
    "mistral": Upcycled("mixtral", lambda dense: {}, ("attention_bias",)),
    # Its own default would scale down what copies answer together.
    "qwen3": Upcycled(
        "qwen3_moe",
        lambda dense: {"norm_topk_prob": True, "moe_intermediate_size": dense.intermediate_size, "mlp_only_layers": []},
        ("use_sliding_window",),
    ),
}
# What every decoder's gate may be told, upcycled or exchanged; the rest belongs to the experts.
_OF_EXPERTS = {"experts", "top_k", "expert_kind", "expert_rank"}
_SETTINGS = {f.name for f in dataclasses.fields(RoutingConfig)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}


def exchange_base_gates(path: str, base: Any, settings: dict[str, Any]) -> Made:
    """A sparse checkpoint with another gate in every sparse layer; its experts stay.

    What a gate that contains the token gate (retrieval, pooled, memory) starts as is the checkpoint's own gate.

    Args:
        base: its configuration.
        settings: fields of ``RoutingConfig`` that do not concern the experts.

    Raises:
        ModelError: the settings concern the experts or do not exist, or the checkpoint lacks weights.
    """
    config = exchanged_config(path, base, settings)
    family = FAMILIES[base.model_type]
    with quiet_loading():
        model, info = family.from_pretrained(path, config=config, output_loading_info=True)
    named = [
        *(name for name in info["missing_keys"] if not _is_new(name)),
        *(name for name in info["unexpected_keys"] if not _is_new(name)),
        *map(str, info["mismatched_keys"]),
    ]
    if named:
        raise ModelError(f"the checkpoint {path} does not fit its configuration: {sorted(named)[:5]}")
    notes = []
    if not gate_class(config.gate).keeps_token_gate:
        notes.append(
            f"the gate {config.gate!r} has no place for the one that was there and starts untrained: answers differ"
        )
    return Made(model, "gate exchange", base.model_type, model.sparse_layers, notes=notes)


def exchanged_config(path: str, base: Any, settings: dict[str, Any]) -> Any:
    """The configuration of `exchange_base_gates`; no weight is read."""
    if kept := sorted(_OF_EXPERTS & settings.keys()):
        raise ModelError(
            f"{path} is a mixture of experts already, which keeps its experts: {', '.join(kept)} cannot be chosen",
            hint="leave it out: only gates are exchanged",
        )
    return _config(FAMILIES[base.model_type], base.to_dict(), settings)


def upcycle_base(
    path: str,
    base: Any,
    settings: dict[str, Any],
    *,
    layers: Sequence[int] | None = None,
    init: str = "copy",
    amount: float | None = None,
    seed: int = 0,
) -> Made:
    """A dense checkpoint whose feed-forward networks are mixtures of experts.

    At step 0 LoRA experts answer exactly what the dense model does, and copies within rounding. (Within rounding too
    where the hidden width is no multiple of 32: processors compute activations by so many, and the rest otherwise.)

    Args:
        base: its configuration.
        settings: fields of ``RoutingConfig``, ``experts`` and ``top_k``.
        layers: which become sparse; None means all.
        init: how copies differ (see ``ragmoe.experts.start``), by ``amount``, drawn by ``seed``.

    Raises:
        ModelError: the checkpoint has something that the sparse family has no place for, or a setting does not exist.
        ConfigError: there is no such way to start, or LoRA experts are to start differently.
    """
    config = upcycled_decoder(path, base, settings, layers)
    family = FAMILIES[UPCYCLED[base.model_type].family]
    start = start_class(init)(amount, torch.Generator().manual_seed(seed))
    with quiet_loading():
        dense, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    if lacking := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
        raise ModelError(
            f"the checkpoint {path} lacks {len(lacking)} weights of a language model, which would be drawn at random: "
            f"{lacking[:5]}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family._from_config(config, dtype=dense.dtype)
    for gate in model.gates:
        gate.balance_bias = gate.balance_bias.float()
    deviation = max([_copy(model, dense, i, start) for i in model.sparse_layers], default=0.0)
    _copy_rest(path, model, dense)
    model.generation_config = dense.generation_config
    return Made(model.eval(), "upcycling", base.model_type, model.sparse_layers, deviation)


def upcycled_decoder(path: str, base: Any, settings: dict[str, Any], layers: Sequence[int] | None = None) -> Any:
    """The configuration of `upcycle_base`; no weight is read."""
    target = UPCYCLED[base.model_type]
    if foreign := [name for name in target.unknown if getattr(base, name, False)]:
        raise ModelError(f"{path} has {', '.join(foreign)}, which {target.family} has no place for")
    family = FAMILIES[target.family]
    known = {f.name for f in dataclasses.fields(family.config_class)} | {"head_dim"}
    inherited = {name: value for name, value in base.to_dict().items() if name in known}
    config = _config(family, {**inherited, **target.fields(base)}, {"expert_kind": "lora", **settings})
    if config.expert_kind == "ffn" and "expert_rank" in settings:
        raise ModelError("expert_rank is given, but 'ffn' experts have no rank", hint="leave it out")
    if layers is not None:
        config.sparse_layers = sorted(set(layers))
    config.sparse_layers = config.resolved_sparse_layers()
    return config


def _copy(model: Any, dense: Any, layer: int, start: Any) -> float:
    return float(model.model.layers[layer].mlp.copy_dense(dense.model.layers[layer].mlp, start))


def _copy_rest(path: str, model: Any, dense: nn.Module) -> None:
    """Everything but the feed-forward networks that became sparse."""
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    sparse = tuple(f"model.layers.{i}.mlp." for i in model.sparse_layers)
    if wrong := [name for name in (*missing, *unexpected) if not (name.startswith(sparse) or _is_new(name))]:
        raise ModelError(f"the checkpoint {path} does not fit {model.config.model_type}: {wrong[:5]}")


def _is_new(name: str) -> bool:
    """Whether no checkpoint of the family has a tensor: what gates and the neighbours' summary are made of."""
    return ".gate.inner." in name or ".summary." in name


def _config(family: Any, fields: dict[str, Any], settings: dict[str, Any]) -> Any:
    """The family's configuration with these fields and, laid over them, settings of ours."""
    known = _SETTINGS | {"experts", "top_k"}
    if unknown := sorted(settings.keys() - known):
        raise ModelError(f"unknown settings {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    own = {name: value for name, value in settings.items() if name in _SETTINGS}
    try:
        config = family.config_class.from_dict({**fields, **own})
    except StrictDataclassError as error:
        raise ModelError(f"bad settings: {error}") from None
    config.experts = settings.get("experts", config.experts)
    config.num_experts_per_tok = settings.get("top_k", config.num_experts_per_tok)
    config.architectures = [family.__name__]
    return config
