"""Gates: what chooses the experts of each token. A new gate is one file here and one test."""

from ragmoe.gates.base import Gate, GateSettings, Routing, gate_class, gate_names, register_gate
from ragmoe.gates.pooled import PooledGate
from ragmoe.gates.retrieval import RetrievalGate
from ragmoe.gates.token import TokenGate

__all__ = [
    "Gate",
    "GateSettings",
    "PooledGate",
    "RetrievalGate",
    "Routing",
    "TokenGate",
    "gate_class",
    "gate_names",
    "register_gate",
]
