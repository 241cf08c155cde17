"""The modality gate: each type of token has experts of its own, and shares others. S tokens, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ragmoe._errors import ConfigError
from ragmoe.gates.base import NEVER, GateSettings, register_gate
from ragmoe.gates.routing import Tokens
from ragmoe.gates.token import TokenGate
from ragmoe.neighbours import Neighbours


@register_gate("modality")
class ModalityGate(TokenGate):
    """``logits = W_t x`` over the experts of the token's type and those of all types.

    ``expert_types`` names the type of token that each expert serves: text and image, say, or question and passage; -1
    marks the joint experts. Where a model knows no types, all tokens are of type 0.
    Source: Mustafa et al. 2022 (LIMoE) and Bao et al. 2022 (VLMo), whose experts of a modality these are.
    """

    keeps_token_gate = False
    takes_types = True
    fixed_experts = "each of its experts serves a type of token"
    summary = "experts of one token type (text, image; question, passage) beside joint ones (model.expert_types)"

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        E, types = settings.experts, settings.expert_types
        if types is None or len(types) != E or min(types) < -1:
            raise ConfigError(
                f"expert_types is {list(types) if types is not None else None}: expected the type of token that each "
                f"of the {E} experts serves, -1 for all types",
                hint=f"model.expert_types={[0] * (E // 2) + [1] * (E - E // 2)}",
            )
        self.known = sorted(set(types) - {-1})
        for kind in self.known:
            if (have := sum(t in (kind, -1) for t in types)) < settings.top_k:
                raise ConfigError(f"top_k is {settings.top_k}, but {have} experts serve tokens of type {kind}")
        self.types_E: Tensor
        self.register_buffer("types_E", torch.tensor(types), persistent=False)

    def reset_parameters(self) -> None:
        # Not saved, so from_pretrained leaves it as uninitialised memory.
        if self.settings.expert_types is not None:
            self.types_E.copy_(torch.tensor(self.settings.expert_types))

    def placed_logits(self, x_SD: Tensor, neighbours: Neighbours | None, tokens: Tokens) -> Tensor:
        types_BT = torch.zeros_like(tokens.mask_BT, dtype=torch.long) if tokens.types_BT is None else tokens.types_BT
        serves_SE = (self.types_E == types_BT.reshape(-1, 1)) | (self.types_E == -1)
        # A token of a type that no expert serves, or none that is not held back, goes to any.
        serves_SE = serves_SE | ~(serves_SE & self.available).any(dim=1, keepdim=True)
        return self.logits(x_SD, neighbours).masked_fill(~serves_SE, NEVER)

    def reachable(self, logits_SE: Tensor) -> Tensor:
        return logits_SE > NEVER / 2
