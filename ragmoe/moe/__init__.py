"""The MoE layer, its losses and its statistics."""

from ragmoe.moe.layer import MoELayer
from ragmoe.moe.losses import load_balance_loss, z_loss
from ragmoe.moe.statistics import RoutingStatistics
from ragmoe.moe.summary import NeighbourSummary

__all__ = ["MoELayer", "NeighbourSummary", "RoutingStatistics", "load_balance_loss", "z_loss"]
