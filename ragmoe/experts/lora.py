"""LoRA experts: a shared dense feed-forward network and E low-rank deltas on both its matrices, inside the activation.

    expert_e(x) = (W_down + B'_e A'_e) act((W_up + B_e A_e) x + b_up) + b_down

They are cheap to add, version and swap; with ``B = 0`` they are the dense network exactly, which is also what answers
where no expert is available. S tokens, D model width, H hidden width, E experts, K chosen, P = S*K, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ragmoe._errors import ConfigError
from ragmoe.experts.base import Experts, FeedForward, MergedExpert, held_experts, register_experts
from ragmoe.experts.low_rank import low_rank, mean_product
from ragmoe.experts.rows import Pairs, dispatch
from ragmoe.gates.routing import Routing

# (x_PD, a_EDr, b_ErH): the rows of all pairs times the two matrices of the expert of each.
_RowProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


@register_experts("lora")
class LoraExperts(Experts):
    """E pairs of low-rank deltas through ``torch.nn.functional.grouped_mm``.

    The first matrix product is shared by all K experts of a token, and so is the last: experts differ by what they
    add before the activation and after it, so the cost over a dense network is K activations and the low-rank part.

    ``config.expert_rank`` is a multiple of 8 (grouped products want strides of 16 bytes).
    """

    # How many numbers the first matrix makes for each one that the activation leaves.
    halves: ClassVar[int] = 1
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
        self.up_b = nn.Parameter(torch.empty(experts, rank, self.halves * hidden))
        self.down_a = nn.Parameter(torch.empty(experts, hidden, rank))
        self.down_b = nn.Parameter(torch.empty(experts, rank, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for a in (self.up_a, self.down_a):
            init.uniform_(a, -1 / math.sqrt(a.shape[1]), 1 / math.sqrt(a.shape[1]))
        for b in (self.up_b, self.down_b):
            init.zeros_(b)

    def copy_dense(self, up: nn.Linear, down: nn.Linear, *, noise: float, generator: torch.Generator) -> float:
        if noise:
            raise ConfigError(f"expert_noise is {noise}, but LoRA experts differ from the start: expected 0")
        return 0.0

    def forward(self, x_SD: Tensor, routing: Routing, dense: FeedForward | None) -> Tensor:
        pairs = Pairs(routing.experts_SK, self.experts, partial=self.partial)

        def product(x_PD: Tensor, a_EDr: Tensor, b_ErH: Tensor) -> Tensor:
            return low_rank(x_PD, a_EDr, b_ErH, pairs.offsets_E)

        return self._mix(x_SD, routing, dense, pairs, product)

    def in_passes(
        self, x_SD: Tensor, routing: Routing, dense: FeedForward | None, passes: Iterable[tuple[Tensor, Tensor]]
    ) -> Tensor:
        pairs = Pairs(routing.experts_SK, routing.logits_SE.shape[1], partial=self.partial)

        def product(x_PD: Tensor, a_EDr: Tensor, b_ErH: Tensor) -> Tensor:
            y_PH = x_PD.new_zeros(len(x_PD), b_ErH.shape[-1])
            for pairs_p, experts_p in passes:
                here = dispatch(experts_p, self.experts)
                row_p = pairs.rows_of(pairs_p)[here.order_P]
                y_PH[row_p] = low_rank(x_PD[row_p], a_EDr, b_ErH, here.offsets_E)
            return y_PH

        return self._mix(x_SD, routing, dense, pairs, product)

    def _mix(
        self, x_SD: Tensor, routing: Routing, dense: FeedForward | None, pairs: Pairs, product: _RowProduct
    ) -> Tensor:
        """The dense network with what the experts add before the activation and after it."""
        assert dense is not None
        weights_SK = self.kept_weights(routing)
        up_SH = dense.up(x_SD)
        delta_PH = product(pairs.gather(x_SD), self.up_a, self.up_b)
        act_PH = dense.act(delta_PH.add_(pairs.gather(up_SH)))
        # Written as differences, so that untrained experts leave the dense network's answer bit for bit.
        if self.sums_to_one:
            mixed_SH = pairs.blend(act_PH, weights_SK)
        else:
            act_SH = dense.act(up_SH)
            mixed_SH = act_SH + pairs.combine_changes(act_PH, act_SH, weights_SK)
        low_SD = pairs.combine(product(act_PH, self.down_a, self.down_b), weights_SK)
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
            product = mean_product([(expert[a], expert[b]) for expert in experts], weights)
            tensors |= {a: product.a, b: product.b}
            norm, kept = norm + product.norm**2, kept + product.kept**2
        return MergedExpert(tensors, math.sqrt(norm), math.sqrt(kept))


class LoraGluExperts(LoraExperts):
    """LoRA experts of a gated network: one delta on its two first matrices, which are one, and one on its last.

    ``expert_e(x) = (W_down + B'_e A'_e) (act(g) * u)``, with g and u the halves of ``([W_gate; W_up] + B_e A_e) x``.
    """

    halves = 2
