"""Retrieval-conditioned Mixture-of-Experts routing.

Names are loaded at first use, so that ``import ragmoe`` costs nothing:

    index = ragmoe.Index.open("indexes/city")
    model = ragmoe.load("runs/city/bundle")
    answers = model.answer(["When does the archive open?"], index)

The Auto classes of transformers know our decoders after ``import ragmoe.models.families``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ragmoe._errors import (
    BundleError,
    ConfigError,
    DataError,
    EncoderMismatchError,
    IndexFolderError,
    IndexLockedError,
    ModelError,
    RagmoeError,
    UsageError,
)
from ragmoe._version import __version__

if TYPE_CHECKING:
    from ragmoe.corpus.types import Passage, Question
    from ragmoe.evaluation import evaluate
    from ragmoe.gates import Routing
    from ragmoe.index import Hit, Index
    from ragmoe.models import Answer, OutputCache, load
    from ragmoe.models.families import load_decoder
    from ragmoe.moe import RoutingStatistics
    from ragmoe.neighbours import Neighbours
    from ragmoe.training import train

_LAZY = {
    "Answer": "ragmoe.models",
    "Hit": "ragmoe.index",
    "Index": "ragmoe.index",
    "Neighbours": "ragmoe.neighbours",
    "OutputCache": "ragmoe.models",
    "Passage": "ragmoe.corpus.types",
    "Question": "ragmoe.corpus.types",
    "Routing": "ragmoe.gates",
    "RoutingStatistics": "ragmoe.moe",
    "evaluate": "ragmoe.evaluation",
    "load": "ragmoe.models",
    "load_decoder": "ragmoe.models.families",
    "train": "ragmoe.training",
}

__all__ = [
    "Answer",
    "BundleError",
    "ConfigError",
    "DataError",
    "EncoderMismatchError",
    "Hit",
    "Index",
    "IndexFolderError",
    "IndexLockedError",
    "ModelError",
    "Neighbours",
    "OutputCache",
    "Passage",
    "Question",
    "RagmoeError",
    "Routing",
    "RoutingStatistics",
    "UsageError",
    "__version__",
    "evaluate",
    "load",
    "load_decoder",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module at first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'ragmoe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
