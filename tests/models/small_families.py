"""Small configurations of the families that a plan is checked with, and what their parameters are by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ragmoe.models import RagmoeBertConfig

V, D, L, T_MAX = 200, 64, 3, 128
_BASE = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "max_position_embeddings": T_MAX}
_EIGHT = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_READER = {"num_attention_heads": 4, "intermediate_size": 256, "neighbour_width": 32, "gate_width": 16, "neighbours": 3}
_READER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_length": 64, "sparse_layers": [0, 2]}

FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160},
    "bert": {
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "mixtral": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160, "num_local_experts": 4},
    "qwen3_moe": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "intermediate_size": 160,
        "num_experts": 8,
        "mlp_only_layers": [1],
        **_EIGHT,
    },
    "olmoe": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "deepseek_v3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 160,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        **_EIGHT,
    },
    "ragmoe_bert": {**_READER, "experts": 4, "top_k": 2, "expert_rank": 8},
}
FIELDS = {name: {"model_type": name, **_BASE, **fields, **_TOKENS} for name, fields in FIELDS.items()}
FIELDS["ragmoe_bert-ffn"] = {**FIELDS["ragmoe_bert"], "expert_kind": "ffn"}
FIELDS["ragmoe_bert-shared"] = {**FIELDS["ragmoe_bert-ffn"], "shared_expert": True}


def _decoder(attention: int, layers: int, norms: int = 2) -> int:
    """What a decoder has around its feed-forward networks: embedding, head, attention, norms."""
    return 2 * V * D + L * attention + (norms * L + 1) * D + layers


def _mixtral(experts: int) -> int:
    return _decoder(D * (64 + 32 + 32 + 64), L * (4 * D + experts * 3 * D * 160))


def _qwen3_moe(experts: int) -> int:
    """Queries of 4 x 24, keys of 2 x 24, each normed by head; the second layer is dense."""
    return _decoder(D * (96 + 48 + 48 + 96) + 2 * 24, 2 * (8 * D + experts * 3 * D * 48) + 3 * D * 160)


def _olmoe(experts: int) -> int:
    """Norms of all queries and of all keys."""
    return _decoder(D * (64 + 32 + 32 + 64) + 64 + 32, L * (8 * D + experts * 3 * D * 48))


def _deepseek_v3(experts: int) -> int:
    """Latent attention; a dense first layer; a shared network of twice an expert's width; the bias is no parameter."""
    queries = D * 24 + 24 + 24 * 4 * (16 + 8)
    keys_values = D * (16 + 8) + 16 + 16 * 4 * (16 + 12)
    sparse = 8 * D + experts * 3 * D * 48 + 3 * D * 96
    return _decoder(queries + keys_values + 4 * 12 * D, 3 * D * 160 + 2 * sparse)


def _reader(sparse_layer: int, dense_layers: int) -> int:
    """A BERT with a head of 2 + 4 outputs; the gate has W_t, W_c, three projections, a null key and a scale."""
    around = (V + T_MAX + 2) * D + 2 * D + 6 * (D + 1)
    layer = 4 * (D * D + D) + 4 * D
    gate = 4 * D + 4 * 16 + 16 * (D + 32 + 32) + 16 + 1
    dense = 2 * D * 256 + 256 + D
    return around + L * layer + dense_layers * dense + 2 * (gate + sparse_layer)


# Of so many experts: of all for the total, of K for the active ones.
BY_HAND: dict[str, tuple[Callable[[int], int], int, int]] = {
    "mixtral": (_mixtral, 4, 2),
    "qwen3_moe": (_qwen3_moe, 8, 2),
    "olmoe": (_olmoe, 8, 3),
    "deepseek_v3": (_deepseek_v3, 8, 2),
    "ragmoe_bert": (lambda experts: _reader(experts * 2 * 8 * (D + 256), 3), 4, 2),
    "ragmoe_bert-ffn": (lambda experts: _reader(experts * (2 * D * 256 + 256 + D), 1), 4, 2),
    "ragmoe_bert-shared": (lambda experts: _reader(experts * (2 * D * 256 + 256 + D), 3), 4, 2),
}


def real(name: str) -> Any:
    """The model with its weights, as transformers makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    from ragmoe.models import RagmoeBertForQuestionAnswering

    fields = {key: value for key, value in FIELDS[name].items() if key != "model_type"}
    if name.startswith("ragmoe"):
        return RagmoeBertForQuestionAnswering(RagmoeBertConfig(**fields))
    config = AutoConfig.for_model(name, **fields)
    return (AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM).from_config(config)
