"""What some losses ask of a layer besides its routing, taken while the layer runs and only where a loss asks.

S tokens of B questions, D model width, E experts, K experts a token, P pairs of token and expert, N neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ragmoe.experts.base import Experts, FeedForward
from ragmoe.gates.base import Gate
from ragmoe.gates.routing import Routing, Tokens
from ragmoe.neighbours import Neighbours


class Swap(NamedTuple):
    """For each question the neighbours of another, and whether the two can be compared, bool (B,)."""

    other: Neighbours
    compared_B: Tensor


@dataclass(frozen=True)
class Asked:
    """Which parts of a ``Probe`` are wanted.

    Attributes:
        swap: the other questions' neighbours; None takes another question of the same batch.
    """

    swapped: bool
    outputs: bool
    swap: Swap | None = None


class Swapped(NamedTuple):
    """What a gate makes of the same tokens under two questions' neighbours, without noise or token dropout.

    Attributes:
        own_SE: float32, the logits under the question's own neighbours; -inf for an expert that is not available.
        other_SE: the same under another question's.
        compared_S: bool, False where one of both has no neighbours, or both have the same.
    """

    own_SE: Tensor
    other_SE: Tensor
    compared_S: Tensor


class Probe(NamedTuple):
    """What was asked for, the rest None.

    Attributes:
        swapped: None too where the batch has no neighbours.
        outputs_SKD: what each expert that serves a token answers by itself, unweighted; zero for a slot that nobody
            serves. For experts that stand beside a dense network, what they add to it.
    """

    swapped: Swapped | None = None
    outputs_SKD: Tensor | None = None


def take_probe(
    gate: Gate,
    experts: Experts,
    x_SD: Tensor,
    routed_SD: Tensor,
    routing: Routing,
    neighbours: Neighbours | None,
    tokens: Tokens | None,
    dense: FeedForward | None,
    asked: Asked,
) -> Probe:
    """Look at one layer, whose gate has just routed ``routed_SD`` by ``neighbours``.

    Args:
        x_SD: what the experts see.
        dense: the network that the experts stand beside, where there is one.
    """
    return Probe(
        swapped_logits(gate, routed_SD, neighbours, tokens, asked.swap)
        if asked.swapped and neighbours is not None
        else None,
        own_outputs(experts, x_SD, routing, dense) if asked.outputs else None,
    )


def swapped_logits(
    gate: Gate, x_SD: Tensor, neighbours: Neighbours, tokens: Tokens | None = None, given: Swap | None = None
) -> Swapped:
    """The gate's logits under each question's own neighbours and under another's: those given, or see ``swap``."""
    other, compared_B = swap(neighbours) if given is None else given
    tokens = Tokens.of(x_SD) if tokens is None else tokens
    own_SE, other_SE = (
        gate.placed_logits(x_SD, of, tokens).float().masked_fill(~gate.available, -torch.inf)
        for of in (neighbours, other)
    )
    return Swapped(own_SE, other_SE, compared_B.repeat_interleave(x_SD.shape[0] // len(neighbours)))


def swap(neighbours: Neighbours) -> Swap:
    """For each question the neighbours of another of these, and whether the two can be compared.

    The other question is the next in the order of their best scores: so it does not depend on the batch's own order.
    """
    has_B = neighbours.mask_BN.any(dim=1)
    best_B = neighbours.scores_BN.masked_fill(~neighbours.mask_BN, -torch.inf).amax(dim=1)
    # Questions without neighbours come first; the last goes on with the first that has some.
    order_B = best_B.argsort(stable=True)
    B = len(neighbours)
    first = (B - has_B.sum()).clamp(max=B - 1).view(1)
    after_B = torch.cat([torch.arange(1, B, device=first.device), first])
    partner_B = torch.empty_like(order_B)
    partner_B[order_B] = order_B[after_B]
    other = neighbours.rows(partner_B)  # type: ignore[arg-type]
    same_B = (other.embeddings_BNR == neighbours.embeddings_BNR).flatten(1).all(dim=1)
    return Swap(other, has_B & has_B[partner_B] & ~same_B)


def swap_in_step(batches: Sequence[Neighbours]) -> list[Swap]:
    """``swap`` among all questions of an optimiser step, for each of its micro-batches."""
    other, compared_B = swap(Neighbours.stack(batches))
    found, begin = [], 0
    for batch in batches:
        rows = range(begin, begin := begin + len(batch))
        found.append(Swap(other.rows(rows), compared_B[rows.start : rows.stop]))
    return found


def own_outputs(experts: Experts, x_SD: Tensor, routing: Routing, dense: FeedForward | None) -> Tensor:
    """What each serving expert answers by itself: ``Probe.outputs_SKD``."""
    served_SK = serving(routing)
    token_P, slot_P = torch.where(served_SK < routing.logits_SE.shape[1])
    outputs_SKD = x_SD.new_zeros(*served_SK.shape, x_SD.shape[1])
    if not len(token_P):
        return outputs_SKD
    # What is added is a difference, and that of two bf16 numbers would be mostly their rounding.
    with nullcontext() if dense is None else torch.autocast(x_SD.device.type, enabled=False):
        if dense is not None:
            x_SD = x_SD.to(next(experts.parameters()).dtype)
        x_PD = x_SD[token_P]
        alone = Routing(
            x_PD.new_ones(len(token_P), 1), served_SK[token_P, slot_P].unsqueeze(1), routing.logits_SE[token_P]
        )
        y_PD = experts(x_PD, alone, dense)
        if dense is not None:
            y_PD = y_PD - dense(x_SD)[token_P]
    return outputs_SKD.to(y_PD.dtype).index_put((token_P, slot_P), y_PD)


def serving(routing: Routing) -> Tensor:
    """The expert that serves each choice, int64 (S, K); E where none does."""
    E = routing.logits_SE.shape[1]
    served_SK = routing.experts_SK if routing.served_SK is None else routing.served_SK
    closed_SK = routing.logits_SE.gather(1, served_SK.clamp(max=E - 1)).isneginf()
    return served_SK.masked_fill(closed_SK, E)
