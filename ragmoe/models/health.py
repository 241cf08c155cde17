"""Which experts of a model hold values that are no numbers, and what is said where it answers with such."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from ragmoe._errors import ModelError
from ragmoe.models.digest import on_demand_layers


class BrokenExpert(NamedTuple):
    """An expert with NaN or infinity in its tensors.

    Attributes:
        expert: its place among the experts of the model.
        name: its name.
        tensors: the names of the tensors, in all layers.
    """

    expert: int
    name: str
    tensors: list[str]


def broken_experts(model: Any) -> list[BrokenExpert]:
    """The experts of a reader that hold NaN or infinity, in their own tensors or in their gate rows.

    Experts on demand are read from their files, one by one.
    """
    found: dict[int, list[str]] = {}
    state = model.state_dict()
    # Each expert's own: one row of a fused tensor says nothing of the others.
    pieces: dict[str, Iterable[Tensor]] = {name: state[name] for name in model.expert_tensors()}
    for prefix, layer in on_demand_layers(model):
        for own, _ in layer.slots.named_parameters():
            pieces.pop(f"{prefix}.slots.{own}", None)
            pieces[f"{prefix}.{own}"] = layer.pieces(own)
    for name, of_experts in sorted(pieces.items(), key=itemgetter(0)):
        for expert, x in enumerate(of_experts):
            if not x.isfinite().all():
                found.setdefault(expert, []).append(name)
    return [BrokenExpert(expert, model.expert_names[expert], found[expert]) for expert in sorted(found)]


def require_numbers(model: Any, *found: Tensor) -> None:
    """ModelError that names the broken expert, where there is one, instead of an answer drawn from NaN."""
    if not any(x.isnan().any() for x in found):
        return
    if not hasattr(model, "expert_tensors"):
        raise ModelError("the model answers NaN: its weights are broken")
    broken = [expert for expert in broken_experts(model) if expert.expert not in model.held_back]
    if not broken:
        raise ModelError("the model answers NaN, though all of its experts hold numbers: its other weights are broken")
    names = [expert.name for expert in broken]
    raise ModelError(
        f"expert {', '.join(names)} holds NaN or infinity in {broken[0].tensors[0]}",
        hint=f"answer without it: --without {' --without '.join(names)}, or model.hold_back({names})",
    )
