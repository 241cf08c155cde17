"""What configurations call by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ragmoe._errors import ConfigError

T = TypeVar("T")
Member = TypeVar("Member", bound=type[Any])


class Registry(dict[str, T]):
    """Classes by name.

    Args:
        what: what they are, for messages.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def register(self, name: str) -> Callable[[Member], Member]:
        """A decorator that makes a class known by a name."""

        def add(member: Member) -> Member:
            self[name] = member  # type: ignore[assignment]
            return member

        return add

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self)

    def find(self, name: str) -> T:
        """The class of that name; ConfigError lists what exists."""
        if name not in self:
            raise ConfigError(f"there is no {self.what} {name!r}; there are: {', '.join(self.names())}")
        return self[name]
