"""What every gate shares: the seam is one method, ``logits``; this class does the rest.

S flattened tokens (B sequences of T), D model width, E experts, K experts a token, N neighbours, R encoder width,
A attention width of the gate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ragmoe._errors import ConfigError, ModelError
from ragmoe.neighbours import Neighbours


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
    """

    weights_SK: Tensor
    experts_SK: Tensor
    logits_SE: Tensor
    served_SK: Tensor | None = None
    load_SE: Tensor | None = None

    def choices_SE(self) -> Tensor:
        """How often each token has chosen each expert, int64 (S, E), before any limit of capacity."""
        S, E = self.logits_SE.shape
        counts_SE = self.experts_SK.new_zeros(S, E + 1)
        return counts_SE.scatter_add_(1, self.experts_SK, torch.ones_like(self.experts_SK))[:, :E]


@dataclass(frozen=True)
class GateSettings:
    """Sizes and selection of a gate.

    Attributes:
        normalise: the weights of the chosen experts sum to one; False leaves each its share of the softmax over all,
            which scales down what copies of a dense network answer together. None means True. A single expert's weight
            is then one, with the gradient of the logarithm of its share (of itself it would leave the gate none).
        noise: standard deviation of the Gaussian noise on the logits while training (0: none).
        token_dropout: share of tokens whose state is hidden from the gate while training, so that it learns to route
            from the neighbours alone. Ignored by gates that see no neighbours.
        layer: the gate's place among the sparse layers, which is where its votes stand.
        common_experts: the last so many experts belong to no domain.
        vote_start: logit that the unanimous vote of the neighbours is worth before anything is learned.
    """

    width: int
    experts: int
    top_k: int
    neighbour_width: int
    attention_width: int = 64
    normalise: bool | None = None
    noise: float = 0.0
    token_dropout: float = 0.0
    layer: int = 0
    common_experts: int = 0
    vote_start: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k is {self.top_k}: expected 1 to {self.experts}, the number of experts")
        if not 0 <= self.common_experts <= self.experts:
            raise ConfigError(f"common_experts is {self.common_experts}: expected 0 to {self.experts}")


