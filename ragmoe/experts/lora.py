"""LoRA experts: a shared dense feed-forward network and E low-rank deltas on both its matrices, inside the activation.

    expert_e(x) = (W_down + B'_e A'_e) act((W_up + B_e A_e) x + b_up) + b_down

They are cheap to add, version and swap; with ``B = 0`` they are the dense network exactly, which is also what answers
where no expert is available. S tokens, D model width, H hidden width, E experts, K chosen, P = S*K, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    held_experts,
    permute_rows,
    register_experts,
)
from ragmoe.gates.base import Routing

# (x_PD, a_EDr, b_ErH): the rows of all pairs times the two matrices of the expert of each.
_RowProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


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
            held_experts(config),
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
        def product(x_PD: Tensor, a_EDr: Tensor, b_ErH: Tensor) -> Tensor:
            return _low_rank(x_PD, a_EDr, b_ErH, at)

        at = dispatch(routing.experts_SK, self.experts)
        return self._mix(x_SD, routing.weights_SK, dense, product)

    def in_passes(
        self, x_SD: Tensor, routing: Routing, dense: FeedForward | None, passes: Iterable[tuple[Tensor, Tensor]]
    ) -> Tensor:
        def product(x_PD: Tensor, a_EDr: Tensor, b_ErH: Tensor) -> Tensor:
            y_PH = x_PD.new_zeros(len(x_PD), b_ErH.shape[-1])
            for pairs_p, experts_p in passes:
                y_PH[pairs_p] = _low_rank(x_PD[pairs_p], a_EDr, b_ErH, dispatch(experts_p, self.experts))
            return y_PH

        return self._mix(x_SD, routing.weights_SK, dense, product)

    def _mix(self, x_SD: Tensor, weights_SK: Tensor, dense: FeedForward | None, product: _RowProduct) -> Tensor:
        """The dense network with what the experts add before the activation and after it."""
        assert dense is not None
        S, K = weights_SK.shape
        up_SH = dense.up(x_SD)
        act_SH = dense.act(up_SH)
        delta_SKH = product(_repeat(x_SD, K), self.up_a, self.up_b).view(S, K, -1)
        act_SKH = dense.act(up_SH.unsqueeze(1) + delta_SKH)

        # Written as a difference, so that untrained experts leave the dense network's answer bit for bit.
        weights_SK1 = weights_SK.unsqueeze(-1)
        mixed_SH = act_SH + ((act_SKH - act_SH.unsqueeze(1)) * weights_SK1).sum(dim=1)
        low_SKD = product(act_SKH.view(S * K, -1), self.down_a, self.down_b).view(S, K, -1)
        return dense.down(mixed_SH) + (low_SKD * weights_SK1).sum(dim=1)

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


def _repeat(x_SD: Tensor, K: int) -> Tensor:
    """Each row K times in a row, as contiguous memory (grouped products take no expanded tensors)."""
    return x_SD.unsqueeze(1).expand(-1, K, -1).reshape(-1, x_SD.shape[1])


def _low_rank(x_PD: Tensor, a_EDr: Tensor, b_ErH: Tensor, at: Dispatch) -> Tensor:
    """``x A B``, each row with the matrices of its own expert."""
    x_PD = permute_rows(x_PD, at.order_P, at.back_P)
    inner_Pr = F.grouped_mm(x_PD, a_EDr.to(x_PD.dtype), offs=at.offsets_E)
    outer_PH = F.grouped_mm(inner_Pr, b_ErH.to(x_PD.dtype), offs=at.offsets_E)
    return permute_rows(outer_PH, at.back_P, at.order_P)
