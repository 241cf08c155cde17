"""What every kind of expert shares.

S flattened tokens, D model width, H hidden width, E experts, K experts a token, P = S*K pairs of token and expert.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ragmoe._errors import ConfigError
from ragmoe.gates.base import Routing


@dataclass(frozen=True)
class FeedForward:
    """The dense feed-forward network of a layer: ``down(act(up(x)))``, both with their biases.

    No tuple: accelerate would move what is in it to another device, which fails for weights that lie on the disk.
    """

    up: Callable[[Tensor], Tensor]
    act: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]

    def __call__(self, x_SD: Tensor) -> Tensor:
        return self.down(self.act(self.up(x_SD)))


def held_experts(config: Any) -> int:
    """How many experts a layer holds in memory: all E, or the slots of a model that brings them in on demand."""
    return int(getattr(config, "resident_experts", None) or config.experts)


class Experts(nn.Module, ABC):
    """E experts of one layer, built from a model's configuration (``hidden_size``, ``intermediate_size``, ``experts``).

    All parameters have the expert as their first dimension.

    Attributes:
        needs_dense: whether the layer keeps its dense network without being asked for a shared expert.
        has_rank: whether ``expert_rank`` means anything to it.
    """

    needs_dense: ClassVar[bool]
    has_rank: ClassVar[bool]
    summary: ClassVar[str] = ""

    def __init__(self, config: Any) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x_SD: Tensor, routing: Routing, dense: FeedForward | None) -> Tensor:
        """What the chosen experts answer, weighted: y_SD.

        Args:
            dense: the layer's own feed-forward network, where it has kept one.
        """

    def in_passes(
        self, x_SD: Tensor, routing: Routing, dense: FeedForward | None, passes: Iterable[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The same where not all chosen experts are here at once; here for kinds that add up single answers.

        Args:
            routing: its weights count, its experts do not.
            passes: pairs (int64, ascending; pair s*K + k is the k-th choice of token s) and for each the expert that
                answers it for as long as this pass lasts. A pair in no pass adds nothing. May be gone through again.
        """
        S, K = routing.weights_SK.shape
        weights_P1 = routing.weights_SK.reshape(-1, 1)
        y_PD = x_SD.new_zeros(S * K, x_SD.shape[1])
        for pairs_p, experts_p in passes:
            token_p = pairs_p // K
            alone = Routing(weights_P1[pairs_p], experts_p.unsqueeze(1), routing.logits_SE[token_p])
            y_PD[pairs_p] = self(x_SD[token_p], alone, None)
        y_SD = y_PD.view(S, K, -1).sum(dim=1)
        return y_SD + dense(x_SD) if dense is not None else y_SD

    @abstractmethod
    def reset_parameters(self) -> None:
        """Start as an untrained expert."""

    @abstractmethod
    def copy_dense(self, up: nn.Linear, down: nn.Linear, *, noise: float, generator: torch.Generator) -> float:
        """Start from a dense feed-forward network (upcycling).

        Args:
            noise: standard deviation of the noise that tells copies apart, relative to that of each matrix.

        Returns:
            The largest absolute deviation of a weight from the dense one; 0.0 where copies are exact.
        """

    @classmethod
    def merge(cls, experts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> MergedExpert:
        """One expert that stands for several: here the weighted mean of their tensors, which keeps all of it.

        Source: Wortsman et al. 2022 (model soups); experts copied from one network are still aligned.

        Args:
            experts: the tensors of each by name, without the dimension E.
            weights: one an expert, summing to one.
        """
        mean = {name: weighted_mean([expert[name] for expert in experts], weights) for name in experts[0]}
        norm = math.sqrt(sum(float(x.square().sum()) for x in mean.values()))
        return MergedExpert({name: x.to(experts[0][name].dtype) for name, x in mean.items()}, norm, norm)


class MergedExpert(NamedTuple):
    """What a merge gives: tensors without the dimension E, the norm of the exact mean, and how much of it they keep."""

    tensors: dict[str, Tensor]
    norm: float
    kept: float


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean, in float64."""
    total = tensors[0].double() * weights[0]
    for x, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + x.double() * weight
    return total


ExpertsType = TypeVar("ExpertsType", bound=type[Experts])
_EXPERTS: dict[str, type[Experts]] = {}


def register_experts(name: str) -> Callable[[ExpertsType], ExpertsType]:
    """Make a kind of expert known by name to configurations."""

    def add(experts: ExpertsType) -> ExpertsType:
        _EXPERTS[name] = experts
        return experts

    return add


def experts_names() -> list[str]:
    """The names of all kinds of expert."""
    return sorted(_EXPERTS)


def experts_class(name: str) -> type[Experts]:
    """The kind of expert of that name; ConfigError lists what exists."""
    if name not in _EXPERTS:
        raise ConfigError(f"there is no expert kind {name!r}; there are: {', '.join(experts_names())}")
    return _EXPERTS[name]


class Dispatch(NamedTuple):
    """Pairs of token and expert, sorted by expert, as grouped matrix products want them.

    Attributes:
        order_P: sorted position -> pair (pair s*K + k is the k-th choice of token s).
        back_P: pair -> sorted position.
        offsets_E: int32, the end of each expert's rows.
    """

    order_P: Tensor
    back_P: Tensor
    offsets_E: Tensor


def dispatch(experts_SK: Tensor, experts: int) -> Dispatch:
    """Sort the pairs of a routing by expert (stable, so that the result does not depend on chance)."""
    flat_P = experts_SK.reshape(-1)
    order_P = flat_P.argsort(stable=True)
    back_P = torch.empty_like(order_P)
    back_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    # Not bincount, which on a GPU waits for the largest value before it knows how long its result is.
    pairs_E = torch.zeros(experts, dtype=torch.int64, device=flat_P.device)
    offsets_E = pairs_E.scatter_add_(0, flat_P, torch.ones_like(flat_P)).cumsum(0).to(torch.int32)
    return Dispatch(order_P, back_P, offsets_E)


class _PermuteRows(torch.autograd.Function):
    """Rows in another order. The gradient is a gather as well, where indexing would scatter and add."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, order_P: Tensor, back_P: Tensor) -> Tensor:
        ctx.save_for_backward(order_P, back_P)
        return x_PD.index_select(0, order_P)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        order_P, back_P = ctx.saved_tensors
        # Through the same function, so that second derivatives exist.
        return permute_rows(gradients[0], back_P, order_P), None, None


def permute_rows(x_PD: Tensor, order_P: Tensor, back_P: Tensor) -> Tensor:
    """``x_PD[order_P]`` for a permutation and its inverse."""
    return _PermuteRows.apply(x_PD, order_P, back_P)
