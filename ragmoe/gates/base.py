"""What every gate shares: the seam is one method, ``logits``; this class does the rest.

S flattened tokens (B sequences of T), D model width, E experts, K experts a token, N neighbours, R encoder width,
A attention width of the gate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ragmoe._errors import ConfigError, ModelError
from ragmoe._registry import Registry
from ragmoe.gates.routing import Routing, Tokens
from ragmoe.gates.scores import scores_class
from ragmoe.gates.selection import selection_class
from ragmoe.neighbours import Neighbours

# The logit of an expert that a token must not go to. Far below any other, but finite: a token's softmax over it is
# zero, and no loss becomes infinite.
NEVER = -1e4


@dataclass(frozen=True)
class GateSettings:
    """Sizes and selection of a gate.

    Attributes:
        normalise: the weights of the chosen experts sum to one; False leaves each its share of the softmax over all,
            which scales down what copies of a dense network answer together. None means what the gate says, which is
            True for all but the hierarchical one. A single expert's weight is then one, with the gradient of the
            logarithm of its share (of itself it would leave the gate none).
        scores: how logits become weights (see ``ragmoe.gates.scores``).
        selection: which experts are chosen by them (see ``ragmoe.gates.selection``).
        scale: what all weights are multiplied with in the end.
        float_weights: weights are float32 whatever the tokens' states are.
        noise: standard deviation of the Gaussian noise on the logits while training (0: none).
        jitter: the gate's view of a token is multiplied by numbers between 1 - jitter and 1 + jitter while training
            (Switch; 0: none).
        token_dropout: share of tokens whose state is hidden from the gate while training, so that it learns to route
            from the neighbours alone. Ignored by gates that see no neighbours.
        layer: the gate's place among the sparse layers, which is where its votes stand.
        common_experts: the last so many experts belong to no domain.
        vote_start: logit that the unanimous vote of the neighbours is worth before anything is learned.
        groups: into how many groups of equal size the experts are divided (hierarchical gate).
        expert_types: the type of token that each expert serves, -1 for all types (modality gate).
        choice_groups: into how many groups of equal size the experts are divided where a token's are chosen from the
            ``chosen_groups`` best of them alone, whatever the gate (see ``limit_to_groups``).
    """

    width: int
    experts: int
    top_k: int
    neighbour_width: int
    attention_width: int = 64
    normalise: bool | None = None
    scores: str = "softmax"
    selection: str = "top_k"
    scale: float = 1.0
    float_weights: bool = False
    noise: float = 0.0
    jitter: float = 0.0
    token_dropout: float = 0.0
    layer: int = 0
    common_experts: int = 0
    vote_start: float = 0.0
    groups: int = 1
    expert_types: tuple[int, ...] | None = None
    choice_groups: int = 1
    chosen_groups: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k is {self.top_k}: expected 1 to {self.experts}, the number of experts")
        if not 0 <= self.common_experts <= self.experts:
            raise ConfigError(f"common_experts is {self.common_experts}: expected 0 to {self.experts}")


class Gate(nn.Module, ABC):
    """Chooses K of E experts for each token.

    A gate is one subclass that says how logits come about; scores, selection, noise, the balance bias, availability and
    weights are here. ``own_parameters`` names the parameters whose first dimension is the expert, which belong to the
    expert's own file in a bundle.

    Attributes:
        uses_neighbours: whether it looks at the neighbours at all.
        uses_votes: whether it wants the votes that are recorded for them (``Neighbours.votes_BNLE``).
        counts_votes: whether neighbours vote in it, by what is recorded (it is True then) or by their embeddings.
        uses_domain: whether it wants the question's domain (``Neighbours.domain_B``).
        takes_common: whether it knows experts of all domains (``common_experts``).
        takes_groups: whether it knows groups of experts (``groups``).
        takes_types: whether it knows types of tokens (``expert_types``).
        normalises: what ``normalise`` None means to it.
        is_causal: whether a token's logits depend on no later token.
        fixed_experts: why no expert can join or leave it; empty where one can.
        is_fitted: it is not learned by steps, but fitted in closed form before the first.
        keeps_token_gate: with a token gate's weights in it and the rest as it starts, it routes as that gate.
    """

    uses_neighbours: ClassVar[bool] = False
    uses_votes: ClassVar[bool] = False
    counts_votes: ClassVar[bool] = False
    uses_domain: ClassVar[bool] = False
    takes_common: ClassVar[bool] = False
    takes_groups: ClassVar[bool] = False
    takes_types: ClassVar[bool] = False
    normalises: ClassVar[bool] = True
    is_causal: ClassVar[bool] = True
    fixed_experts: ClassVar[str] = ""
    is_fitted: ClassVar[bool] = False
    keeps_token_gate: ClassVar[bool] = False
    own_parameters: ClassVar[tuple[str, ...]] = ("balance_bias",)
    summary: ClassVar[str] = ""

    def __init_subclass__(cls, **named: object) -> None:
        super().__init_subclass__(**named)
        cls.counts_votes |= cls.uses_votes

    def __init__(self, settings: GateSettings) -> None:
        super().__init__()
        self.settings = settings
        self.normalise = self.normalises if settings.normalise is None else settings.normalise
        self.scores = scores_class(settings.scores)
        self.selection = selection_class(settings.selection)(settings)
        # Whether the experts expect slots that nobody serves; a layer of limited capacity sets it too.
        self.leaves_empty = self.selection.leaves_empty
        # Set with the buffer ``available``, whose own value would have to be fetched from the device at each call.
        self.none_available = False
        self.balance_bias: Tensor
        self.available: Tensor
        self.register_buffer("balance_bias", torch.zeros(settings.experts))
        self.register_buffer("available", torch.ones(settings.experts, dtype=torch.bool), persistent=False)

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of every token's experts sum to one, and carry no gradient beyond their proportions."""
        settings = self.settings
        return self.normalise and settings.top_k > 1 and settings.scale == 1.0 and not self.leaves_empty

    @property
    def expert_parameters(self) -> tuple[str, ...]:
        """Names of the tensors whose first dimension is the expert, those of the selection included."""
        return (*self.own_parameters, *(f"selection.{name}" for name in self.selection.expert_parameters))

    @abstractmethod
    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        """Score each expert for each token.

        Args:
            x_SD: token states.
            neighbours: of B questions, or None; S is a multiple of B and tokens of one question are consecutive.

        Returns:
            logits_SE in the dtype of ``x_SD``.
        """

    def prepare(self, neighbours: Neighbours) -> tuple[Tensor, Tensor] | None:
        """Keys and values that depend on the neighbours alone, (B, N, A) each; None for gates that have none.

        ``logits`` takes them from ``Neighbours.prepared``, so that a model which is called many times with the same
        neighbours makes them once.
        """
        return None

    def placed_logits(self, x_SD: Tensor, neighbours: Neighbours | None, tokens: Tokens) -> Tensor:
        """``logits`` for gates that must know how the tokens stand in sequences, which override this."""
        return self.logits(x_SD, neighbours)

    def missed(self, x_SD: Tensor, neighbours: Neighbours) -> Tensor | None:
        """What ``Routing.missed_S`` says, for gates that count votes."""
        return None

    def reachable(self, logits_SE: Tensor) -> Tensor | None:
        """Which experts may be chosen, bool (S, E), though all count in the scores' total; None where all may."""
        return None

    def reset_parameters(self) -> None:
        """Set what must not start random; everything else starts as the model's linear layers do."""

    def forward(self, x_SD: Tensor, neighbours: Neighbours | None = None, tokens: Tokens | None = None) -> Routing:
        """Route S tokens.

        Args:
            x_SD: token states; those of one question are consecutive.
            neighbours: of B questions, where B divides S; None is the same as none found.
            tokens: how they stand in sequences; None takes all for one sequence without padding.

        Raises:
            ModelError: when the neighbours come from an encoder of another width.
        """
        selection = self.selection
        tokens = Tokens.of(x_SD) if tokens is None else tokens
        if not self.uses_neighbours:
            neighbours = None
        if neighbours is not None:
            self._check(x_SD, neighbours)
        missed_S = None
        if self.training:
            missed_S = None if neighbours is None else self.missed(x_SD, neighbours)
            x_SD = self._disturbed(x_SD, neighbours)
        clean_SE = logits_SE = self.placed_logits(x_SD, neighbours, tokens).float()
        if self.training:
            logits_SE = selection.perturb(logits_SE, x_SD)
            if self.settings.noise:
                logits_SE = logits_SE + self.settings.noise * torch.randn_like(logits_SE)
        logits_SE = logits_SE.masked_fill(~self.available, -torch.inf)
        ranked_SE = self.scores.ranked(logits_SE)
        if selection.compares_tokens:
            ranked_SE = ranked_SE - self.scores.log_total(logits_SE).nan_to_num(neginf=0.0)
        if selection.takes_bias:
            # The bias moves the choice only, never the weights (DeepSeek-V3's balancing without a loss).
            # That of an expert which is held back may be broken.
            ranked_SE = (ranked_SE + self.balance_bias).masked_fill(~self.available, -torch.inf)
        if (reachable_SE := self.reachable(logits_SE)) is not None:
            ranked_SE = ranked_SE.masked_fill(~reachable_SE, -torch.inf)
        experts_SK = selection.choose(ranked_SE, tokens)
        load_SE = None
        if self.training:
            load_SE = selection.load(clean_SE.masked_fill(~self.available, -torch.inf), logits_SE, x_SD)
        weights_SK, idle_SK = self.weigh(logits_SE, experts_SK)
        # Fewer available than K: the slots left over go, weightless, to the token's best expert and not to one that is
        # held back, which may be broken, and zero times NaN is NaN.
        spare_SK = experts_SK.new_tensor(self.settings.experts) if self.leaves_empty else experts_SK[:, :1]
        experts_SK = torch.where(idle_SK, spare_SK, experts_SK)
        kept_SE = ranked_SE.detach() if self.leaves_empty else None
        if not self.settings.float_weights:
            weights_SK = weights_SK.to(x_SD.dtype)
        return Routing(weights_SK, experts_SK, logits_SE, load_SE=load_SE, ranked_SE=kept_SE, missed_S=missed_S)

    def weigh(self, logits_SE: Tensor, experts_SK: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of chosen experts, float32 (S, K), and where there is none because none was available (bool)."""
        E = self.settings.experts
        empty_SK = experts_SK == E
        log_SK = self.scores.log(logits_SE).gather(1, experts_SK.clamp(max=E - 1)).masked_fill(empty_SK, -torch.inf)
        idle_SK = log_SK.isneginf()
        if self.normalise and experts_SK.shape[1] > 1:
            weights_SK = log_SK.softmax(dim=-1)
        else:
            share_SK = log_SK.masked_fill(idle_SK, 0.0) - self.scores.log_total(logits_SE)
            weights_SK = (share_SK - share_SK.detach() if self.normalise else share_SK).exp()
        # Where no expert is available the softmax of -inf is NaN; the weight there is zero.
        weights_SK = weights_SK.masked_fill(idle_SK, 0.0)
        return weights_SK if self.settings.scale == 1.0 else weights_SK * self.settings.scale, idle_SK

    def _disturbed(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        """What the gate sees of the tokens while training: some hidden, all jittered, as far as the settings say."""
        settings = self.settings
        if settings.token_dropout and neighbours is not None:
            hide_S = torch.rand(x_SD.shape[0], device=x_SD.device) < settings.token_dropout
            # Where there are no neighbours either, nothing would be left to route by.
            hide_S &= neighbours.mask_BN.any(dim=1).repeat_interleave(x_SD.shape[0] // len(neighbours))
            x_SD = x_SD.masked_fill(hide_S.unsqueeze(1), 0.0)
        if settings.jitter:
            x_SD = x_SD * (1 + settings.jitter * (2 * torch.rand_like(x_SD) - 1))
        return x_SD

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
        self.selection.available = int(available_E.sum())
        self.none_available = not self.selection.available

    @torch.no_grad()
    def update_balance_bias(self, load_E: Tensor, rate: float) -> None:
        """Raise the bias of experts under the mean load and lower it over, by ``rate``, once per optimiser step.

        Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts".
        """
        self.balance_bias += rate * torch.sign(load_E.mean() - load_E)


_GATES: Registry[type[Gate]] = Registry("gate")
register_gate, gate_names, gate_class = _GATES.register, _GATES.names, _GATES.find
