"""Gates: what chooses the experts of each token. A new gate is one file here and one test."""

from ragmoe.gates.attention import NeighbourAttention
from ragmoe.gates.base import Gate, GateSettings, Routing, gate_class, gate_names, register_gate
from ragmoe.gates.domain import CentroidGate, FittedDomainGate, OracleGate, RidgeGate
from ragmoe.gates.memory import MemoryGate, RetrievalMemoryGate
from ragmoe.gates.pooled import PooledGate
from ragmoe.gates.retrieval import RetrievalGate
from ragmoe.gates.token import TokenGate

__all__ = [
    "CentroidGate",
    "FittedDomainGate",
    "Gate",
    "GateSettings",
    "MemoryGate",
    "NeighbourAttention",
    "OracleGate",
    "PooledGate",
    "RetrievalGate",
    "RetrievalMemoryGate",
    "RidgeGate",
    "Routing",
    "TokenGate",
    "gate_class",
    "gate_names",
    "register_gate",
]
