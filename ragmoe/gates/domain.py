"""Gates that send a question to the expert of its domain: told which (oracle), or guessing it from the neighbours.

None of them learns which expert is whose; what they learn is how to weigh a domain's own expert and the common ones.
S tokens of B questions, Q training questions, R encoder width, E experts, of which the last C are common and the
others, D of them, belong to one domain each.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import initialization as init

from ragmoe._errors import ConfigError, ModelError
from ragmoe._ridge import ridge
from ragmoe.gates.attention import weigh
from ragmoe.gates.base import NEVER, GateSettings, register_gate
from ragmoe.gates.token import TokenGate
from ragmoe.neighbours import Neighbours


class DomainGate(TokenGate):
    """One domain's expert and the common experts beside it, weighed by the token state.

    A token takes the best K of these: with K - 1 in common its domain's own is one of them, with more it may not be.
    Where the domain is not known, or has no expert, all experts are open: it is the token gate.
    Source: Gururangan et al. 2021 (DEMix).
    """

    keeps_token_gate = False
    uses_neighbours = True
    takes_common = True

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        if settings.top_k > 1 + settings.common_experts:
            raise ConfigError(
                f"the gate chooses {settings.top_k} experts, but a domain has one of its own and "
                f"{settings.common_experts} in common with the others",
                hint=f"model.common_experts={settings.top_k - 1} or model.top_k=1",
            )

    @abstractmethod
    def domain(self, neighbours: Neighbours) -> Tensor | None:
        """The expert of each question's domain, int64 (B,), -1 where it is not known; None where none is."""

    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        logits_SE = super().logits(x_SD, neighbours)
        domain_B = self.domain(neighbours) if neighbours is not None else None
        if neighbours is None or domain_B is None:
            return logits_SE
        E = self.settings.experts
        place_E = torch.arange(E, device=x_SD.device)
        # A domain whose expert is held back has none.
        domain_B = torch.where(self.available[domain_B.clamp(min=0)], domain_B, -1)
        allowed_BE = place_E == domain_B.unsqueeze(1)
        allowed_BE |= (place_E >= E - self.settings.common_experts) | (domain_B < 0).unsqueeze(1)
        allowed_SE = allowed_BE.repeat_interleave(x_SD.shape[0] // len(neighbours), dim=0)
        return logits_SE.masked_fill(~allowed_SE, NEVER)

    def reachable(self, logits_SE: Tensor) -> Tensor:
        return logits_SE > NEVER / 2


@register_gate("oracle")
class OracleGate(DomainGate):
    """The expert of the question's true domain: for evaluations, and not for use."""

    uses_domain = True
    summary = "the expert of the question's true domain; for evaluations only"

    def domain(self, neighbours: Neighbours) -> Tensor | None:
        return neighbours.domain_B


class FittedDomainGate(DomainGate):
    """The domain is guessed from the neighbours' weighted mean, by what was fitted on the training questions."""

    # As in the pooled gate.
    temperature = 0.1
    fixed_experts = "it was fitted to the domains of all its experts"
    is_fitted = True

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        D = settings.experts - settings.common_experts
        if D < 1:
            raise ConfigError(f"common_experts is {settings.common_experts}: no expert is left for a domain")
        self.weight: Tensor
        self.offset: Tensor
        self.register_buffer("weight", torch.zeros(D, settings.neighbour_width))
        self.register_buffer("offset", torch.zeros(D))

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        init.zeros_(self.offset)

    @property
    def is_ready(self) -> bool:
        """Whether it was fitted already."""
        return bool(self.weight.any())

    def domain(self, neighbours: Neighbours) -> Tensor | None:
        pooled_BR = self.pool(neighbours).to(self.weight.dtype)
        scores_BD = F.linear(pooled_BR, self.weight, self.offset)
        return torch.where(neighbours.mask_BN.any(dim=1), scores_BD.argmax(dim=-1), -1)

    def pool(self, neighbours: Neighbours) -> Tensor:
        """The mean of each question's neighbours, weighted by the softmax of their scores, (B, R)."""
        return torch.einsum("bn,bnr->br", weigh(neighbours, self.temperature), neighbours.embeddings_BNR)

    @torch.no_grad()
    def fit(self, pooled_QR: Tensor, domain_Q: Tensor) -> None:
        """Learn to guess the domain, in closed form.

        Args:
            pooled_QR: float32, what ``pool`` makes of the neighbours of each training question.
            domain_Q: int64, the expert of its domain; -1 where that has none.

        Raises:
            ModelError: no question belongs to an expert.
        """
        D = self.weight.shape[0]
        known_Q = (domain_Q >= 0) & (domain_Q < D)
        if not known_Q.any():
            raise ModelError(
                "none of the questions belongs to a domain that an expert is named after",
                hint="name the experts after the domains: model.expert_names=[...]",
            )
        weight_DR, offset_D = self.solve(pooled_QR[known_Q].float(), F.one_hot(domain_Q[known_Q], D).float())
        # A domain without questions is guessed as before: by a gate that is fitted for the first time, never.
        empty_D = torch.bincount(domain_Q[known_Q], minlength=D) == 0
        kept_D = empty_D & self.is_ready
        weight_DR = torch.where(kept_D.unsqueeze(1), self.weight, weight_DR)
        self.offset.copy_(torch.where(kept_D, self.offset, offset_D.masked_fill(empty_D, NEVER)))
        self.weight.copy_(weight_DR)

    @abstractmethod
    def solve(self, x_QR: Tensor, y_QD: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (D, R) and offset (D,) of the linear scores whose largest names the domain."""


@register_gate("centroid")
class CentroidGate(FittedDomainGate):
    """The domain whose training questions' neighbours lie nearest on average.

    Source: Gururangan et al. 2023 (c-BTM), with the domains as clusters.
    """

    summary = "the expert whose domain's centroid lies nearest to the neighbours; nothing is learned"

    def solve(self, x_QR: Tensor, y_QD: Tensor) -> tuple[Tensor, Tensor]:
        centroid_DR = (y_QD.T @ x_QR) / y_QD.sum(dim=0).clamp(min=1).unsqueeze(1)
        # The nearest has the least |x - c|^2, which is the largest 2 c.x - |c|^2.
        return 2 * centroid_DR, -centroid_DR.square().sum(dim=1)


@register_gate("ridge")
class RidgeGate(FittedDomainGate):
    """The domain that a ridge regression on the neighbours' mean gives the largest score.

    Source: the closed-form gate of DUME, on encoder embeddings in the place of hidden states.
    """

    summary = "the expert that a closed-form ridge regression on the neighbours' mean points to"
    penalty = 1.0

    def solve(self, x_QR: Tensor, y_QD: Tensor) -> tuple[Tensor, Tensor]:
        return ridge([(x_QR, y_QD)], self.penalty)
