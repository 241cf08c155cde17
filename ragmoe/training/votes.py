"""Whether there is anything that could vote, and what becomes of what was recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ragmoe._errors import ModelError

if TYPE_CHECKING:
    from ragmoe.index import Index
    from ragmoe.index.memory import ExpertMemory


def memory_of(model: Any, index: Index | None) -> ExpertMemory | None:
    """What the passages of an index vote in a model's gates; None for gates that count no recorded votes."""
    return model.memory(index) if index is not None and hasattr(model, "memory") else None


def check_votes(model: Any, index: Index | None, say: Callable[[str], object] | None) -> None:
    """Say where a gate counts recorded votes and no passage of the index has one.

    Args:
        say: called with a line that says so.

    Raises:
        ModelError: a loss is to learn from votes, of which there are none.
    """
    memory = memory_of(model, index)
    if memory is None or index is None or memory.affinity_PLE.any():
        return
    names = ", ".join(model.config.expert_names or ()) or "unnamed"
    told = (
        f"no passage of {index.folder} votes for an expert: nothing is recorded of it, and none is of a domain that an "
        f"expert is named after; the experts are {names}, the domains {', '.join(sorted(set(index.domains)))}"
    )
    if learning := [name for name, loss in model.config.further_losses().items() if loss.needs_votes]:
        raise ModelError(
            f"the loss {learning[0]!r} learns from votes, and {told}",
            hint="name the experts after the domains: model.expert_names=[...]",
        )
    if say is not None:
        say(f"{told}. Until `ragmoe index annotate` has recorded some, the gate {model.config.gate!r} counts none")


def say_left_behind(base: str, model: Any, index: Index | None, say: Callable[[str], object] | None) -> None:
    """Say where a model was trained on with votes that are recorded with its base, which the new bundle has not."""
    memory = memory_of(model, index)
    if memory is None or index is None or not memory.bundle or say is None:
        return
    say(
        f"what {index.folder} has recorded with {base} is not carried over to the trained model: record it anew with "
        f"ragmoe index annotate {index.folder} --model DIR --questions FILE"
    )
