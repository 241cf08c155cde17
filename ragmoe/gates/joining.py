"""Which gates take one expert more."""

from __future__ import annotations

from ragmoe.gates.base import gate_class
from ragmoe.gates.selection import selection_class


def why_none_can_join(gate: str, selection: str = "top_k", groups: int = 1) -> tuple[str, str | None] | None:
    """Why a model with such a gate takes no new expert, and what to do about it; None where it takes one.

    Args:
        gate, selection: as in a model's configuration.
        groups: of one size that the experts stand in.
    """
    kind = gate_class(gate)
    another_gate = "train with another gate first: ragmoe train CONFIG.yaml model.gate=retrieval"
    if kind.uses_domain:
        return (
            f"the gate {gate!r} knows its experts by the domains it was built with; it takes no new one",
            another_gate,
        )
    if why := kind.fixed_experts:
        return f"the gate {gate!r} takes no new expert: {why}", another_gate
    if not selection_class(selection).takes_bias:
        return (
            f"experts choose their tokens ({selection}): a new one would take its share of every text, whatever its "
            "gate says",
            "train with another selection first: ragmoe train CONFIG.yaml model.selection=top_k",
        )
    if groups > 1:
        return f"the experts stand in {groups} groups of one size (n_group): none can join alone", None
    return None
