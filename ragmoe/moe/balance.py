"""Losses of a batch's statistics: how its tokens are shared out over the experts.

An expert that is held back counts as one that nobody uses: where that is so, the losses stay finite, but their least
value is above that of a full set. S tokens, E experts, K experts a token, D domains (at most E).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ragmoe._errors import ModelError
from ragmoe.gates.routing import Routing
from ragmoe.gates.selection import selection_class
from ragmoe.moe.losses import LossInputs, RoutingLoss, register_loss, token_sum


@register_loss("load_balance")
class LoadBalance(RoutingLoss):
    """Switch's load balance: ``E * sum_e f_e p_e``, 1.0 when balanced, up to E when one expert takes all.

    ``f_e`` is the share of choices that fell on expert e (no gradient), ``p_e`` its mean probability. The choices of
    all K slots are counted.
    """

    summary = "the usual balance of choices; on by default"
    source = "Fedus et al. 2021 (Switch), equation 4"

    def sums(self, inputs: LossInputs) -> Tensor:
        probability_SE = probabilities(inputs.routing)
        choices_SE = inputs.routing.choices_SE().to(probability_SE.dtype)
        return torch.stack([token_sum(x_SE, inputs.mask_S) for x_SE in (choices_SE, probability_SE)])

    def value(self, sums: Tensor, tokens: Tensor) -> Tensor:
        # Where experts choose, or few are available, a token has not just K choices.
        load_E, probability_E = sums[0] / sums[0].sum().clamp(min=1), sums[1] / tokens
        return sums.shape[1] * (load_E * probability_E).sum()


@register_loss("gshard")
class GShard(RoutingLoss):
    """GShard's: the mean over experts of ``c_e / S * m_e``, 1/E**2 when balanced, up to 1/E when one expert takes all.

    ``c_e`` is how many tokens have expert e as their first choice (no gradient), ``m_e`` its mean probability. For K=1
    it is the load balance divided by E**2: its weight wants to be larger by as much.
    """

    summary = "balance of the first choices alone, where the second may go anywhere; 1/E**2 when balanced"
    source = "Lepikhin et al. 2020 (GShard), algorithm 1"

    def sums(self, inputs: LossInputs) -> Tensor:
        probability_SE = probabilities(inputs.routing)
        first = inputs.routing._replace(experts_SK=inputs.routing.experts_SK[:, :1])
        first_SE = first.choices_SE().to(probability_SE.dtype)
        return torch.stack([token_sum(x_SE, inputs.mask_S) for x_SE in (first_SE, probability_SE)])

    def value(self, sums: Tensor, tokens: Tensor) -> Tensor:
        return (sums[0] / tokens * sums[1] / tokens).mean()


@register_loss("importance")
class Importance(RoutingLoss):
    """The squared coefficient of variation of the importance: 0 when balanced, up to E - 1 when one expert takes all.

    An expert's importance is the sum of what the gate gives it, which is nothing where it is not chosen. (Over the
    probabilities of all experts it would be ``uniform`` times E**2.)
    """

    summary = "equal sums of gate weights, so that equally many choices may not hide small weights"
    source = "Shazeer et al. 2017, equations 6 and 7"

    def sums(self, inputs: LossInputs) -> Tensor:
        routing = inputs.routing
        S, E = routing.logits_SE.shape
        weights_SE = routing.logits_SE.new_zeros(S, E + 1)
        weights_SE = weights_SE.scatter_add(1, routing.experts_SK, routing.weights_SK.to(weights_SE.dtype))
        return token_sum(weights_SE[:, :E], inputs.mask_S)

    def value(self, sums: Tensor, tokens: Tensor) -> Tensor:
        return _squared_variation(sums)


@register_loss("load")
class Load(RoutingLoss):
    """The squared coefficient of variation of the smooth load: 0 when balanced, up to E - 1 when one expert takes all.

    An expert's load is the sum over tokens of how likely it would be chosen again under other noise
    (``Routing.load_SE``): a count of choices that has a gradient.
    """

    summary = "equal numbers of choices with a gradient of their own; for noisy top-k alone, beside importance"
    source = "Shazeer et al. 2017, appendix A"

    def check(self, config: Any) -> None:
        if not selection_class(config.selection).estimates_load:
            raise ModelError(
                f"the loss 'load' counts how likely each expert would be chosen under other noise, but the selection "
                f"{config.selection!r} has no noise of its own",
                hint="model.selection=noisy_top_k, or balance by model.losses.importance or model.balance_loss",
            )

    def sums(self, inputs: LossInputs) -> Tensor:
        if inputs.routing.load_SE is None:
            raise ModelError(
                "the loss 'load' counts how likely each expert would be chosen under other noise, but the gate's "
                "selection has no noise of its own: expected noisy top-k",
                hint="model.selection=noisy_top_k; it makes its estimate while training",
            )
        return token_sum(inputs.routing.load_SE, inputs.mask_S)

    def value(self, sums: Tensor, tokens: Tensor) -> Tensor:
        return _squared_variation(sums)


@register_loss("uniform")
class Uniform(RoutingLoss):
    """The mean square of ``p_e - 1/E``, with ``p_e`` the mean probability: 0 when even, up to (E - 1)/E**2."""

    summary = "even mean probabilities whatever is chosen; the mildest, and blind to unbalanced choices"
    source = "Riquelme et al. 2021 (V-MoE): its importance loss, divided by E**2"

    def sums(self, inputs: LossInputs) -> Tensor:
        return token_sum(probabilities(inputs.routing), inputs.mask_S)

    def value(self, sums: Tensor, tokens: Tensor) -> Tensor:
        probability_E = sums / tokens
        # Their mean is 1/E, and zero where there is not one token.
        return (probability_E - probability_E.mean()).square().mean()


@register_loss("domain")
class Domain(RoutingLoss):
    """``ln E - I(domain; expert)`` in nats, from the mean probabilities of each domain's tokens.

    That is ``H(expert | domain) + KL(mean over tokens || uniform)``: each domain keeps to few experts, while the tokens
    of all domains together stay shared out evenly. 0 where there are as many domains as experts and each has its own;
    ln E where the domain says nothing. A domain counts by its tokens; tokens without one count nowhere. A batch of one
    domain has no gradient at all, which is why small micro-batches teach little with ``scope: micro``.
    """

    summary = "specialise experts by domain, while the tokens of all domains stay balanced; needs domains"
    source = "Chen et al. 2023 (Mod-Squad), with domains for tasks"
    needs_domain = True

    def check(self, config: Any) -> None:
        if config.expert_names is None:
            raise ModelError(
                "the loss 'domain' knows domains by the experts that are named after them, and they have no names",
                hint="name the experts after the domains: model.expert_names=[...]",
            )

    def sums(self, inputs: LossInputs) -> Tensor:
        if inputs.domain_S is None:
            raise ModelError(
                "the loss 'domain' needs the domain of each question, and the batch has no question_domain",
                hint="bring it with model.recall(neighbours, index, domains)",
            )
        probability_SE = probabilities(inputs.routing)
        E = probability_SE.shape[1]
        known_S = (inputs.mask_S & (inputs.domain_S >= 0)).to(probability_SE.dtype)
        joint_DE = probability_SE.new_zeros(E, E)
        return joint_DE.index_add(0, inputs.domain_S.clamp(min=0), probability_SE * known_S.unsqueeze(1))

    def value(self, sums: Tensor, tokens: Tensor) -> Tensor:
        # Each token adds one; by something far smaller the gradients of no token at all would be infinite.
        joint_DE = sums / sums.sum().clamp(min=1)
        entropy_D, entropy_E, entropy_DE = (_entropy(p) for p in (joint_DE.sum(dim=1), joint_DE.sum(dim=0), joint_DE))
        # Times the whole mass, which is one, and zero where there is not one token.
        return math.log(sums.shape[1]) * joint_DE.sum() - (entropy_D + entropy_E - entropy_DE)


def load_balance_loss(routing: Routing, mask_S: Tensor) -> Tensor:
    """``load_balance`` of a batch that is a whole step; ``mask_S`` is bool, False for padding."""
    return LoadBalance()(LossInputs(routing, mask_S))


def probabilities(routing: Routing) -> Tensor:
    """The softmax of the logits, (S, E); zero for an expert that is not available, also where none is."""
    # Where no expert is available the softmax of -inf is NaN.
    return routing.logits_SE.softmax(dim=-1).masked_fill(routing.logits_SE.isneginf(), 0.0)


def _squared_variation(x_E: Tensor) -> Tensor:
    mean = x_E.mean()
    return (x_E - mean).square().mean() / mean.square().clamp(min=1e-12)


def _entropy(p: Tensor) -> Tensor:
    # Clamped, because the gradient of p log p is infinite at zero.
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum()
