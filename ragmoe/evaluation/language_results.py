"""What an arm of an experiment with language models has found, as it lies on the disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragmoe.evaluation.experiment import VALID
from ragmoe.evaluation.experiment_folder import ExperimentFolder
from ragmoe.evaluation.perplexity import DocumentLoss
from ragmoe.evaluation.samples import digest_of, write_text

if TYPE_CHECKING:
    from ragmoe.corpus.types import Passage

FILE = "perplexity.json"


@dataclass(frozen=True)
class LanguageResults:
    """What one arm with one seed makes of the documents.

    Attributes:
        documents: digest of the documents and of the index, by which runs know that they are of the same.
        model: digest of the model and of how it reads; empty in files that are older than it.
        parameters: ``active`` and ``total``.
        losses: by what the gates were shown (``real`` and perturbations), of each document.
        routing: ``RoutingStatistics.summary`` under the real neighbours; None for a model without a choice.
    """

    documents: str
    model: str
    parameters: dict[str, int]
    losses: dict[str, list[DocumentLoss]]
    routing: dict[str, Any] | None

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        losses = {name: [astuple(loss) for loss in found] for name, found in self.losses.items()}
        content = {"documents": self.documents, "model": self.model, "parameters": self.parameters, "losses": losses}
        write_text(folder / FILE, json.dumps({**content, "routing": self.routing}) + "\n")

    def is_of(self, documents: str, model: str) -> bool:
        """Whether it was measured on these documents with this model."""
        return self.documents == documents and self.model in ("", model)

    @classmethod
    def load(cls, folder: Path) -> LanguageResults | None:
        """Read it back; None where there is none, or none that is whole."""
        try:
            content = json.loads((folder / FILE).read_text(encoding="utf-8"))
            losses = {name: [DocumentLoss(*row) for row in rows] for name, rows in content.pop("losses").items()}
            return cls(losses=losses, **{"model": "", **content})
        except (OSError, ValueError, KeyError, TypeError):
            return None


def results_place(folder: ExperimentFolder, arm: str, seed: int, setting: str) -> Path:
    """Where the results of an arm lie in one setting: with the arm itself where the documents have no setting."""
    return folder.place(arm, seed) / setting if setting != VALID else folder.place(arm, seed)


def documents_digest(documents: Sequence[Passage], index: str) -> str:
    """Of the documents that are predicted and of the index their neighbours come from."""
    return digest_of([(document.id, document.domain, document.text) for document in documents], index)