class Gate(nn.Module, ABC):
    """Chooses K of E experts for each token.

    A gate is one subclass that says how logits come about; noise, the balance bias, availability, top-k and weights
    are here. ``expert_parameters`` names the parameters whose first dimension is the expert, which belong to the
    expert's own file in a bundle.

    Attributes:
        uses_neighbours: whether it looks at the neighbours at all.
        uses_votes: whether it wants their votes (``Neighbours.votes_BNLE``).
        uses_domain: whether it wants the question's domain (``Neighbours.domain_B``).
        takes_common: whether it knows experts of all domains (``common_experts``).
    """

    uses_neighbours: ClassVar[bool] = False
    uses_votes: ClassVar[bool] = False
    uses_domain: ClassVar[bool] = False
    takes_common: ClassVar[bool] = False
    expert_parameters: ClassVar[tuple[str, ...]] = ("balance_bias",)
    summary: ClassVar[str] = ""

    def __init__(self, settings: GateSettings) -> None:
        super().__init__()
        self.settings = settings
        self.normalise = settings.normalise is not False
        # Set with the buffer ``available``, whose own value would have to be fetched from the device at each call.
        self.none_available = False
        self.balance_bias: Tensor
        self.available: Tensor
        self.register_buffer("balance_bias", torch.zeros(settings.experts))
        self.register_buffer("available", torch.ones(settings.experts, dtype=torch.bool), persistent=False)

    @abstractmethod
    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        """Score each expert for each token.

        Args:
            x_SD: token states.
            neighbours: of B questions, or None; S is a multiple of B and tokens of one question are consecutive.

        Returns:
            logits_SE in the dtype of ``x_SD``.
        """

    def reset_parameters(self) -> None:
        """Set what must not start random; everything else starts as the model's linear layers do."""

    def forward(self, x_SD: Tensor, neighbours: Neighbours | None = None) -> Routing:
        """Route S tokens.

        Args:
            x_SD: token states; those of one question are consecutive.
            neighbours: of B questions, where B divides S; None is the same as none found.

        Raises:
            ModelError: when the neighbours come from an encoder of another width.
        """
        settings = self.settings
        if not self.uses_neighbours:
            neighbours = None
        if neighbours is not None:
            self._check(x_SD, neighbours)
        if self.training and settings.token_dropout and neighbours is not None:
            hide_S = torch.rand(x_SD.shape[0], device=x_SD.device) < settings.token_dropout
            # Where there are no neighbours either, nothing would be left to route by.
            hide_S &= neighbours.mask_BN.any(dim=1).repeat_interleave(x_SD.shape[0] // len(neighbours))
            x_SD = x_SD.masked_fill(hide_S.unsqueeze(1), 0.0)
        logits_SE = self.logits(x_SD, neighbours).float()
        if self.training and settings.noise:
            logits_SE = logits_SE + settings.noise * torch.randn_like(logits_SE)
        logits_SE = logits_SE.masked_fill(~self.available, -torch.inf)
        # The bias moves the choice only, never the weights (DeepSeek-V3's balancing without a loss).
        experts_SK = (logits_SE + self.balance_bias).topk(settings.top_k, dim=-1).indices
        chosen_SK = logits_SE.gather(1, experts_SK)
        if self.normalise and settings.top_k > 1:
            weights_SK = chosen_SK.softmax(dim=-1)
        else:
            log_share_SK = chosen_SK - logits_SE.logsumexp(dim=-1, keepdim=True)
            weights_SK = (log_share_SK - log_share_SK.detach() if self.normalise else log_share_SK).exp()
        # Where no expert is available the softmax of -inf is NaN; the weight there is zero.
        idle_SK = chosen_SK.isneginf()
        weights_SK = weights_SK.masked_fill(idle_SK, 0.0)
        # Fewer available than K: the slots left over go, weightless, to the token's best expert and not to one that is
        # held back, which may be broken, and zero times NaN is NaN.
        experts_SK = torch.where(idle_SK, experts_SK[:, :1], experts_SK)
        return Routing(weights_SK.to(x_SD.dtype), experts_SK, logits_SE)

    @torch.no_grad()
    def foresee(self, neighbours: Neighbours, state_D: Tensor | None = None) -> Tensor | None:
        """What the gate will make of neighbours, before any token state is known: logits_BE, float32.

        These are its logits for one token a question, with the balance bias, and -inf for an expert that is not
        available. None where the gate sees no neighbours, or there are none: then they tell it nothing.

        Args:
            state_D: the state that token is taken to have, best the mean of such states; None is zero, which leaves
                what the neighbours alone say.
        """
        if not self.uses_neighbours or not neighbours.mask_BN.any():
            return None
        like = next(self.parameters(), self.balance_bias)
        x_BD = like.new_zeros(len(neighbours), self.settings.width)
        if state_D is not None:
            x_BD += state_D
        self._check(x_BD, neighbours)
        logits_BE = self.logits(x_BD, neighbours).float() + self.balance_bias
        return logits_BE.masked_fill(~self.available, -torch.inf)

    def _check(self, x_SD: Tensor, neighbours: Neighbours) -> None:
        """Refuse neighbours that do not fit, where a matrix product would only name two sizes."""
        B, _, R = neighbours.embeddings_BNR.shape
        if self.settings.neighbour_width != R:
            raise ModelError(
                f"the neighbours' embeddings are {R} wide, but the gate reads {self.settings.neighbour_width}",
                hint="open the index that the model was trained with, or one of the same encoder",
            )
        if x_SD.shape[0] % B:
            raise ValueError(f"{x_SD.shape[0]} tokens cannot be shared out over the neighbours of {B} questions")

    @torch.no_grad()
    def set_available(self, available_E: Tensor) -> None:
        """Hold experts back (False) or let them in (True); a token never goes to one that is held back."""
        self.available.copy_(available_E)
        self.none_available = not bool(available_E.any())

    @torch.no_grad()
    def update_balance_bias(self, load_E: Tensor, rate: float) -> None:
        """Raise the bias of experts under the mean load and lower it over, by ``rate``, once per optimiser step.

        Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts".
        """
        self.balance_bias += rate * torch.sign(load_E.mean() - load_E)


GateType = TypeVar("GateType", bound=type[Gate])
_GATES: dict[str, type[Gate]] = {}


def register_gate(name: str) -> Callable[[GateType], GateType]:
    """Make a gate known by name to configurations."""

    def add(gate: GateType) -> GateType:
        _GATES[name] = gate
        return gate

    return add


def gate_names() -> list[str]:
    """The names of all gates."""
    return sorted(_GATES)


def gate_class(name: str) -> type[Gate]:
    """The gate of that name; ConfigError lists what exists."""
    if name not in _GATES:
        raise ConfigError(f"there is no gate {name!r}; there are: {', '.join(gate_names())}")
    return _GATES[name]
