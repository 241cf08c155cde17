"""Which experts of a model hold values that are no numbers."""

from __future__ import annotations

from typing import Any, NamedTuple


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
    """The experts of a reader that hold NaN or infinity, in their own tensors or in their gate rows."""
    found: dict[int, list[str]] = {}
    state = model.state_dict()
    for name in sorted(model.expert_tensors()):
        # Each expert's own: one row of a fused tensor says nothing of the others.
        sound_E = state[name].isfinite().view(len(state[name]), -1).all(dim=1)
        for expert in (~sound_E).nonzero().flatten().tolist():
            found.setdefault(expert, []).append(name)
    return [BrokenExpert(expert, model.expert_names[expert], found[expert]) for expert in sorted(found)]
