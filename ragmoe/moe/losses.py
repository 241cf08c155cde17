"""What every routing loss shares: pure, masked, of one layer at a time (pooling layers lets their imbalances cancel).

A loss is a sum over tokens and a value of that sum: so it can be told the sum over a whole optimiser step, and then
does not depend on how the step is cut into micro-batches. S tokens (of B questions), E experts, K experts a token,
L sparse layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from ragmoe._registry import Registry
from ragmoe.gates.routing import Routing

if TYPE_CHECKING:
    from ragmoe.moe.probe import Swap


@dataclass(frozen=True)
class LossInputs:
    """What a loss sees of one layer.

    Attributes:
        routing: of the layer; its ``probe`` has what ``needs_swapped`` and ``needs_outputs`` ask for.
        mask_S: bool, False for padding, which counts nowhere.
        domain_S: int64, for ``needs_domain``: the place of the expert that each token's domain is named after, -1 where
            it is not known.
    """

    routing: Routing
    mask_S: Tensor
    domain_S: Tensor | None = None


class Totals(NamedTuple):
    """What a loss of a micro-batch is told of the optimiser step.

    Attributes:
        tokens: float32 (), the tokens of all its micro-batches that are no padding.
        parts: how many micro-batches there are; the mean of their losses is the loss of the step.
        sums: without a gradient, what ``RoutingLoss.sums`` gives, over all of them; None where the loss keeps to its
            own micro-batch.
    """

    tokens: Tensor
    parts: int
    sums: Tensor | None = None


@dataclass(frozen=True)
class StepTotals:
    """The same for several losses and all sparse layers; ``sums`` has L rows a loss.

    Attributes:
        swap: for a loss that compares two questions, the neighbours of others of the step, one a question of the
            micro-batch that is told; None where no loss does.
    """

    tokens: Tensor
    parts: int
    sums: Mapping[str, Tensor]
    swap: Swap | None = None

    def of(self, name: str, layer: int) -> Totals:
        """For one loss in one of the sparse layers, which are counted from 0."""
        return Totals(self.tokens, self.parts, self.sums[name][layer] if name in self.sums else None)


class RoutingLoss(ABC):
    """One routing loss. It has no state: a call is a pure function.

    Attributes:
        summary: when to use it, in one line; ``source`` is where it comes from.
        per_token: whether it is a mean over tokens. Such a loss is exact under gradient accumulation by the number of
            tokens in the step alone. The others are of a batch's statistics: cut into micro-batches, these are other
            statistics (the imbalance of each part, and not of the whole), unless the loss is told their sums.
        needs_domain: whether it needs ``LossInputs.domain_S``.
        needs_votes: whether it teaches nothing where no neighbour has a vote.
        needs_swapped: whether it needs the routing under another question's neighbours.
        needs_outputs: whether it needs what each chosen expert answers by itself.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    per_token: ClassVar[bool] = False
    needs_domain: ClassVar[bool] = False
    needs_votes: ClassVar[bool] = False
    needs_swapped: ClassVar[bool] = False
    needs_outputs: ClassVar[bool] = False

    @abstractmethod
    def sums(self, inputs: LossInputs) -> Tensor:
        """What the loss is a function of, summed over tokens: of two batches together, the sum of theirs."""

    @abstractmethod
    def value(self, sums: Tensor, tokens: Tensor) -> Tensor:
        """The loss, ().

        Args:
            sums: what ``sums`` gave.
            tokens: float32 (), at least 1: over how many tokens.
        """

    def check(self, config: Any) -> None:
        """Raise ModelError where a model's configuration leaves the loss nothing to do; here there is no such thing."""
        return

    def __call__(self, inputs: LossInputs, totals: Totals | None = None) -> Tensor:
        """The loss of one layer, ().

        Args:
            totals: where the batch is part of an optimiser step; None means that it is the whole step.

        Returns:
            With the step's ``sums`` the value of the whole step, the same for each micro-batch, with such a gradient
            that the mean over the micro-batches has that of the whole step.

        Raises:
            ModelError: the inputs lack what the loss needs.
        """
        sums = self.sums(inputs)
        tokens = inputs.mask_S.to(sums.dtype).sum()
        if totals is not None and (self.per_token or totals.sums is not None):
            tokens, sums = totals.tokens.to(sums), totals.parts * sums
            if totals.sums is not None:
                sums = sums + (totals.sums - sums).detach()
        return self.value(sums, tokens.clamp(min=1))


def token_sum(x_SX: Tensor, mask_S: Tensor) -> Tensor:
    """The sum over the tokens that are no padding, (X,)."""
    return (x_SX * mask_S.to(x_SX.dtype).unsqueeze(1)).sum(dim=0)


def loss_inputs(routings: Sequence[Routing], mask: Tensor, domain_B: Tensor | None) -> list[LossInputs]:
    """The inputs of each sparse layer.

    Args:
        mask: of S tokens in any shape, zero for padding.
        domain_B: of the questions, whose tokens are consecutive; B divides S.
    """
    mask_S = mask.reshape(-1).bool()
    domain_S = None if domain_B is None else domain_B.repeat_interleave(mask_S.shape[0] // domain_B.shape[0])
    return [LossInputs(routing, mask_S, domain_S) for routing in routings]


_LOSSES: Registry[type[RoutingLoss]] = Registry("routing loss")
register_loss, loss_names = _LOSSES.register, _LOSSES.names


def routing_loss(name: str) -> RoutingLoss:
    """The loss of that name; ConfigError lists what exists."""
    return _LOSSES.find(name)()
