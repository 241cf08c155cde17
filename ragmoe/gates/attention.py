"""Attention of tokens over the neighbours of their question: what the retrieval gate routes by.

S tokens of B questions, N neighbours, R encoder width, A attention width, V width of what else the neighbours carry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ragmoe.neighbours import Neighbours


class NeighbourAttention(nn.Module):
    """Each token attends over the neighbours of its question, beside a *null neighbour* to fall back on.

    The null neighbour has a learned key and a value fixed at zero, and there is no bias: without neighbours the result
    is zero, whatever was learned. Keys and values are made once for a question, not once for a token. The retrieval
    score joins the attention through a learned scale that starts at zero.

    Args:
        width: D, of the token states.
        neighbour_width: R, of the neighbours' embeddings.
        attention_width: A, of queries, keys, values and the result.
    """

    def __init__(self, width: int, neighbour_width: int, attention_width: int) -> None:
        super().__init__()
        self.width = attention_width
        self.scale = math.sqrt(neighbour_width)
        self.query = nn.Linear(width, attention_width, bias=False)
        self.key = nn.Linear(neighbour_width, attention_width, bias=False)
        self.value = nn.Linear(neighbour_width, attention_width, bias=False)
        self.null_key = nn.Parameter(torch.zeros(attention_width))
        self.score_scale = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """Set what must not start random."""
        init.zeros_(self.score_scale)
        init.zeros_(self.null_key)

    def key_values(self, neighbours: Neighbours, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the neighbours, (B, N, A) each: they depend on nothing else, and serve any tokens.

        Args:
            dtype: of the token states they will be used with.
        """
        # Unit vectors of width R have entries of size 1/sqrt(R); linear layers want entries of size one.
        embeddings_BNR = neighbours.embeddings_BNR.to(dtype) * self.scale
        return self.key(embeddings_BNR), self.value(embeddings_BNR)

    def forward(
        self,
        x_SD: Tensor,
        neighbours: Neighbours,
        beside_BNV: Tensor | None = None,
        prepared: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What each token finds, c_SA.

        Args:
            x_SD: token states; those of one question are consecutive.
            beside_BNV: values that are averaged by the same attention; their V columns follow those of c.
            prepared: what ``key_values`` made of these neighbours before; None makes it now.
        """
        B, A = len(neighbours), self.width
        query_BTA = self.query(x_SD).view(B, -1, A)
        key_BNA, value_BNV = self.key_values(neighbours, x_SD.dtype) if prepared is None else prepared
        key_BNA = torch.cat([self.null_key.expand(B, 1, A), key_BNA], dim=1)
        if beside_BNV is not None:
            value_BNV = torch.cat([value_BNV, beside_BNV.to(x_SD.dtype)], dim=-1)
        value_BNV = F.pad(value_BNV, (0, 0, 1, 0))
        bias_BN = (self.score_scale * neighbours.scores_BN.to(x_SD.dtype)).masked_fill(~neighbours.mask_BN, -torch.inf)
        bias_BN = F.pad(bias_BN, (1, 0))
        found_BTV = F.scaled_dot_product_attention(query_BTA, key_BNA, value_BNV, attn_mask=bias_BN.unsqueeze(1))
        return found_BTV.reshape(x_SD.shape[0], -1)


def weigh(neighbours: Neighbours, temperature: float) -> Tensor:
    """The softmax of the retrieval scores, weights_BN: they sum to one, or to zero where there are no neighbours."""
    scores_BN = (neighbours.scores_BN / temperature).masked_fill(~neighbours.mask_BN, -torch.inf)
    # A row without any neighbour is NaN after the softmax and must become zero.
    return scores_BN.softmax(dim=-1).masked_fill(~neighbours.mask_BN, 0.0)
