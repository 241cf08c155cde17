"""How a model comes to bring in its experts on demand: between reading a bundle and handing the model over.

    model = ragmoe.load("runs/halvern", resident_experts=2)
    model.answer(questions, index)
    model.expert_store.summary()["hit_rate"]

What slots are and how they are filled is in ragmoe/experts/on_demand.py.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ragmoe._errors import ModelError
from ragmoe.bundle import BundleMap, ExpertFiles
from ragmoe.experts import Experts, GluExperts
from ragmoe.experts.on_demand import ExpertStore, OnDemandExperts, OnDemandFused
from ragmoe.moe import MoELayer
from ragmoe.moe.block import SparseBlock
from ragmoe.neighbours import Neighbours


def is_expert_weight(name: str) -> bool:
    """Whether a fused tensor is the experts' own, which stays in the files, and not their rows of a gate."""
    return ".experts." in name


class Slots:
    """Room for N of a bundle's experts in each layer of a model that is being loaded."""

    def __init__(self, folder: str | os.PathLike[str], bundle: BundleMap, resident: int) -> None:
        """Say how much room; more than there are experts is room for all of them.

        Raises:
            ModelError: for less than one, or a bundle without experts.
        """
        if resident < 1:
            raise ModelError(f"resident_experts is {resident}: expected at least 1")
        self._names = [name for name in bundle.fused if is_expert_weight(name)]
        if not self._names:
            raise ModelError(f"{folder} has no experts, so there are none to bring in on demand")
        if any(".experts.key_value." in name for name in self._names):
            raise ModelError(
                f"the experts of {folder} add to keys and values of attention (moe_attention), and cannot be brought "
                "in on demand",
                hint="load it without resident_experts",
            )
        self._files = ExpertFiles(os.fspath(folder), bundle)
        self._resident = min(resident, len(bundle.experts))

    def reserve(self, config: Any) -> tuple[Any, dict[str, Tensor]]:
        """A copy of the configuration that has layers of so many experts built, and what to load them with: nothing."""
        config = copy.deepcopy(config)
        config.resident_experts = self._resident
        first = self._files.read(0, self._names)
        return config, {name: torch.zeros(self._resident, *x.shape, dtype=x.dtype) for name, x in first.items()}

    def hand_over(self, model: Any, prefix: str) -> ExpertStore:
        """Put the model's experts into the files' care.

        Args:
            prefix: what names in the bundle have before those in the model.
        """
        # It was for building alone: whatever else reads the configuration finds all experts in it.
        del model.config.resident_experts
        layers = []
        for name, layer in model.named_modules():
            if isinstance(layer, MoELayer | SparseBlock):
                experts = _on_demand(layer.experts, model.config, self._files, f"{prefix}{name}.experts.")
                layer.add_module("experts", experts)
                layers.append((layer.gate if isinstance(layer, MoELayer) else layer.gate.inner, experts))
        model.requires_grad_(False)
        store = ExpertStore(layers, self._resident)
        model.base_model.register_forward_pre_hook(_ShowNeighbours(store, model.base_model), with_kwargs=True)
        return store


def _on_demand(slots: Any, config: Any, files: ExpertFiles, prefix: str) -> OnDemandExperts:
    """The experts of a layer, brought in from files that name their parameters with a prefix."""
    if isinstance(slots, Experts):
        names = {name: prefix + name for name, _ in slots.named_parameters()}
        return OnDemandExperts(slots, config.experts, files, names)
    names = {f"fused.{name}": prefix + name for name, _ in slots.named_parameters()}
    return OnDemandFused(GluExperts(config, slots), config.experts, files, names)


class _ShowNeighbours:
    """Lets a store see what neighbours come before the first layer runs; every family names them in ``forward``.

    While words are generated they are the same at every step, and are seen at the first.
    """

    def __init__(self, store: ExpertStore, base: Any) -> None:
        self._store, self._signature = store, inspect.signature(base.forward)

    def __call__(self, base: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if base.gate_sees_neighbours:
            given = self._signature.bind(*args, **named).arguments
            past = given.get("cache", given.get("past_key_values"))
            neighbours = Neighbours.from_tensors(given) if past is None or not past.get_seq_length() else None
            if neighbours is not None:
                self._store.prefetch(neighbours)
