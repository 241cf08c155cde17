"""Qwen3-MoE with a gate that sees neighbours; also what a dense Qwen3 is upcycled to."""

from __future__ import annotations

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeExperts,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeTopKRouter,
)

from ragmoe.models.families.config import RoutingConfig
from ragmoe.models.families.shared import DecoderForCausalLM, DecoderModel, NeighbourLayer, register_family
from ragmoe.moe.block import BlockParts, NeighbourGate


@strict
class RagmoeQwen3MoeConfig(RoutingConfig, Qwen3MoeConfig):
    """Qwen3-MoE's configuration and what ``RoutingConfig`` adds."""

    model_type = "ragmoe_qwen3_moe"
    attribute_map: ClassVar[dict[str, str]] = {**Qwen3MoeConfig.attribute_map, "experts": "num_local_experts"}

    @property
    def normalise_weights(self) -> bool:
        """Whether the weights of the chosen experts sum to one; by the family's own default they do not."""
        return bool(self.norm_topk_prob) and super().normalise_weights

    def family_sparse_layers(self) -> list[int]:
        """The layers that are sparse by ``decoder_sparse_step`` and ``mlp_only_layers``."""
        step, dense = self.decoder_sparse_step, self.mlp_only_layers
        return [i for i in range(self.num_hidden_layers) if i not in dense and (i + 1) % step == 0]


class RagmoeQwen3MoeGate(NeighbourGate, Qwen3MoeTopKRouter):
    """A gate of ragmoe, as Qwen3-MoE's."""


class RagmoeQwen3MoeDecoderLayer(NeighbourLayer, Qwen3MoeDecoderLayer):
    """Qwen3-MoE's layer, with neighbours."""

    parts = BlockParts(RagmoeQwen3MoeGate, Qwen3MoeExperts, Qwen3MoeMLP)


class RagmoeQwen3MoeModel(DecoderModel, Qwen3MoeModel):
    """Qwen3-MoE without a head."""

    config: RagmoeQwen3MoeConfig
    config_class = RagmoeQwen3MoeConfig
    _no_split_modules: ClassVar[list[str]] = ["RagmoeQwen3MoeDecoderLayer"]
    layer_class, norm_class, rotary_class = RagmoeQwen3MoeDecoderLayer, Qwen3MoeRMSNorm, Qwen3MoeRotaryEmbedding


class RagmoeQwen3MoeForCausalLM(DecoderForCausalLM, Qwen3MoeForCausalLM):
    """Qwen3-MoE, the language model."""

    config: RagmoeQwen3MoeConfig
    config_class = RagmoeQwen3MoeConfig
    model_class = RagmoeQwen3MoeModel


register_family(RagmoeQwen3MoeConfig, RagmoeQwen3MoeModel, RagmoeQwen3MoeForCausalLM, Qwen3MoeConfig.model_type)
