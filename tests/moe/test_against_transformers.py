"""Our layer against transformers' own blocks: the same weights, the same outputs, the same gradients."""

from __future__ import annotations

import pytest
import torch
from layer_config import layer_config
from torch import Tensor, nn
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from ragmoe.moe import MoELayer

D, H, E, K = 16, 24, 6, 2
SIZES = {"hidden_size": D, "num_experts_per_tok": K, "num_hidden_layers": 1, "num_attention_heads": 2}
OURS = {"hidden_size": D, "intermediate_size": H, "experts": E, "top_k": K, "expert_kind": "glu", "hidden_act": "silu"}


def mixtral(kernel: str) -> nn.Module:
    config = MixtralConfig(**SIZES, intermediate_size=H, num_local_experts=E, experts_implementation=kernel)
    return MixtralSparseMoeBlock(config)


def qwen3(kernel: str, normalise: bool) -> nn.Module:
    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=H, num_experts=E, norm_topk_prob=normalise, experts_implementation=kernel
    )
    return Qwen3MoeSparseMoeBlock(config)


def olmoe(kernel: str) -> nn.Module:
    config = OlmoeConfig(**SIZES, intermediate_size=H, num_experts=E, experts_implementation=kernel)
    return OlmoeSparseMoeBlock(config)


CASES = {
    "mixtral": (mixtral, {}),
    "qwen3": (lambda kernel: qwen3(kernel, True), {"normalise_weights": True}),
    "qwen3-unnormalised": (lambda kernel: qwen3(kernel, False), {"normalise_weights": False}),
    "olmoe": (olmoe, {"normalise_weights": False}),
}


def shaken(module: nn.Module) -> nn.Module:
    """None of its parameters is zero or uninitialised memory."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


def answers(module: nn.Module, y_BTD: Tensor, x_BTD: Tensor, of: list[nn.Parameter]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, y_BTD.numel()).view_as(y_BTD)
    return [y_BTD, *torch.autograd.grad((y_BTD * weight).sum(), [x_BTD, *of])]


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str, kernel: str) -> None:
    build, changes = CASES[name]
    theirs = shaken(build(kernel))
    ours = MoELayer(layer_config(**{**OURS, **changes, "_experts_implementation": kernel}))
    pairs = [
        (ours.gate.token.weight, theirs.gate.weight),
        (ours.experts.fused.gate_up_proj, theirs.experts.gate_up_proj),
        (ours.experts.fused.down_proj, theirs.experts.down_proj),
    ]
    with torch.no_grad():
        for own, their in pairs:
            own.copy_(their)
    x_BTD = torch.randn(3, 7, D)
    one, two = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
    got = answers(ours, ours(one, None)[0], one, [own for own, _ in pairs])
    want = answers(theirs, theirs(two), two, [their for _, their in pairs])
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_sigmoid_scores_with_a_bias_and_a_shared_expert_as_deepseek_has_them() -> None:
    config = DeepseekV3Config(
        **SIZES, moe_intermediate_size=H, n_routed_experts=E, n_shared_experts=1, n_group=1, topk_group=1,
        norm_topk_prob=True, routed_scaling_factor=2.5, experts_implementation="eager",
    )  # fmt: skip
    theirs = shaken(DeepseekV3MoE(config))
    changes = {"scores": "sigmoid", "weight_scale": 2.5, "_experts_implementation": "eager"}
    ours = MoELayer(layer_config(**{**OURS, **changes}))
    bias_E = torch.randn(E) * 0.2
    theirs.gate.e_score_correction_bias.copy_(bias_E)
    ours.gate.balance_bias.copy_(bias_E)
    pairs = [
        (ours.gate.token.weight, theirs.gate.weight),
        (ours.experts.fused.gate_up_proj, theirs.experts.gate_up_proj),
        (ours.experts.fused.down_proj, theirs.experts.down_proj),
    ]
    with torch.no_grad():
        for own, their in pairs:
            own.copy_(their)
    x_BTD = torch.randn(3, 7, D)
    one, two = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
    got = answers(ours, ours(one, theirs.shared_experts)[0], one, [own for own, _ in pairs])
    want = answers(theirs, theirs(two), two, [their for _, their in pairs])
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
