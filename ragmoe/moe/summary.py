"""The neighbours' summary added to the token states: extra input without extra routing.

S tokens, D model width, A attention width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ragmoe.gates import NeighbourAttention
from ragmoe.neighbours import Neighbours


class NeighbourSummary(nn.Module):
    """``x + W c``, with ``c`` the attention of the token over the neighbours, as the retrieval gate has it.

    A control: whatever a gate gains by knowing the neighbours, a model that is simply told of them may gain as well.
    ``W`` starts at zero and there is no bias: at step 0, and without neighbours, nothing is added.
    """

    def __init__(self, width: int, neighbour_width: int, attention_width: int) -> None:
        super().__init__()
        self.attention = NeighbourAttention(width, neighbour_width, attention_width)
        # A parameter of its own, since transformers passes by modules that have none when it initialises.
        self.project = nn.Parameter(torch.zeros(width, attention_width))

    def reset_parameters(self) -> None:
        """Start as nothing."""
        init.zeros_(self.project)
        self.attention.reset_parameters()

    def forward(self, x_BTD: Tensor, neighbours: Neighbours | None) -> Tensor:
        """States of the same shape; ``neighbours`` are of as many questions as divide B."""
        if neighbours is None:
            return x_BTD
        found_SA = self.attention(x_BTD.reshape(-1, x_BTD.shape[-1]), neighbours)
        return x_BTD + F.linear(found_SA, self.project).view_as(x_BTD)
