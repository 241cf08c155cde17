"""What routing by neighbours costs: counted on one gate of the model's own size, whichever gate it is.

A gate is small, also in a large model, and a gate of somebody else's is known by its ``logits`` alone. So one is run on
a question of one token and on one of two: the difference is what a token costs, the rest what a question costs.

S tokens, N neighbours, R encoder width, L sparse layers, E experts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ragmoe.gates import Gate
from ragmoe.moe import NeighbourSummary
from ragmoe.neighbours import Neighbours

SeesNeighbours = Gate | NeighbourSummary


@torch.no_grad()
def neighbour_flops(module: SeesNeighbours, config: Any) -> tuple[int, int]:
    """FLOPs of a gate's logits, or of a neighbours' summary: those of a token, and those of a question.

    Args:
        module: on any device; a copy without its weights is run.
        config: a ``RagmoeBertConfig``.
    """
    empty: Any = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.zero_()
    one, two = (_count(empty, torch.zeros(tokens, config.hidden_size), _some(config)) for tokens in (1, 2))
    return two - one, 2 * one - two


def _count(module: SeesNeighbours, x_SD: Tensor, neighbours: Neighbours) -> int:
    # The counter knows no fused attention on a CPU; the kernel in plain matrix products does the same work.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if isinstance(module, Gate):
            module.logits(x_SD, neighbours if module.uses_neighbours else None)
        else:
            module(x_SD.unsqueeze(0), neighbours)
    return counter.get_total_flops()


def _some(config: Any) -> Neighbours:
    """Of one question, as many as the configuration says, and with all that a gate may ask for."""
    N, L = config.neighbours, len(config.resolved_sparse_layers())
    return Neighbours(
        torch.zeros(1, N, config.neighbour_width),
        torch.zeros(1, N),
        torch.ones(1, N, dtype=torch.bool),
        votes_BNLE=torch.zeros(1, N, L, config.experts),
        domain_B=torch.zeros(1, dtype=torch.int64),
    )
