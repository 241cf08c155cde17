"""What the gates share that learn from the embeddings of the neighbours. R encoder width, E experts."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor
from transformers import initialization as init

from ragmoe.gates.linear import ExpertLinear
from ragmoe.gates.token import TokenGate


class ContextGate(TokenGate):
    """``logits = W_t x + W_c c``, with ``c`` what the gate makes of the neighbours, and zero without any.

    ``W_c`` (``context``) starts at zero: at step 0 the gate is the token gate.
    """

    uses_neighbours = True
    own_parameters: ClassVar[tuple[str, ...]] = ("balance_bias", "token.weight", "context.weight")
    context: ExpertLinear

    def reset_parameters(self) -> None:
        init.zeros_(self.context.weight)

    @abstractmethod
    def set_context(self, directions_ER: Tensor) -> None:
        """Let an expert's logit be the higher, the more the mean of the neighbours points in its direction.

        Args:
            directions_ER: float32; the logits of a question become this, times the mean of its neighbours' embeddings,
                up to one factor.
        """
