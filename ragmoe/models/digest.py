"""The weights of a model as a digest: two models with the same weights have the same, wherever they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ragmoe.experts.on_demand import OnDemandExperts


def weights_digest(model: Any) -> str:
    """sha256 over all weights by their names; experts on demand are read from their files, one by one."""
    weights: dict[str, tuple[str, Iterable[Tensor]]] = {
        name: (f"{name} {x.dtype} {tuple(x.shape)}", [x]) for name, x in model.state_dict().items()
    }
    for prefix, layer in on_demand_layers(model):
        for own, slots in layer.slots.named_parameters():
            del weights[f"{prefix}.slots.{own}"]
            # As if all experts were here, one below the other in memory.
            name = f"{prefix}.{own}"
            weights[name] = (f"{name} {slots.dtype} {(layer.experts, *slots.shape[1:])}", layer.pieces(own))
    digest = hashlib.sha256()
    for _, (head, pieces) in sorted(weights.items()):
        digest.update(head.encode())
        for x in pieces:
            digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def remembered_digest(model: Any) -> str:
    """The same, computed again only after a weight was changed or replaced.

    A change is seen by torch's own count of changes, which a write to ``parameter.data`` escapes.
    """
    slots = {id(x) for _, layer in on_demand_layers(model) for x in layer.slots.parameters()}
    held = [x for x in (*model.parameters(), *model.buffers()) if id(x) not in slots]
    if any(x.is_inference() for x in held):
        # Made under torch.inference_mode, where changes are not counted.
        return weights_digest(model)
    state = tuple((x.data_ptr(), x.dtype, x._version) for x in held)
    if getattr(model, "_digested", (None, ""))[0] != state:
        model._digested = (state, weights_digest(model))
    return str(model._digested[1])


def on_demand_layers(model: Any) -> list[tuple[str, OnDemandExperts]]:
    """The layers whose experts stay in their files, by name; none for a model that has all in memory."""
    if getattr(model, "expert_store", None) is None:
        return []
    return [(name, module) for name, module in model.named_modules() if isinstance(module, OnDemandExperts)]
