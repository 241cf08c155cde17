"""What every model with mixtures of experts shares: how it starts, runs its experts, is counted and is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ragmoe._errors import ModelError
from ragmoe.experts import AUTO, Experts
from ragmoe.gates import Gate, Selection, gate_class
from ragmoe.models.saving import BundleMixin
from ragmoe.moe import NeighbourSummary
from ragmoe.moe.layer import experts_a_token


class SparseModel(BundleMixin):
    """A pretrained model of any family whose feed-forward networks are mixtures of experts."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the text of the model's own file, where ours is not: silently eager.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in transformers, but ours is the one that is taken where none is asked for."""
        return super().get_correct_experts_implementation(AUTO if requested_experts is None else requested_experts)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As in transformers, but ModelError for re-entrant checkpointing: it loses the routing losses' gradients."""
        # Where nothing is said of it torch takes the re-entrant way.
        how = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if how["use_reentrant"]:
            raise ModelError("re-entrant checkpointing loses the gradients of the routing losses: set it to False")
        super().activation_checkpointing_enable(how, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gate):
            # Not saved, so from_pretrained leaves it as uninitialised memory.
            init.ones_(module.available)
            init.zeros_(module.balance_bias)
        if isinstance(module, Gate | Selection | Experts | NeighbourSummary):
            module.reset_parameters()

    @property
    def sparse_layers(self) -> list[int]:
        """The places of the sparse layers among all layers."""
        return self.config.resolved_sparse_layers()

    @property
    def gate_sees_neighbours(self) -> bool:
        """Whether the gate, or the neighbours' summary, would do anything with neighbours."""
        looks = gate_class(self.config.gate).uses_neighbours or self.config.neighbour_summary
        return bool(self.sparse_layers) and looks

    @property
    def gates(self) -> list[Gate]:
        """The gates of the sparse layers, first to last."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    @property
    def expert_names(self) -> list[str]:
        """A name for each expert."""
        return self.config.expert_names or [f"expert {i}" for i in range(self.config.experts)]

    def parameter_counts(self) -> dict[str, int]:
        """Total parameters, and active ones: every parameter used for one token, gates included."""
        total = sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for module in self.expert_modules().values() for p in module.parameters())
        if (store := self.expert_store) is not None:
            whole = experts * store.experts // store.resident
            total, experts = total + whole - experts, whole
        active = total - experts + experts * experts_a_token(self.config) // self.config.experts
        return {"total": total, "active": active}
