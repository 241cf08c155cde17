"""Experts: what a gate chooses from."""

from ragmoe.experts.base import Experts, FeedForward, experts_class, experts_names, register_experts
from ragmoe.experts.ffn import FeedForwardExperts
from ragmoe.experts.glu import GluExperts, gated
from ragmoe.experts.kernel import AUTO
from ragmoe.experts.key_value import KeyValueExperts
from ragmoe.experts.lora import LoraExperts, LoraGluExperts
from ragmoe.experts.start import Start, start_class, start_names

__all__ = [
    "AUTO",
    "Experts",
    "FeedForward",
    "FeedForwardExperts",
    "GluExperts",
    "KeyValueExperts",
    "LoraExperts",
    "LoraGluExperts",
    "Start",
    "experts_class",
    "experts_names",
    "gated",
    "register_experts",
    "start_class",
    "start_names",
]
