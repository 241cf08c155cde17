"""Mixtral with a gate that sees neighbours; also what a dense Llama or Mistral is upcycled to."""

from __future__ import annotations

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import MixtralConfig
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralExperts,
    MixtralForCausalLM,
    MixtralModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    MixtralTopKRouter,
)

from ragmoe.models.families.config import RoutingConfig
from ragmoe.models.families.shared import DecoderForCausalLM, DecoderModel, NeighbourLayer, register_family
from ragmoe.moe.block import BlockParts, NeighbourGate


@strict
class RagmoeMixtralConfig(RoutingConfig, MixtralConfig):
    """Mixtral's configuration and what ``RoutingConfig`` adds."""

    model_type = "ragmoe_mixtral"
    attribute_map: ClassVar[dict[str, str]] = {**MixtralConfig.attribute_map, "experts": "num_local_experts"}

    @property
    def float_weights(self) -> bool:
        """Its own experts are handed their weights in float32."""
        return self.expert_kind == "ffn"


class RagmoeMixtralGate(NeighbourGate, MixtralTopKRouter):
    """A gate of ragmoe, as Mixtral's."""


class RagmoeMixtralDecoderLayer(NeighbourLayer, MixtralDecoderLayer):
    """Mixtral's layer, with neighbours."""

    parts = BlockParts(RagmoeMixtralGate, MixtralExperts, MistralMLP)


class RagmoeMixtralModel(DecoderModel, MixtralModel):
    """Mixtral without a head."""

    config: RagmoeMixtralConfig
    config_class = RagmoeMixtralConfig
    _no_split_modules: ClassVar[list[str]] = ["RagmoeMixtralDecoderLayer"]
    layer_class, norm_class, rotary_class = RagmoeMixtralDecoderLayer, MixtralRMSNorm, MixtralRotaryEmbedding


class RagmoeMixtralForCausalLM(DecoderForCausalLM, MixtralForCausalLM):
    """Mixtral, the language model."""

    config: RagmoeMixtralConfig
    config_class = RagmoeMixtralConfig
    model_class = RagmoeMixtralModel


register_family(RagmoeMixtralConfig, RagmoeMixtralModel, RagmoeMixtralForCausalLM, MixtralConfig.model_type)
