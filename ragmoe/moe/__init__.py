"""The MoE layer, its losses and its statistics."""

from ragmoe.moe.layer import MoELayer
from ragmoe.moe.losses import load_balance_loss, z_loss
from ragmoe.moe.statistics import RoutingStatistics, SequenceRouting, count_routing
from ragmoe.moe.summary import NeighbourSummary

__all__ = [
    "MoELayer",
    "NeighbourSummary",
    "RoutingStatistics",
    "SequenceRouting",
    "count_routing",
    "load_balance_loss",
    "z_loss",
]
