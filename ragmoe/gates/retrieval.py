"""The retrieval gate: each token attends over the neighbours of its question, and routes by what it finds there.

This is what ragmoe is for. S tokens of B questions, N neighbours, R encoder width, A attention width, E experts.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ragmoe.gates.base import GateSettings, register_gate
from ragmoe.gates.token import TokenGate
from ragmoe.neighbours import Neighbours


@register_gate("retrieval")
class RetrievalGate(TokenGate):
    """``logits = W_t x + W_c c``, with ``c`` the attention of the token over the neighbours and a *null neighbour*.

    The null neighbour has a learned key and a value fixed at zero, and nothing is added after ``c``. Therefore

    * at step 0 (``W_c`` is zero) the gate equals the token gate bit for bit, and
    * with no neighbours it equals its own token part, also after training: all attention falls on the null
      neighbour, whose value is zero.

    Keys and values are made once for a question, not once for a token. The retrieval score joins the attention
    through a learned scale that starts at zero.
    """

    uses_neighbours = True
    expert_parameters: ClassVar[tuple[str, ...]] = ("balance_bias", "token.weight", "context.weight")
    summary = "token state plus its attention over the neighbours, with a null neighbour to fall back on"

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        A, R = settings.attention_width, settings.neighbour_width
        self.query = nn.Linear(settings.width, A, bias=False)
        self.key = nn.Linear(R, A, bias=False)
        self.value = nn.Linear(R, A, bias=False)
        self.null_key = nn.Parameter(torch.zeros(A))
        self.score_scale = nn.Parameter(torch.zeros(1))
        self.context = nn.Linear(A, settings.experts, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.context.weight)
        init.zeros_(self.score_scale)
        init.zeros_(self.null_key)

    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        logits_SE = super().logits(x_SD, neighbours)
        if neighbours is None:
            return logits_SE
        return logits_SE + self.context(self._attend(x_SD, neighbours))

    def _attend(self, x_SD: Tensor, neighbours: Neighbours) -> Tensor:
        """The context c_SA of each token."""
        B, A = len(neighbours), self.settings.attention_width
        # Unit vectors of width R have entries of size 1/sqrt(R); linear layers want entries of size one.
        embeddings_BNR = neighbours.embeddings_BNR.to(x_SD.dtype) * math.sqrt(self.settings.neighbour_width)
        query_BTA = self.query(x_SD).view(B, -1, A)
        key_BNA = torch.cat([self.null_key.expand(B, 1, A), self.key(embeddings_BNR)], dim=1)
        value_BNA = F.pad(self.value(embeddings_BNR), (0, 0, 1, 0))
        bias_BN = (self.score_scale * neighbours.scores_BN.to(x_SD.dtype)).masked_fill(~neighbours.mask_BN, -torch.inf)
        bias_BN = F.pad(bias_BN, (1, 0))
        context_BTA = F.scaled_dot_product_attention(query_BTA, key_BNA, value_BNA, attn_mask=bias_BN.unsqueeze(1))
        return context_BTA.reshape(-1, A)
