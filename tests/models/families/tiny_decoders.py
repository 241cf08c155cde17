"""Tiny decoders of all families, dense and sparse, and what goes into them: width 32, two layers, 64 words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ragmoe import Neighbours
from ragmoe.models.families import FAMILIES

VOCABULARY, PAD, WIDTH, R, E, K = 64, 0, 32, 16, 4, 2
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SPARSE = {**_SIZES, "num_experts_per_tok": K}
NATIVE: dict[str, Callable[..., Any]] = {
    "mixtral": lambda **s: MixtralConfig(**{**_SPARSE, "num_local_experts": E, **s}),
    "qwen3_moe": lambda **s: Qwen3MoeConfig(
        **{**_SPARSE, "num_experts": E, "moe_intermediate_size": 48, "head_dim": 12, **s}
    ),
    "olmoe": lambda **s: OlmoeConfig(**{**_SPARSE, "num_experts": E, **s}),
    "glm4_moe": lambda **s: Glm4MoeConfig(
        **{
            **_SPARSE,
            "n_routed_experts": E,
            "moe_intermediate_size": 48,
            "routed_scaling_factor": 2.5,
            "head_dim": 8,
            "use_qk_norm": True,
            **s,
        }
    ),
}
DENSE: dict[str, Callable[..., Any]] = {
    "llama": lambda **s: LlamaConfig(**{**_SIZES, **s}),
    "mistral": lambda **s: MistralConfig(**{**_SIZES, "sliding_window": 5, **s}),
    "qwen3": lambda **s: Qwen3Config(**{**_SIZES, "head_dim": 12, **s}),
}


def shaken(model: Any, scale: float = 0.2) -> Any:
    """None of its weights is what it started with, and no bias is zero; ready to answer."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "balance_bias")):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model.eval()


def native(family: str, **settings: Any) -> Any:
    """The family's own model."""
    return shaken(AutoModelForCausalLM.from_config(NATIVE[family](**settings)))


def make(family: str, *, trained: bool = True, **settings: Any) -> Any:
    """Ours; with ``trained`` its gate no longer starts at zero, so that neighbours change what it says."""
    ours = FAMILIES[family]
    small = {"neighbour_width": R, "gate_width": 8, "expert_rank": 8}
    config = ours.config_class.from_dict({**NATIVE[family]().to_dict(), **small, **settings})
    model = ours(config)
    if trained:
        shaken(model)
        for name, parameter in model.named_parameters():
            if name.endswith("context.weight"):
                parameter.data *= 5
    return model.eval()


def prompts(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def some_neighbours(questions: int = 3, n: int = 4) -> Neighbours:
    """Unit vectors; each question but the first has one neighbour less than n."""
    embeddings_BNR = torch.nn.functional.normalize(torch.randn(questions, n, R), dim=-1)
    mask_BN = torch.ones(questions, n, dtype=torch.bool)
    mask_BN[1:, -1] = False
    return Neighbours(embeddings_BNR, torch.rand(questions, n), mask_BN)
