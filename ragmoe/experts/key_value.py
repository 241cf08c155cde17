"""Experts for the keys and values of attention: low-rank deltas on both projections.

S tokens, D model width, E experts, K chosen, r rank, V width of keys and of values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ragmoe.experts.low_rank import low_rank
from ragmoe.experts.rows import Pairs
from ragmoe.gates.routing import Routing


class KeyValueExperts(nn.Module):
    """``sum_k w_k x A_k B_k``, to be added to keys and values; ``B`` starts at zero, and nothing is added.

    Queries stay as they are, so that what a token looks for does not depend on its experts, only what it is found by.
    Source: Csordas et al. 2023 (SwitchHead), whose keys and values are mixtures too, as low-rank deltas here.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        E, D, r = config.experts, config.hidden_size, config.expert_rank
        self.experts = E
        self.a = nn.Parameter(torch.empty(E, D, r))
        self.b = nn.Parameter(torch.empty(E, r, 2 * D))

    def reset_parameters(self) -> None:
        """Start as nothing."""
        init.uniform_(self.a, -1 / math.sqrt(self.a.shape[1]), 1 / math.sqrt(self.a.shape[1]))
        init.zeros_(self.b)

    def forward(self, x_SD: Tensor, routing: Routing, weights_SK: Tensor, partial: bool) -> Tensor:
        """What is added to keys and values, side by side: (S, 2 V)."""
        pairs = Pairs(routing.experts_SK, self.experts, partial=partial)
        delta_PV = low_rank(pairs.gather(x_SD), self.a, self.b, pairs.offsets_E)
        return pairs.combine(delta_PV, weights_SK)
