"""Selections: which experts a token goes to, once every expert has a logit. Known by name to configurations.

S flattened tokens (B sequences of T), D model width, E experts, K experts a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ragmoe._registry import Registry
from ragmoe.gates.routing import Tokens

if TYPE_CHECKING:
    from ragmoe.gates.base import GateSettings


class Selection(nn.Module, ABC):
    """Chooses experts by their logits.

    Attributes:
        leaves_empty: whether a token may get fewer than K experts.
        is_causal: whether a token's experts depend on no other token's.
        takes_bias: whether a balance bias changes anything.
        estimates_load: whether it tells how likely each expert would be chosen under other noise (``load``).
        compares_tokens: whether scores of different tokens are compared, and must be shares of the same whole.
        expert_parameters: names of its parameters whose first dimension is the expert.
        summary: one line on when to use it.
    """

    leaves_empty: ClassVar[bool] = False
    is_causal: ClassVar[bool] = True
    takes_bias: ClassVar[bool] = True
    estimates_load: ClassVar[bool] = False
    compares_tokens: ClassVar[bool] = False
    expert_parameters: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = ""

    def __init__(self, settings: GateSettings) -> None:
        super().__init__()
        self.settings = settings
        # How many experts are not held back, as the gate says.
        self.available = settings.experts

    def reset_parameters(self) -> None:
        """Set what must not start random."""

    def perturb(self, logits_SE: Tensor, x_SD: Tensor) -> Tensor:
        """The logits that are chosen from and weighed, while training; float32."""
        return logits_SE

    @abstractmethod
    def choose(self, ranked_SE: Tensor, tokens: Tokens) -> Tensor:
        """The experts of each token, best first: experts_SK, with E in slots that stay empty.

        Args:
            ranked_SE: scores with the balance bias; -inf for experts that are not available.
        """

    def load(self, clean_SE: Tensor, noisy_SE: Tensor, x_SD: Tensor) -> Tensor | None:
        """An estimate of the load with a gradient, where the selection has its own noise; see ``Routing.load_SE``."""
        return None


_SELECTIONS: Registry[type[Selection]] = Registry("selection")
register_selection, selection_names, selection_class = _SELECTIONS.register, _SELECTIONS.names, _SELECTIONS.find


@register_selection("top_k")
class TopK(Selection):
    """The K best of each token; with K = 1 Switch's choice.

    Source: Shazeer et al. 2017; Fedus et al. 2021 (Switch).
    """

    summary = "the K best experts of each token (K = 1: Switch); the default"

    def choose(self, ranked_SE: Tensor, tokens: Tokens) -> Tensor:
        settings = self.settings
        if settings.choice_groups > 1:
            ranked_SE = limit_to_groups(ranked_SE, settings.choice_groups, settings.chosen_groups)
        return ranked_SE.topk(settings.top_k, dim=-1).indices


def limit_to_groups(ranked_SE: Tensor, groups: int, chosen: int) -> Tensor:
    """Scores with -inf for all experts but those of each token's best groups, by the sum of a group's two best.

    A group of which fewer than two experts are available comes after the others.
    Source: DeepSeek-AI 2024 (DeepSeek-V3, section 2.1.2), whose groups are devices; GLM-4-MoE has them too.
    """
    of_group_SGX = ranked_SE.view(len(ranked_SE), groups, -1)
    best_SG = of_group_SGX.nan_to_num(neginf=-1e4).topk(2, dim=-1).values.sum(dim=-1)
    out_SG = torch.ones_like(best_SG, dtype=torch.bool)
    out_SG.scatter_(1, best_SG.topk(chosen, dim=-1).indices, False)
    return of_group_SGX.masked_fill(out_SG.unsqueeze(-1), -torch.inf).view_as(ranked_SE)


@register_selection("noisy_top_k")
class NoisyTopK(TopK):
    """Top-k of logits with Gaussian noise of a learned, token-dependent scale, while training.

    ``H(x) = x W_g + N(0, 1) softplus(x W_n)``, with ``W_n`` starting at zero. Its load estimate is the probability that
    an expert would be among the K best if its own noise alone were drawn again.
    Source: Shazeer et al. 2017, equations 3 to 5 and appendix A.
    """

    estimates_load = True
    expert_parameters = ("noise.weight",)
    summary = "top-k under learned noise, with the smooth estimate that the `load` loss needs; explores while training"

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        self.noise = nn.Linear(settings.width, settings.experts, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.noise.weight)

    def _scale(self, x_SD: Tensor) -> Tensor:
        return F.softplus(self.noise(x_SD).float())

    def perturb(self, logits_SE: Tensor, x_SD: Tensor) -> Tensor:
        return logits_SE + torch.randn_like(logits_SE) * self._scale(x_SD)

    def load(self, clean_SE: Tensor, noisy_SE: Tensor, x_SD: Tensor) -> Tensor:
        E, K = self.settings.experts, self.settings.top_k
        if K == E:
            return torch.ones_like(clean_SE)
        best_SK = noisy_SE.topk(K + 1, dim=-1).values
        # What an expert must beat: the K-th best of the others.
        inside_SE = noisy_SE > best_SK[:, K:]
        bar_SE = torch.where(inside_SE, best_SK[:, K:], best_SK[:, K - 1 : K])
        # Held back, or too few available for anything to beat: -inf, whose differences have no gradient.
        gone_SE = clean_SE.isneginf()
        margin_SE = (clean_SE - bar_SE).masked_fill(gone_SE | bar_SE.isneginf(), 0.0)
        load_SE = torch.special.ndtr(margin_SE / self._scale(x_SD))
        return load_SE.masked_fill(bar_SE.isneginf(), 1.0).masked_fill(gone_SE, 0.0)


@register_selection("expert_choice")
class ExpertChoice(Selection):
    """Each expert takes its best tokens: as many of a sequence as makes K experts a token on average.

    Load is even by construction; a token may get any number of experts, or none. Experts choose within a sequence and
    not within the batch, so that an answer does not depend on what else is read beside it; padding is never taken.
    A token's experts depend on tokens after it, so a causal decoder refuses this selection.
    Source: Zhou et al. 2022.
    """

    leaves_empty = True
    is_causal = False
    takes_bias = False
    compares_tokens = True
    summary = "each expert takes its best tokens of a sequence: even load without a loss; not for causal decoders"

    def choose(self, ranked_SE: Tensor, tokens: Tokens) -> Tensor:
        E, (B, T) = self.settings.experts, tokens.mask_BT.shape
        mask_BT1 = tokens.mask_BT.unsqueeze(-1)
        ranked_BTE = ranked_SE.view(B, T, E).masked_fill(~mask_BT1, -torch.inf)
        # ceil(tokens * K / E), in integers, of the experts that are there to choose.
        choosing = max(self.available, 1)
        room_B = (tokens.mask_BT.sum(dim=1) * self.settings.top_k + choosing - 1) // choosing
        rank_BTE = ranked_BTE.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        taken_SE = ((rank_BTE < room_B.view(B, 1, 1)) & ~ranked_BTE.isneginf()).view(B * T, E)
        slots = max(1, int(taken_SE.sum(dim=1).max()) if taken_SE.numel() else 1)
        order_SK = ranked_SE.masked_fill(~taken_SE, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :slots]
        return order_SK.masked_fill(~taken_SE.gather(1, order_SK), E)
