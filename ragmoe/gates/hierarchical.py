"""The hierarchical gate: first a group of experts, then experts inside it. S tokens, E experts in G groups."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ragmoe._errors import ConfigError
from ragmoe.gates.base import GateSettings, register_gate
from ragmoe.gates.token import TokenGate
from ragmoe.neighbours import Neighbours


@register_gate("hierarchical")
class HierarchicalGate(TokenGate):
    """``logits = log softmax(W_g x)[group] + log softmax(W_t x within the group)``, chosen from the best group alone.

    Experts 0 to E/G - 1 are the first group, and so on. The logits are the logarithms of a probability over all
    experts, so losses and weights mean what they mean elsewhere. Weights are not normalised unless asked for: within
    one group the group's own probability would cancel, and nothing would teach the gate which group to choose.
    Source: Shazeer et al. 2017, appendix B; the choice of one group as in DeepSeek-V3's group-limited routing.
    """

    keeps_token_gate = False
    takes_groups = True
    normalises = False
    fixed_experts = "its experts stand in groups of equal size"
    own_parameters: ClassVar[tuple[str, ...]] = ("balance_bias", "token.weight")
    summary = (
        "first a group of experts, then experts inside it; for many experts that live in groups (model.expert_groups)"
    )

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        E, G, K = settings.experts, settings.groups, settings.top_k
        if G < 2 or E % G:
            fitting = [n for n in range(2, E) if E % n == 0]
            raise ConfigError(
                f"expert_groups is {G}: expected a number of groups, at least 2, that divides the {E} experts",
                hint=f"model.expert_groups={fitting[0]}" if fitting else "model.experts=8 model.expert_groups=2",
            )
        if K > E // G:
            raise ConfigError(f"top_k is {K}, but a group has {E // G} experts", hint=f"model.top_k={E // G}")
        self.group = nn.Linear(settings.width, G, bias=False)

    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        S, G = x_SD.shape[0], self.settings.groups
        group_SG = self.group(x_SD).float().log_softmax(dim=-1)
        token_SE = super().logits(x_SD, neighbours).float()
        # An expert that is held back may be broken, and must not break its group.
        token_SE = token_SE.masked_fill(~self.available & ~token_SE.isfinite(), 0.0)
        inside_SGe = token_SE.view(S, G, -1).log_softmax(dim=-1)
        return (group_SG.unsqueeze(-1) + inside_SGe).view(S, -1).to(x_SD.dtype)

    def reachable(self, logits_SE: Tensor) -> Tensor:
        S, G = logits_SE.shape[0], self.settings.groups
        # The probability of a group is the sum of those of its experts, whatever of them is available.
        group_SG = logits_SE.view(S, G, -1).logsumexp(dim=-1)
        best_SG = torch.arange(G, device=logits_SE.device) == group_SG.argmax(dim=-1, keepdim=True)
        return best_SG.repeat_interleave(self.settings.experts // G, dim=1)
