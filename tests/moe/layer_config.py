"""What a layer wants to know, as a model's configuration has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

SETTINGS = {
    "hidden_size": 16, "intermediate_size": 32, "experts": 4, "top_k": 2, "gate": "token", "expert_kind": "ffn",
    "expert_rank": 8, "hidden_act": "gelu", "initializer_range": 0.02, "shared_expert": False, "moe_attention": False,
    "neighbour_width": 8, "gate_width": 8, "gate_noise": 0.0, "gate_jitter": 0.0, "token_dropout": 0.0,
    "normalise_weights": None, "scores": "softmax", "selection": "top_k", "weight_scale": 1.0, "common_experts": 0,
    "vote_start": 0.0, "expert_groups": 1, "expert_types": None, "capacity_factor": None, "overflow": "drop",
    "overflow_priority": "position", "_experts_implementation": "eager",
}  # fmt: skip


def layer_config(**changes: Any) -> SimpleNamespace:
    """A small layer with some settings changed."""
    return SimpleNamespace(**{**SETTINGS, **changes})
