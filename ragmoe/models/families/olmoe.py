"""OLMoE with a gate that sees neighbours."""

from __future__ import annotations

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeDecoderLayer,
    OlmoeExperts,
    OlmoeForCausalLM,
    OlmoeMLP,
    OlmoeModel,
    OlmoeRMSNorm,
    OlmoeRotaryEmbedding,
    OlmoeTopKRouter,
)

from ragmoe.models.families.config import RoutingConfig
from ragmoe.models.families.shared import DecoderForCausalLM, DecoderModel, NeighbourLayer, register_family
from ragmoe.moe.block import BlockParts, NeighbourGate


@strict
class RagmoeOlmoeConfig(RoutingConfig, OlmoeConfig):
    """OLMoE's configuration and what ``RoutingConfig`` adds."""

    model_type = "ragmoe_olmoe"
    attribute_map: ClassVar[dict[str, str]] = {**OlmoeConfig.attribute_map, "experts": "num_experts"}

    @property
    def normalise_weights(self) -> bool:
        """Whether the weights of the chosen experts sum to one; by the family's own default they do not."""
        return bool(self.norm_topk_prob) and super().normalise_weights


class RagmoeOlmoeGate(NeighbourGate, OlmoeTopKRouter):
    """A gate of ragmoe, as OLMoE's."""


class RagmoeOlmoeDecoderLayer(NeighbourLayer, OlmoeDecoderLayer):
    """OLMoE's layer, with neighbours."""

    parts = BlockParts(RagmoeOlmoeGate, OlmoeExperts, OlmoeMLP)


class RagmoeOlmoeModel(DecoderModel, OlmoeModel):
    """OLMoE without a head."""

    config: RagmoeOlmoeConfig
    config_class = RagmoeOlmoeConfig
    _no_split_modules: ClassVar[list[str]] = ["RagmoeOlmoeDecoderLayer"]
    layer_class, norm_class, rotary_class = RagmoeOlmoeDecoderLayer, OlmoeRMSNorm, OlmoeRotaryEmbedding


class RagmoeOlmoeForCausalLM(DecoderForCausalLM, OlmoeForCausalLM):
    """OLMoE, the language model."""

    config: RagmoeOlmoeConfig
    config_class = RagmoeOlmoeConfig
    model_class = RagmoeOlmoeModel


register_family(RagmoeOlmoeConfig, RagmoeOlmoeModel, RagmoeOlmoeForCausalLM, OlmoeConfig.model_type)
