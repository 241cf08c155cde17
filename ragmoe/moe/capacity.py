"""Capacity: how many tokens an expert takes at most, and what becomes of those it turns away.

S tokens, E experts, K experts a token, P = S*K choices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ragmoe._errors import ConfigError
from ragmoe._registry import Registry
from ragmoe.gates import Routing


def expert_capacity(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """``ceil(tokens * top_k * factor / experts)``: what each expert takes of so many tokens, padding not counted."""
    # Less a trifle, since 10 * 1.1 is a little more than 11 in floating point.
    return math.ceil(tokens * top_k * factor / experts - 1e-9)


class Overflow(ABC):
    """What becomes of a choice whose expert has no room.

    Attributes:
        wants_dense: whether a dense network must stand beside the experts.
        drops: whether the weight of a lost choice is lost too, so that only the residual stays of it.
        passes_on: whether another expert may serve than the one that was chosen.
    """

    wants_dense: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    passes_on: ClassVar[bool] = False
    summary: ClassVar[str] = ""

    @staticmethod
    @abstractmethod
    def serve(experts_SK: Tensor, ranked_SE: Tensor, order_S: Tensor, capacity: int) -> Tensor:
        """Who serves each choice, int64 (S, K), E where nobody does.

        Args:
            experts_SK: the choices, best first; E for none.
            ranked_SE: by what the experts were chosen.
            order_S: the tokens in the order in which they are served: all their first choices, then the second ones.
        """


_OVERFLOWS: Registry[type[Overflow]] = Registry("overflow")
register_overflow, overflow_names, overflow_class = _OVERFLOWS.register, _OVERFLOWS.names, _OVERFLOWS.find


@register_overflow("drop")
class Drop(Overflow):
    """The choice is lost with its weight; a token that loses all of them passes on its residual alone.

    Source: Lepikhin et al. 2020 (GShard); Fedus et al. 2021 (Switch).
    """

    drops = True
    summary = "the choice and its weight are lost; of a token without any, the residual stays"

    @staticmethod
    def serve(experts_SK: Tensor, ranked_SE: Tensor, order_S: Tensor, capacity: int) -> Tensor:
        return _with_room(experts_SK, ranked_SE.shape[1], order_S, capacity)


@register_overflow("shared")
class Shared(Drop):
    """The dense network beside the experts answers in their place, with the weight of what was lost.

    Source: the shared expert of DeepSeekMoE (Dai et al. 2024), as a fallback.
    """

    wants_dense = True
    drops = False
    summary = "the dense network beside the experts answers instead (LoRA experts, or a shared expert)"


@register_overflow("next")
class Next(Overflow):
    """The choice goes on to the token's next best expert that has room, in rounds, until none has.

    In each round those without an expert ask for the best one that they have neither chosen nor asked; who comes first
    is settled by the same order. Weights are those of the experts that serve in the end.
    Source: Shazeer et al. 2018 and BASE's balanced assignment (Lewis et al. 2021), done greedily.
    """

    passes_on = True
    summary = "the choice goes to the token's next best expert with room"

    @staticmethod
    def serve(experts_SK: Tensor, ranked_SE: Tensor, order_S: Tensor, capacity: int) -> Tensor:
        S, E = ranked_SE.shape
        served_SK = _with_room(experts_SK, E, order_S, capacity)
        # Never asked again: what was chosen, and what is not available.
        asked_SE = torch.zeros(S, E + 1, dtype=torch.bool, device=experts_SK.device)
        asked_SE = asked_SE.scatter_(1, experts_SK, True)[:, :E] | ranked_SE.isneginf()
        for _ in range(E):
            wanting_SK = (served_SK == E) & (experts_SK != E)
            room_E = capacity - torch.bincount(served_SK.flatten(), minlength=E + 1)[:E]
            open_SE = ranked_SE.masked_fill(asked_SE | (room_E <= 0), -torch.inf)
            if not (wanting_SK.any(dim=1) & ~open_SE.isneginf().all(dim=1)).any():
                break
            # The token's wanting slots, best first, ask for its open experts, best first.
            best_SE = open_SE.argsort(dim=1, descending=True, stable=True)
            best_SE = best_SE.masked_fill(open_SE.gather(1, best_SE).isneginf(), E)
            nth_SK = (wanting_SK.cumsum(dim=1) - 1).clamp(min=0)
            ask_SK = best_SE.gather(1, nth_SK.clamp(max=E - 1)).masked_fill(~wanting_SK | (nth_SK >= E), E)
            taken_SK = _with_room(ask_SK, E, order_S, capacity, room_E)
            served_SK = torch.where(taken_SK < E, taken_SK, served_SK)
            marked_SE = torch.zeros(S, E + 1, dtype=torch.bool, device=experts_SK.device).scatter_(1, ask_SK, True)
            asked_SE = asked_SE | marked_SE[:, :E]
        return served_SK


def _with_room(experts_SK: Tensor, E: int, order_S: Tensor, capacity: int, room_E: Tensor | None = None) -> Tensor:
    """The choices that find room, E for the others; first choices of all tokens in order, then second ones."""
    S, K = experts_SK.shape
    # Slot by slot, and within a slot in the order of the tokens.
    asked_P = experts_SK[order_S].T.reshape(-1)
    sorted_P, from_P = asked_P.sort(stable=True)
    first_E = torch.searchsorted(sorted_P, torch.arange(E + 1, device=asked_P.device))
    rank_P = torch.empty_like(asked_P)
    rank_P[from_P] = torch.arange(S * K, device=asked_P.device) - first_E[sorted_P]
    limit_E = torch.full((E,), capacity, device=asked_P.device) if room_E is None else room_E
    limit_E = torch.cat([limit_E, limit_E.new_zeros(1)])
    kept_P = torch.where(rank_P < limit_E[asked_P], asked_P, E)
    served_SK = torch.empty_like(experts_SK)
    served_SK[order_S] = kept_P.view(K, S).T
    return served_SK


class Priority(ABC):
    """The order in which tokens are served.

    Attributes:
        is_causal: whether no later token is served before an earlier one's same choice.
    """

    is_causal: ClassVar[bool] = False
    summary: ClassVar[str] = ""

    @staticmethod
    @abstractmethod
    def order(routing: Routing, mask_S: Tensor, training: bool) -> Tensor:
        """The tokens in that order, int64 (S,); where padding stands in it does not matter."""


_PRIORITIES: Registry[type[Priority]] = Registry("overflow_priority")
register_priority, priority_names, priority_class = _PRIORITIES.register, _PRIORITIES.names, _PRIORITIES.find


@register_priority("position")
class ByPosition(Priority):
    """As tokens stand in the batch. Source: Lepikhin et al. 2020 (GShard); Fedus et al. 2021 (Switch)."""

    is_causal = True
    summary = "tokens are served as they stand in the batch; the default"

    @staticmethod
    def order(routing: Routing, mask_S: Tensor, training: bool) -> Tensor:
        return torch.arange(routing.logits_SE.shape[0], device=routing.logits_SE.device)


@register_priority("probability")
class ByProbability(Priority):
    """The surest first: by the largest probability of each token. Source: Riquelme et al. 2021 (batch-prioritised)."""

    summary = "the surest tokens first; best where capacity is short"

    @staticmethod
    def order(routing: Routing, mask_S: Tensor, training: bool) -> Tensor:
        probability_SE = routing.logits_SE.softmax(dim=-1).nan_to_num(nan=0.0)
        return probability_SE.max(dim=-1).values.argsort(descending=True, stable=True)


@register_priority("random")
class AtRandom(Priority):
    """By lot: drawn anew at each step while training, otherwise always the same, so that answers can be repeated."""

    summary = "by lot, so that late tokens of a batch are not always the ones that lose"

    @staticmethod
    def order(routing: Routing, mask_S: Tensor, training: bool) -> Tensor:
        generator = None if training else torch.Generator().manual_seed(0)
        # Lots for real tokens alone: padding must not change who is drawn.
        real, padding = mask_S.nonzero().flatten(), (~mask_S).nonzero().flatten()
        return torch.cat([real[torch.randperm(len(real), generator=generator).to(real.device)], padding])


class Capacity:
    """Limits the experts of a layer: ``factor`` times an even share each."""

    def __init__(self, factor: float, overflow: str, priority: str) -> None:
        if factor <= 0:
            raise ConfigError(f"capacity_factor is {factor}: expected a number above 0, or null for no limit")
        self.factor = factor
        self.overflow = overflow_class(overflow)
        self.priority = priority_class(priority)

    @classmethod
    def of(cls, config: Any) -> Capacity | None:
        """As a model's configuration says; None where it sets no limit."""
        if config.capacity_factor is None:
            return None
        return cls(config.capacity_factor, config.overflow, config.overflow_priority)

    @torch.no_grad()
    def serve(
        self, routing: Routing, mask_S: Tensor, top_k: int, *, training: bool, available: int | None = None
    ) -> Tensor:
        """Who serves each choice, int64 (S, K), E where nobody does; padding is never served.

        Args:
            mask_S: bool, False for padding, which takes no capacity.
            top_k: choices of a token that the capacity is reckoned by.
            available: experts that share them out, those held back left out; None for all E.
        """
        E = routing.logits_SE.shape[1]
        sharing = E if available is None else max(available, 1)
        capacity = expert_capacity(int(mask_S.sum()), sharing, top_k, self.factor)
        choices_SK = routing.experts_SK.masked_fill(~mask_S.unsqueeze(1), E)
        ranked_SE = routing.logits_SE if routing.ranked_SE is None else routing.ranked_SE
        return self.overflow.serve(choices_SK, ranked_SE, self.priority.order(routing, mask_S, training), capacity)
