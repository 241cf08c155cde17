"""The gate whose neighbours vote by what they are about, where nobody has labelled them.

B questions, N neighbours, R encoder width, E experts.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import initialization as init

from ragmoe.gates.base import GateSettings, register_gate
from ragmoe.gates.memory import VotingGate
from ragmoe.neighbours import Neighbours


@register_gate("clusters")
class ClusterGate(VotingGate):
    """Each neighbour votes for the expert in whose cluster it lies.

    The clusters are those of the passages of the index that it is trained with, as many as there are experts, found
    before the first step (``ragmoe.training.clusters``); their centroids belong to the gate, so passages of any index
    of the same encoder vote. Before, no neighbour votes. Source: Gururangan et al. 2023 (c-BTM), whose clusters choose
    an expert for the text itself.
    """

    own_parameters: ClassVar[tuple[str, ...]] = (*VotingGate.own_parameters, "centroids")
    fixed_experts = "its clusters divide what it was trained with among the experts it has"
    summary = "token state plus a vote of each neighbour for the expert in whose cluster it lies; needs no labels"

    def __init__(self, settings: GateSettings) -> None:
        self.centroids: Tensor
        super().__init__(settings)
        self.register_buffer("centroids", torch.zeros(settings.experts, settings.neighbour_width))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # The base class resets before this class has made its own.
        if hasattr(self, "centroids"):
            init.zeros_(self.centroids)

    @property
    def is_ready(self) -> bool:
        """Whether its clusters were found."""
        return bool(self.centroids.any())

    def votes(self, neighbours: Neighbours) -> Tensor:
        centroids_ER = self.centroids.float()
        nearness_BNE = F.linear(neighbours.embeddings_BNR.float(), centroids_ER)
        votes_BNE = F.one_hot(nearness_BNE.argmax(dim=-1), self.settings.experts).float()
        return votes_BNE * (neighbours.mask_BN.unsqueeze(-1) & centroids_ER.any())
