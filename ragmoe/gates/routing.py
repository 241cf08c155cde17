"""What goes into a gate beside the token states, and what comes out of it.

S flattened tokens (B sequences of T), E experts, K experts a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ragmoe.moe.probe import Probe


class Tokens(NamedTuple):
    """How the S flattened tokens stand in sequences.

    Attributes:
        mask_BT: bool, False for padding, which is routed like the rest but never takes another token's place.
        types_BT: int64, of which type each token is, where a model knows types: in a reader the question is 0 and the
            passage 1, elsewhere it may be text and image.
    """

    mask_BT: Tensor
    types_BT: Tensor | None = None

    @classmethod
    def of(cls, x_SD: Tensor) -> Tokens:
        """One sequence without padding."""
        return cls(torch.ones(1, x_SD.shape[0], dtype=torch.bool, device=x_SD.device))


class Routing(NamedTuple):
    """What a gate returns.

    Attributes:
        weights_SK: how much each chosen expert counts; zero where none was available.
        experts_SK: int64, the chosen experts, best first; E, which is no expert, in a slot that is left empty.
        logits_SE: float32, what was chosen from; -inf for an expert that is not available.
        served_SK: int64, where capacity is limited: the expert that serves each choice, E where none has room. None
            means that each choice is served as it was made.
        load_SE: float32, with a gradient: how likely each expert would be chosen again under other noise; None where
            the selection has no noise of its own.
        probe: what some losses ask of a layer besides, put there by the layer; None where none asks.
        ranked_SE: float32, what the choice was made by where a slot may stay empty: scores with the balance bias, -inf
            for what the gate cannot choose. None where it is not needed, or is the logits.
        missed_S: float32, with a gradient to the gate alone: the cross-entropy in nats of what the gate would choose by
            the token alone to what the neighbours vote, zero where they vote for nothing. None but of gates with expert
            memory, while training.
    """

    weights_SK: Tensor
    experts_SK: Tensor
    logits_SE: Tensor
    served_SK: Tensor | None = None
    load_SE: Tensor | None = None
    probe: Probe | None = None
    ranked_SE: Tensor | None = None
    missed_S: Tensor | None = None

    def rows(self, at: slice) -> Routing:
        """The routing of some of the tokens, before anything was probed."""
        fields: dict[str, Any] = {name: x[at] for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return Routing(**fields)

    def probabilities_SE(self) -> Tensor:
        """How likely the gate finds each expert, float32 (S, E); zero for all where none is available."""
        nobody_S1 = self.logits_SE.isneginf().all(dim=-1, keepdim=True)
        return self.logits_SE.float().softmax(dim=-1).masked_fill(nobody_S1, 0.0)

    def choices_SE(self) -> Tensor:
        """How often each token has chosen each expert, int64 (S, E), before any limit of capacity."""
        S, E = self.logits_SE.shape
        counts_SE = self.experts_SK.new_zeros(S, E + 1)
        return counts_SE.scatter_add_(1, self.experts_SK, torch.ones_like(self.experts_SK))[:, :E]
