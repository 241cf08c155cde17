"""The MoE layer, its losses and its statistics."""

from ragmoe.moe.balance import load_balance_loss
from ragmoe.moe.layer import MoELayer
from ragmoe.moe.losses import LossInputs, RoutingLoss, StepTotals, loss_names, register_loss, routing_loss
from ragmoe.moe.statistics import MOST, RoutingStatistics, SequenceRouting, count_routing, fetch_sums, routing_sums
from ragmoe.moe.summary import NeighbourSummary
from ragmoe.moe.token_losses import TokenLoss, z_loss

__all__ = [
    "MOST",
    "LossInputs",
    "MoELayer",
    "NeighbourSummary",
    "RoutingLoss",
    "RoutingStatistics",
    "SequenceRouting",
    "StepTotals",
    "TokenLoss",
    "count_routing",
    "fetch_sums",
    "load_balance_loss",
    "loss_names",
    "register_loss",
    "routing_loss",
    "routing_sums",
    "z_loss",
]
