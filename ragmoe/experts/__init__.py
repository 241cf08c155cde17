"""Experts: what a gate chooses from."""

from ragmoe.experts.base import Experts, FeedForward, experts_class, experts_names, register_experts
from ragmoe.experts.ffn import FeedForwardExperts
from ragmoe.experts.glu import GluExperts
from ragmoe.experts.kernel import AUTO
from ragmoe.experts.key_value import KeyValueExperts
from ragmoe.experts.lora import LoraExperts

__all__ = [
    "AUTO",
    "Experts",
    "FeedForward",
    "FeedForwardExperts",
    "GluExperts",
    "KeyValueExperts",
    "LoraExperts",
    "experts_class",
    "experts_names",
    "register_experts",
]
