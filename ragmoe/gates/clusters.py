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
from ragmoe.gates.linear import expert_logits
from ragmoe.gates.memory import VotingGate
from ragmoe.neighbours import Neighbours


@register_gate("clusters")
class ClusterGate(VotingGate):
    """Each neighbour votes for the expert in whose cluster it lies.

    The clusters are those of the passages of the index that it is trained with, as many as there are experts, found
    before the first step (``ragmoe.training.place_clusters``); their centroids belong to the gate, so passages of any
    index of the same encoder vote. Until then no neighbour votes. Which cluster goes to which expert is left to chance:
    it is a gate for experts that begin alike. A new expert's cluster lies around its own documents, and the passages of
    an expert that is held back vote for the next nearest. Source: Gururangan et al. 2023 (c-BTM), whose clusters choose
    an expert for the text itself.
    """

    own_parameters: ClassVar[tuple[str, ...]] = (*VotingGate.own_parameters, "centroids")
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
        # A merged expert's centroid is a mean of two, which is shorter.
        centroids_ER = F.normalize(self.centroids.float(), dim=1)
        nearness_BNE = expert_logits(neighbours.embeddings_BNR.float(), centroids_ER)
        nearest_BN = nearness_BNE.masked_fill(~self.available, -torch.inf).argmax(dim=-1)
        votes_BNE = F.one_hot(nearest_BN, self.settings.experts).float()
        return votes_BNE * (neighbours.mask_BN.unsqueeze(-1) & centroids_ER.any())
