"""What a model adds to the neighbours an index returned: their votes for its experts, and the question's domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ragmoe._errors import ModelError
from ragmoe.gates import gate_class
from ragmoe.index.memory import ExpertMemory, recall_memory
from ragmoe.neighbours import Neighbours

if TYPE_CHECKING:
    from ragmoe.index import Index


class MemoryMixin:
    """``recall`` and ``check_index`` for a model with gates.

    Attributes:
        bundle_digests: of the versions of the bundle it was loaded from or saved to, newest first.
    """

    config: Any
    bundle_digests: Sequence[str] = ()

    if TYPE_CHECKING:

        @property
        def sparse_layers(self) -> list[int]: ...

        @property
        def expert_names(self) -> list[str]: ...

        @property
        def gate_sees_neighbours(self) -> bool: ...

    def check_index(self, index: Index) -> None:
        """Raise ModelError unless the index was made with the encoder that the gate learned to read.

        An untrained gate reads any of its width.
        """
        trained, have = self.config.encoder, index.manifest.encoder
        if self.gate_sees_neighbours and not trained and have.width != self.config.neighbour_width:
            raise ModelError(
                f"the model's gate reads embeddings of width {self.config.neighbour_width}, the index holds those of "
                f"{have.id}, of width {have.width}",
                hint=f"a gate for this index: ragmoe init ... --neighbour-width {have.width}",
            )
        if self.gate_sees_neighbours and trained and have.digest != trained["digest"]:
            raise ModelError(
                f"the model's gate was trained on embeddings of {trained['id']} ({trained['digest'][:12]}), "
                f"the index holds those of {have.id} ({have.digest[:12]})",
                hint=f"ragmoe index build SOURCE --encoder {trained['id']} --out DIR",
            )

    def memory(self, index: Index) -> ExpertMemory | None:
        """The expert memory that the gates use with an index; None for gates without memory."""
        if not (self.sparse_layers and gate_class(self.config.gate).uses_votes):
            return None
        key = (index.digest, tuple(self.bundle_digests))
        if getattr(self, "_memory", (None, None))[0] != key:
            ids = self.config.expert_ids or list(range(self.config.experts))
            found = recall_memory(index, self.expert_names, ids, self.sparse_layers, self.bundle_digests)
            self._memory = (key, found)
        return self._memory[1]

    def forget_memory(self) -> None:
        """Look again, with the next question, at what is recorded with an index."""
        self.__dict__.pop("_memory", None)

    def recall(
        self, neighbours: Neighbours, index: Index, domains: Sequence[str] | None = None, *, guess: bool = False
    ) -> Neighbours:
        """The neighbours with what the gates want beside their embeddings; as they are where that is nothing.

        Args:
            domains: of the questions: for the oracle gate, where only an evaluation knows them, and for losses.
            guess: the neighbours are no passages of the index (see ``ExpertMemory.guess``).

        Raises:
            ModelError: the oracle gate was given no domains.
        """
        memory = self.memory(index)
        if memory is not None:
            neighbours = memory.recall(neighbours, index, guess=guess)
        routed = bool(self.sparse_layers) and gate_class(self.config.gate).uses_domain
        if routed and domains is None:
            raise ModelError("the oracle gate routes by the questions' domains, which only an evaluation knows")
        learned = any(loss.needs_domain for loss in self.config.further_losses().values())
        if domains is not None and (routed or learned):
            names = self.expert_names
            at = [names.index(domain) if domain in names else -1 for domain in domains]
            neighbours = replace(neighbours, domain_B=torch.tensor(at, dtype=torch.long))
        return neighbours
