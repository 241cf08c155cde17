"""What every kind of expert shares.

S flattened tokens, D model width, H hidden width, E experts, K experts a token, P = S*K pairs of token and expert.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ragmoe._registry import Registry
from ragmoe.experts.key_value import KeyValueExperts
from ragmoe.experts.low_rank import mean_product
from ragmoe.gates.routing import Routing


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
        partial: whether some slots of a routing may be served by nobody.
        key_value: experts for the keys and values of the layer's attention, with ``moe_attention``.
        drops: whether the weight of those is lost, so that only the residual stays of a token without any expert.
        sums_to_one: whether each token's weights sum to one, which is cheaper to mix; set by the layer.
    """

    needs_dense: ClassVar[bool]
    has_rank: ClassVar[bool]
    summary: ClassVar[str] = ""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.partial = self.drops = self.sums_to_one = False
        self.key_value = KeyValueExperts(config) if getattr(config, "moe_attention", False) else None

    def allow_empty(self, *, drops: bool) -> None:
        """Expect slots that nobody serves; see ``partial`` and ``drops``."""
        self.partial, self.drops = True, drops

    @abstractmethod
    def forward(self, x_SD: Tensor, routing: Routing, dense: FeedForward | None) -> Tensor:
        """What the experts answer that serve the tokens, weighted: y_SD.

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
        y_PD = x_SD.new_zeros(S * K, x_SD.shape[1])
        for pairs_p, experts_p in passes:
            token_p = pairs_p // K
            one_p1 = routing.weights_SK.new_ones(len(pairs_p), 1)
            alone = Routing(one_p1, experts_p.unsqueeze(1), routing.logits_SE[token_p])
            y_PD[pairs_p] = self(x_SD[token_p], alone, None)
        y_SD = self.weighed(y_PD.view(S, K, x_SD.shape[1]), routing.weights_SK)
        return y_SD + dense(x_SD) if dense is not None else y_SD

    def weighed(self, y_SKD: Tensor, weights_SK: Tensor) -> Tensor:
        """The weighted sum of single answers, y_SD, made as the kernel of the experts makes it."""
        return (y_SKD * weights_SK.unsqueeze(-1)).sum(dim=1)

    def reset_parameters(self) -> None:
        """Start as untrained experts."""
        if self.key_value is not None:
            self.key_value.reset_parameters()

    def kept_weights(self, routing: Routing) -> Tensor:
        """The weights of those that serve, zero in slots that are empty."""
        if not self.partial:
            return routing.weights_SK
        return routing.weights_SK.masked_fill(routing.experts_SK == routing.logits_SE.shape[1], 0.0)

    def key_values(self, x_SD: Tensor, routing: Routing) -> Tensor | None:
        """What the experts add to keys and values, (S, 2 D) side by side; None without ``moe_attention``."""
        if self.key_value is None:
            return None
        return self.key_value(x_SD, routing, self.kept_weights(routing), self.partial)

    @abstractmethod
    def copy_dense(self, up: nn.Linear, down: nn.Linear, *, noise: float, generator: torch.Generator) -> float:
        """Start from a dense feed-forward network (upcycling).

        Args:
            noise: standard deviation of the noise that tells copies apart, relative to that of each matrix.

        Returns:
            The largest absolute deviation of a weight from the dense one; 0.0 where copies are exact.
        """

    @classmethod
    def merge_all(cls, experts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> MergedExpert:
        """``merge`` for all of an expert's tensors, those of attention included."""
        mark = "key_value."
        one = cls.merge([{n: x for n, x in e.items() if not n.startswith(mark)} for e in experts], weights)
        if mark + "a" not in experts[0]:
            return one
        product = mean_product([(e[mark + "a"], e[mark + "b"]) for e in experts], weights)
        tensors = one.tensors | {mark + "a": product.a, mark + "b": product.b}
        return MergedExpert(tensors, math.hypot(one.norm, product.norm), math.hypot(one.kept, product.kept))

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


_EXPERTS: Registry[type[Experts]] = Registry("expert kind")
register_experts, experts_names, experts_class = _EXPERTS.register, _EXPERTS.names, _EXPERTS.find
