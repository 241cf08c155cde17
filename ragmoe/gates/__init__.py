"""Gates: what chooses the experts of each token. A new gate is one file here and one test."""

from ragmoe.gates.attention import NeighbourAttention
from ragmoe.gates.base import Gate, GateSettings, gate_class, gate_names, register_gate
from ragmoe.gates.clusters import ClusterGate
from ragmoe.gates.context import ContextGate
from ragmoe.gates.domain import CentroidGate, FittedDomainGate, OracleGate, RidgeGate
from ragmoe.gates.hierarchical import HierarchicalGate
from ragmoe.gates.memory import MemoryGate, RetrievalMemoryGate
from ragmoe.gates.mlp import MlpGate
from ragmoe.gates.modality import ModalityGate
from ragmoe.gates.pooled import PooledGate
from ragmoe.gates.retrieval import RetrievalGate
from ragmoe.gates.routing import Routing, Tokens
from ragmoe.gates.scores import Scores, register_scores, scores_class, scores_names
from ragmoe.gates.selection import Selection, register_selection, selection_class, selection_names
from ragmoe.gates.task import TaskGate
from ragmoe.gates.token import SoftmaxGate, TokenGate

__all__ = [
    "CentroidGate",
    "ClusterGate",
    "ContextGate",
    "FittedDomainGate",
    "Gate",
    "GateSettings",
    "HierarchicalGate",
    "MemoryGate",
    "MlpGate",
    "ModalityGate",
    "NeighbourAttention",
    "OracleGate",
    "PooledGate",
    "RetrievalGate",
    "RetrievalMemoryGate",
    "RidgeGate",
    "Routing",
    "Scores",
    "Selection",
    "SoftmaxGate",
    "TaskGate",
    "TokenGate",
    "Tokens",
    "gate_class",
    "gate_names",
    "register_gate",
    "register_scores",
    "register_selection",
    "scores_class",
    "scores_names",
    "selection_class",
    "selection_names",
]
