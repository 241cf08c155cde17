"""LoRA experts: a shared dense feed-forward network and E low-rank deltas on both its matrices, inside the activation.

    expert_e(x) = (W_down + B'_e A'_e) act((W_up + B_e A_e) x + b_up) + b_down

They are cheap to add, version and swap; with ``B = 0`` they are the dense network exactly, which is also what answers
where no expert is available. S tokens, D model width, H hidden width, E experts, K chosen, P = S*K, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ragmoe._errors import ConfigError
from ragmoe.experts.base import (
    Dispatch,
    Experts,
    FeedForward,
    MergedExpert,
    dispatch,
    permute_rows,
    register_experts,
)
from ragmoe.gates.routing import Routing


@register_experts("lora")
class LoraExperts(Experts):
    """E pairs of low-rank deltas through ``torch.nn.functional.grouped_mm``.

    The first matrix product is shared by all K experts of a token, and so is the last: experts differ by what they
    add before the activation and after it, so the cost over a dense network is K activations and the low-rank part.

    ``config.expert_rank`` is a multiple of 8 (grouped products want strides of 16 bytes).
    """

    needs_dense = True
    has_rank = True
    summary = "low-rank deltas on a shared feed-forward network; small, and dense when untrained"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width, hidden, experts, rank = (
            config.hidden_size,
            config.intermediate_size,
            config.experts,
            config.expert_rank,
        )
        if rank < 8 or rank % 8:
            raise ConfigError(f"expert rank is {rank}: expected a positive multiple of 8")
        self.experts = experts
        self.up_a = nn.Parameter(torch.empty(experts, width, rank))
        self.up_b = nn.Parameter(torch.empty(experts, rank, hidden))
        self.down_a = nn.Parameter(torch.empty(experts, hidden, rank))
        self.down_b = nn.Parameter(torch.empty(experts, rank, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for a in (self.up_a, self.down_a):
            init.uniform_(a, -1 / math.sqrt(a.shape[1]), 1 / math.sqrt(a.shape[1]))
        for b in (self.up_b, self.down_b):
            init.zeros_(b)

    def copy_dense(self, up: nn.Linear, down: nn.Linear, *, noise: float, generator: torch.Generator) -> float:
        if noise:
            raise ConfigError(f"expert_noise is {noise}, but LoRA experts differ from the start: expected 0")
        return 0.0

    def forward(self, x_SD: Tensor, routing: Routing, dense: FeedForward | None) -> Tensor:
        assert dense is not None
        S, K = routing.experts_SK.shape
        rows = dispatch(routing.experts_SK, self.experts)
        offsets_E = rows.offsets_E
        move = _Partial(rows) if self.partial else _Whole(rows)
        up_SH = dense.up(x_SD)
        act_SH = dense.act(up_SH)

        x_PD = move.to_experts(_repeat(x_SD, K))
        delta_PH = _low_rank(x_PD, self.up_a, self.up_b, offsets_E)
        delta_SKH = move.to_tokens(delta_PH).view(S, K, -1)
        act_SKH = dense.act(up_SH.unsqueeze(1) + delta_SKH)

        # Written as a difference, so that untrained experts leave the dense network's answer bit for bit.
        weights_SK = routing.weights_SK
        if self.partial:
            weights_SK = weights_SK.masked_fill(routing.experts_SK == self.experts, 0.0)
        weights_SK1 = weights_SK.unsqueeze(-1)
        mixed_SH = act_SH + ((act_SKH - act_SH.unsqueeze(1)) * weights_SK1).sum(dim=1)

        act_PH = move.to_experts(act_SKH.view(S * K, -1))
        low_PD = _low_rank(act_PH, self.down_a, self.down_b, offsets_E)
        low_SKD = move.to_tokens(low_PD).view(S, K, -1)
        low_SD = (low_SKD * weights_SK1).sum(dim=1)
        if not self.drops:
            return dense.down(mixed_SH) + low_SD
        # What is lost leaves the dense network's share of it too; its bias is what it answers to nothing.
        lost_S1 = (routing.weights_SK - weights_SK).sum(dim=1, keepdim=True)
        bias_1D = dense.down(mixed_SH.new_zeros(1, mixed_SH.shape[1]))
        return dense.down(mixed_SH - lost_S1 * act_SH) - lost_S1 * bias_1D + low_SD

    @classmethod
    def merge(cls, experts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> MergedExpert:
        """The best rank-r approximation of the weighted mean of the products ``A B`` (Eckart and Young 1936).

        The mean of the factors would be another matrix: its cross terms belong to no expert. What the activation
        between both deltas makes of them is not averaged.
        """
        tensors: dict[str, Tensor] = {}
        norm = kept = 0.0
        for side in ("up", "down"):
            a, b = f"{side}_a", f"{side}_b"
            product = _mean_product([(expert[a], expert[b]) for expert in experts], weights)
            tensors |= {a: product.a, b: product.b}
            norm, kept = norm + product.norm**2, kept + product.kept**2
        return MergedExpert(tensors, math.sqrt(norm), math.sqrt(kept))


class _Product(NamedTuple):
    a: Tensor
    b: Tensor
    norm: float
    kept: float


def _mean_product(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> _Product:
    """Factors of the mean of products, cut to the rank of the first, through QR: the products are never made."""
    dtype, rank = factors[0][0].dtype, factors[0][0].shape[-1]
    left = torch.cat([weight * a.double() for (a, _), weight in zip(factors, weights, strict=True)], dim=1)
    right = torch.cat([b.double() for _, b in factors], dim=0)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    if not s.any():
        # Untrained: with A and B both zero it could never learn.
        return _Product(factors[0][0].clone(), torch.zeros_like(factors[0][1]), 0.0, 0.0)
    root = s[:rank].sqrt()
    a, b = q_left @ u[:, :rank] * root, root.unsqueeze(1) * (v[:rank] @ q_right.T)
    norm, kept = (float(x.square().sum().sqrt()) for x in (s, s[:rank]))
    return _Product(a.to(dtype).contiguous(), b.to(dtype).contiguous(), norm, kept)


class _Whole:
    """Rows of pairs from tokens to experts and back, where every pair is served."""

    def __init__(self, rows: Dispatch) -> None:
        self.order_P, self.back_P, _ = rows

    def to_experts(self, x_PD: Tensor) -> Tensor:
        return permute_rows(x_PD, self.order_P, self.back_P)

    def to_tokens(self, x_PD: Tensor) -> Tensor:
        return permute_rows(x_PD, self.back_P, self.order_P)


class _Partial:
    """The same where some are not: they stay behind, and come back as zeros."""

    def __init__(self, rows: Dispatch) -> None:
        self.pairs = rows.order_P.numel()
        self.order_P = rows.order_P[: int(rows.offsets_E[-1])]

    def to_experts(self, x_PD: Tensor) -> Tensor:
        return x_PD.index_select(0, self.order_P)

    def to_tokens(self, x_PD: Tensor) -> Tensor:
        return x_PD.new_zeros(self.pairs, x_PD.shape[1]).index_copy(0, self.order_P, x_PD)


def _repeat(x_SD: Tensor, K: int) -> Tensor:
    """Each row K times in a row, as contiguous memory (grouped products take no expanded tensors)."""
    return x_SD.unsqueeze(1).expand(-1, K, -1).reshape(-1, x_SD.shape[1])


def _low_rank(x_PD: Tensor, a_EDr: Tensor, b_ErH: Tensor, offsets_E: Tensor) -> Tensor:
    inner_Pr = F.grouped_mm(x_PD, a_EDr.to(x_PD.dtype), offs=offsets_E)
    return F.grouped_mm(inner_Pr, b_ErH.to(x_PD.dtype), offs=offsets_E)
