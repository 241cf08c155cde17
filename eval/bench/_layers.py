"""The layers that moe_layer.py times against each other: ours, transformers' own blocks, dense networks.

S tokens, D model width, H hidden width, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from ragmoe.experts import AUTO, FeedForward
from ragmoe.models import RagmoeBertConfig
from ragmoe.moe import MoELayer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of LoRA experts, as the packaged reader has them.
RANK = 16


@dataclass(frozen=True)
class Case:
    """One size of layer, in one number format, on one device."""

    width: int
    hidden: int
    experts: int
    top_k: int
    tokens: int
    dtype: str
    device: str = "cpu"

    def __str__(self) -> str:
        sizes = f"D={self.width} H={self.hidden} E={self.experts} K={self.top_k} S={self.tokens}"
        return f"{sizes} {self.dtype} {self.device}"

    def input(self) -> Tensor:
        """Token states (1, S, D)."""
        return torch.randn(1, self.tokens, self.width, device=self.device, dtype=DTYPES[self.dtype])

    @property
    def product(self) -> float:
        """FLOPs of one matrix product between D and H for all pairs of token and expert."""
        return 2.0 * self.tokens * self.top_k * self.width * self.hidden


@dataclass(frozen=True)
class Contender:
    """A layer to be timed.

    Attributes:
        module: holds its parameters.
        forward: its answer to x (1, S, D).
        flops: of the matrix products of a forward pass; the gate is not counted.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    flops: float


def our_layer(case: Case, **settings: Any) -> MoELayer:
    """Our layer, none of whose parameters is zero.

    Args:
        settings: of ``RagmoeBertConfig``; the token gate and full experts unless they say otherwise.
    """
    sizes = {"hidden_size": case.width, "intermediate_size": case.hidden, "experts": case.experts, "top_k": case.top_k}
    chosen = {"gate": "token", "expert_kind": "ffn", "expert_rank": RANK, **settings}
    config = RagmoeBertConfig(**sizes, num_attention_heads=8, **chosen)
    config._experts_implementation = AUTO
    return _placed(case, lambda: MoELayer(config))


def full(case: Case) -> dict[str, Contender]:
    """Our layer of full experts, and the same by a loop over the experts."""
    layer = our_layer(case)
    kernels = {"ours": AUTO, "loop": "eager"}
    return {name: by_kernel(layer, kernel, 2 * case.product) for name, kernel in kernels.items()}


def gated(case: Case) -> dict[str, Contender]:
    """Our layer of gated experts by our kernel and by transformers', and transformers' block of the same weights.

    Mixtral's where H is above D, Qwen3-MoE's, whose experts are small, elsewhere.
    """
    layer: Any = our_layer(case, expert_kind="glu", hidden_act="silu")
    block: Any = _placed(case, lambda: _mixtral(case) if case.hidden > case.width else _qwen3(case))
    fused = layer.experts.fused
    block.gate.weight = layer.gate.token.weight
    block.experts.gate_up_proj, block.experts.down_proj = fused.gate_up_proj, fused.down_proj
    return {
        "gated": by_kernel(layer, AUTO, 3 * case.product),
        "gated, grouped_mm": by_kernel(layer, "grouped_mm", 3 * case.product),
        "transformers": Contender(block, block, 3 * case.product),
    }


def lora(case: Case) -> dict[str, Contender]:
    """Our layer of LoRA experts on a dense network, and that network by itself."""
    layer, network = our_layer(case, expert_kind="lora"), _network(case, case.hidden)
    feed_forward = FeedForward(network[0], F.gelu, network[2])
    shared = 2 * case.product / case.top_k
    own = 4.0 * case.tokens * case.top_k * RANK * (case.width + case.hidden)
    return {
        "LoRA": Contender(nn.ModuleList([layer, network]), lambda x: layer(x, feed_forward)[0], shared + own),
        "LoRA's dense": Contender(network, network, shared),
    }


def dense(case: Case) -> dict[str, Contender]:
    """A dense network of the FLOPs of K experts, for it is K times as wide."""
    network = _network(case, case.top_k * case.hidden)
    return {"dense": Contender(network, network, 2 * case.product)}


def check_equal(case: Case, contenders: dict[str, Contender], x: Tensor) -> None:
    """AssertionError unless what is compared answers the same; in half precision choices may differ by rounding."""
    if case.dtype != "fp32":
        return
    with torch.no_grad():
        for one, other in (("ours", "loop"), ("gated", "transformers")):
            if one in contenders:
                torch.testing.assert_close(
                    contenders[one].forward(x), contenders[other].forward(x), rtol=1e-3, atol=1e-4
                )


def by_kernel(layer: Any, kernel: str, flops: float) -> Contender:
    """Our layer of full or gated experts, run by an experts implementation of that name."""
    config = layer.experts.fused.config

    def forward(x: Tensor) -> Tensor:
        config._experts_implementation = kernel
        return layer(x, None)[0]

    return Contender(layer, forward, flops)


def _network(case: Case, hidden: int) -> nn.Sequential:
    return _placed(case, lambda: nn.Sequential(nn.Linear(case.width, hidden), nn.GELU(), nn.Linear(hidden, case.width)))


def _placed(case: Case, make: Callable[[], Any]) -> Any:
    with torch.device(case.device), torch.no_grad():
        module = make().to(DTYPES[case.dtype])
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module


def _mixtral(case: Case) -> nn.Module:
    config = MixtralConfig(
        hidden_size=case.width,
        intermediate_size=case.hidden,
        num_local_experts=case.experts,
        num_experts_per_tok=case.top_k,
        experts_implementation="grouped_mm",
    )
    return MixtralSparseMoeBlock(config)


def _qwen3(case: Case) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=case.width,
        moe_intermediate_size=case.hidden,
        num_experts=case.experts,
        num_experts_per_tok=case.top_k,
        norm_topk_prob=True,
        experts_implementation="grouped_mm",
    )
    return Qwen3MoeSparseMoeBlock(config)
