"""Which expert lies in which slot, and what that has brought: the bookkeeping of experts on demand, without tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, fields


class SlotTable:
    """N slots for experts; where none is free, the least recently used expert gives its slot up."""

    def __init__(self, slots: int) -> None:
        # Least recently used first.
        self._slot_of: OrderedDict[int, int] = OrderedDict()
        self._free = list(reversed(range(slots)))

    def __contains__(self, expert: int) -> bool:
        return expert in self._slot_of

    def experts(self) -> list[int]:
        """The experts that have a slot, the least recently used first."""
        return list(self._slot_of)

    def use(self, expert: int) -> int:
        """The slot of an expert that has one; it is now the most recently used."""
        self._slot_of.move_to_end(expert)
        return self._slot_of[expert]

    def free(self, keep: Container[int]) -> tuple[int, int | None]:
        """A slot to fill, and the expert that had to leave it, if any; those in ``keep`` stay."""
        if self._free:
            return self._free.pop(), None
        leaving = next(expert for expert in self._slot_of if expert not in keep)
        return self._slot_of.pop(leaving), leaving

    def fill(self, expert: int, slot: int) -> None:
        """The expert lies in this slot now, and is the most recently used."""
        self._slot_of[expert] = slot


@dataclass
class Counters:
    """What was asked of the slots of a layer; an expert that several tokens of a batch chose is asked for once.

    Attributes:
        hits: an expert that was asked for had a slot.
        misses: it had to be read first.
        prefetched: experts read before they were asked for.
        prefetched_used: those of them that were then asked for before they had to leave.
        evictions: experts that had to leave their slot.
        bytes_read: of tensors, from the files.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    evictions: int = 0
    bytes_read: int = 0

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counters)))

    @property
    def hit_rate(self) -> float | None:
        """The share of hits; None where nothing was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None
