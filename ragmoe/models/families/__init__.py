"""Decoders of Hugging Face with gates that see neighbours: one small file a family, what they share in shared.py.

model = AutoModelForCausalLM.from_pretrained("runs/mixtral-retrieval")
neighbours = index.neighbours(prompts)
model.generate(**tokenizer(prompts, return_tensors="pt"), **neighbours.tensors())
"""

from __future__ import annotations

from typing import Any

from ragmoe.models.families.config import RoutingConfig
from ragmoe.models.families.glm4_moe import RagmoeGlm4MoeConfig, RagmoeGlm4MoeForCausalLM, RagmoeGlm4MoeModel
from ragmoe.models.families.mixtral import RagmoeMixtralConfig, RagmoeMixtralForCausalLM, RagmoeMixtralModel
from ragmoe.models.families.olmoe import RagmoeOlmoeConfig, RagmoeOlmoeForCausalLM, RagmoeOlmoeModel
from ragmoe.models.families.qwen3_moe import RagmoeQwen3MoeConfig, RagmoeQwen3MoeForCausalLM, RagmoeQwen3MoeModel
from ragmoe.models.families.shared import CausalLMOutput, DecoderForCausalLM

# By the model type of the family whose checkpoints they read as they are.
FAMILIES: dict[str, Any] = {
    "mixtral": RagmoeMixtralForCausalLM,
    "qwen3_moe": RagmoeQwen3MoeForCausalLM,
    "olmoe": RagmoeOlmoeForCausalLM,
    "glm4_moe": RagmoeGlm4MoeForCausalLM,
}

__all__ = [
    "FAMILIES",
    "CausalLMOutput",
    "DecoderForCausalLM",
    "RagmoeGlm4MoeConfig",
    "RagmoeGlm4MoeForCausalLM",
    "RagmoeGlm4MoeModel",
    "RagmoeMixtralConfig",
    "RagmoeMixtralForCausalLM",
    "RagmoeMixtralModel",
    "RagmoeOlmoeConfig",
    "RagmoeOlmoeForCausalLM",
    "RagmoeOlmoeModel",
    "RagmoeQwen3MoeConfig",
    "RagmoeQwen3MoeForCausalLM",
    "RagmoeQwen3MoeModel",
    "RoutingConfig",
]
