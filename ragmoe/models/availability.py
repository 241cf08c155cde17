"""Which experts of a model may be chosen at all. E experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ragmoe._errors import ModelError
from ragmoe.gates import Gate


class AvailabilityMixin:
    """Holds experts of all layers back, and lets them in again."""

    if TYPE_CHECKING:
        config: Any

        @property
        def gates(self) -> list[Gate]: ...
        @property
        def expert_names(self) -> list[str]: ...

    @property
    def held_back(self) -> list[int]:
        """The places of the experts that no token goes to for now."""
        return (~self.gates[0].available).nonzero().flatten().tolist() if self.gates else []

    def set_available_experts(self, experts: Sequence[int] | None) -> None:
        """Let only these experts be chosen, in all layers; None lets all. ModelError for one that does not exist."""
        E = self.config.experts
        chosen = set(range(E) if experts is None else experts)
        if wrong := sorted(chosen - set(range(E))):
            raise ModelError(f"there are no experts {wrong}; the experts are 0 to {E - 1}")
        available_E = torch.tensor([expert in chosen for expert in range(E)])
        for gate in self.gates:
            gate.set_available(available_E)

    def hold_back(self, experts: Sequence[int | str]) -> None:
        """Let all experts be chosen but these, named or by their ids; ModelError for one that does not exist."""
        ids = self.config.expert_ids or list(range(self.config.experts))
        places = {**{name: at for at, name in enumerate(self.expert_names)}, **{id: at for at, id in enumerate(ids)}}
        wanted = [int(e) if isinstance(e, str) and e.isdigit() and e not in places else e for e in experts]
        if unknown := [e for e in wanted if e not in places]:
            raise ModelError(f"there is no expert {unknown[0]!r}; there are: {', '.join(self.expert_names)}")
        if wanted and not self.gates:
            raise ModelError("the model has no sparse layer, and so no expert that could be held back")
        held = {places[e] for e in wanted}
        self.set_available_experts([at for at in range(self.config.experts) if at not in held])
