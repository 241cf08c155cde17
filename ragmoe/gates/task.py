"""The task gate: one routing for a whole sequence. S tokens in B sequences of T, D model width, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ragmoe.gates.base import register_gate
from ragmoe.gates.routing import Tokens
from ragmoe.gates.token import TokenGate
from ragmoe.neighbours import Neighbours


@register_gate("task")
class TaskGate(TokenGate):
    """``logits = W_t q``, with ``q`` the mean state of a sequence's tokens of type 0: in a reader, of the question.

    All tokens of a sequence, padding included, go to the same experts. A sequence without such tokens, or of a model
    that knows no types, is routed by the mean of all its tokens.
    Source: Kudugunta et al. 2021 (task-level mixture of experts), with the question in the place of a task's name.
    """

    keeps_token_gate = False
    is_causal = False
    summary = "one routing a sequence, by the mean state of the question's tokens; whole experts can be left on disk"

    def placed_logits(self, x_SD: Tensor, neighbours: Neighbours | None, tokens: Tokens) -> Tensor:
        B, T = tokens.mask_BT.shape
        kept_BT = tokens.mask_BT
        if tokens.types_BT is not None:
            asked_BT = kept_BT & (tokens.types_BT == 0)
            kept_BT = torch.where(asked_BT.any(dim=1, keepdim=True), asked_BT, kept_BT)
        weight_BT1 = kept_BT.to(x_SD.dtype).unsqueeze(-1)
        mean_BD = (x_SD.view(B, T, -1) * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp(min=1)
        return self.logits(mean_BD, neighbours).repeat_interleave(T, dim=0)
