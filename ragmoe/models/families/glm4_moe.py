"""GLM-4-MoE with a gate that sees neighbours: sigmoid scores, a balance bias, and a shared expert.

DeepSeek-V3 routes in the same way (DeepSeek-AI 2024, section 2.1.2).
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeDecoderLayer,
    Glm4MoeExperts,
    Glm4MoeForCausalLM,
    Glm4MoeMLP,
    Glm4MoeModel,
    Glm4MoeRMSNorm,
    Glm4MoeRotaryEmbedding,
    Glm4MoeTopkRouter,
)

from ragmoe._errors import ModelError
from ragmoe.gates import selection_class
from ragmoe.gates.selection import TopK
from ragmoe.models.families.config import RoutingConfig
from ragmoe.models.families.shared import DecoderForCausalLM, DecoderModel, NeighbourLayer, register_family
from ragmoe.moe.block import BlockParts, NeighbourGate


@strict
class RagmoeGlm4MoeConfig(RoutingConfig, Glm4MoeConfig):
    """GLM-4-MoE's configuration and what ``RoutingConfig`` adds."""

    model_type = "ragmoe_glm4_moe"
    attribute_map: ClassVar[dict[str, str]] = {**Glm4MoeConfig.attribute_map, "experts": "n_routed_experts"}

    scores: ClassVar[str] = "sigmoid"
    # Its dense layers are in the checkpoint from the start: none is upcycled.
    expert_kinds: ClassVar[tuple[str, ...]] = ("ffn",)

    @property
    def float_weights(self) -> bool:
        """Its own experts are handed their weights in float32."""
        return self.expert_kind == "ffn"

    @property
    def normalise_weights(self) -> bool:
        """Whether the weights of the chosen experts sum to one, before they are scaled."""
        return bool(self.norm_topk_prob) and super().normalise_weights

    @property
    def weight_scale(self) -> float:
        """What the experts' weights are multiplied with."""
        return float(self.routed_scaling_factor)

    def family_sparse_layers(self) -> list[int]:
        """All layers but the first ``first_k_dense_replace``."""
        return list(range(self.first_k_dense_replace, self.num_hidden_layers))

    @property
    def choice_groups(self) -> int:
        """Into how many groups the experts are divided, of which a token's are chosen from some alone."""
        return int(self.n_group)

    @property
    def chosen_groups(self) -> int:
        """From how many."""
        return int(self.topk_group)

    def check(self) -> None:
        super().check()
        if self.n_group == 1:
            return
        size, rest = divmod(self.experts, self.n_group)
        if rest or size < 2 or not 1 <= self.topk_group <= self.n_group:
            raise ModelError(
                f"{self.experts} experts in n_group = {self.n_group} groups, of which topk_group = {self.topk_group} "
                "are chosen: expected groups of one size, of two experts or more, and a choice of one group or more"
            )
        if self.topk_group * size < self.num_experts_per_tok:
            raise ModelError(
                f"a token takes {self.num_experts_per_tok} experts, but {self.topk_group} groups of {size} have fewer"
            )
        if not issubclass(selection_class(self.selection), TopK):
            raise ModelError(f"the selection {self.selection!r} knows no groups, and n_group is {self.n_group}")


class RagmoeGlm4MoeGate(NeighbourGate, Glm4MoeTopkRouter):
    """A gate of ragmoe, as GLM-4-MoE's."""


def _shared(config: Any) -> Glm4MoeMLP:
    return Glm4MoeMLP(config, intermediate_size=config.moe_intermediate_size * config.n_shared_experts)


class RagmoeGlm4MoeDecoderLayer(NeighbourLayer, Glm4MoeDecoderLayer):
    """GLM-4-MoE's layer, with neighbours."""

    parts = BlockParts(RagmoeGlm4MoeGate, Glm4MoeExperts, Glm4MoeMLP, _shared)


# GLM-4-MoE's own gate stays in float32, weight and product, whatever the model is in.
_IN_FP32 = ["balance_bias", "gate.inner"]


class RagmoeGlm4MoeModel(DecoderModel, Glm4MoeModel):
    """GLM-4-MoE without a head."""

    _keep_in_fp32_modules_strict: ClassVar[list[str]] = _IN_FP32
    config: RagmoeGlm4MoeConfig
    config_class = RagmoeGlm4MoeConfig
    _no_split_modules: ClassVar[list[str]] = ["RagmoeGlm4MoeDecoderLayer"]
    layer_class, norm_class, rotary_class = RagmoeGlm4MoeDecoderLayer, Glm4MoeRMSNorm, Glm4MoeRotaryEmbedding


class RagmoeGlm4MoeForCausalLM(DecoderForCausalLM, Glm4MoeForCausalLM):
    """GLM-4-MoE, the language model."""

    _keep_in_fp32_modules_strict: ClassVar[list[str]] = _IN_FP32
    config: RagmoeGlm4MoeConfig
    config_class = RagmoeGlm4MoeConfig
    model_class = RagmoeGlm4MoeModel


register_family(RagmoeGlm4MoeConfig, RagmoeGlm4MoeModel, RagmoeGlm4MoeForCausalLM, Glm4MoeConfig.model_type)
