"""Several processes that encode one index together, on one machine or several that share its folder.

``torchrun --nproc-per-node=2 -m ragmoe index build ...`` starts them. Of W processes rank n encodes the blocks of
passages n, n + W, n + 2 W and so on; the first rank holds the lock, waits for the others, and does all the rest. What
it writes is what one process would have written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from ragmoe._errors import IndexFolderError
from ragmoe._threads import import_torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Others may encode for days; one that died is noticed by its connection, and by torchrun.
_PATIENCE = timedelta(days=100)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def launched(cls) -> Ranks:
        """As torchrun says in the environment; the only one where nothing is said."""
        rank, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
        return cls(int(rank), int(count)) if rank.isdigit() and count.isdigit() else cls()

    @contextmanager
    def joined(self) -> Iterator[Meeting]:
        """Meet the others; a process by itself meets nobody.

        Raises:
            IndexFolderError: another ended before its work was done, here and at each meeting.
        """
        if self.count == 1:
            yield Meeting(None)
            return
        import_torch()
        import torch.distributed as dist

        own = not dist.is_initialized()
        with _others_live():
            if own:
                dist.init_process_group("gloo", timeout=_PATIENCE)
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        try:
            yield Meeting(group)
        finally:
            if own:
                dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the processes of one run wait for each other; None where there is but one."""

    _group: ProcessGroup | None

    def hear(self, word: bool) -> bool:
        """The word of the first rank, whatever the others say."""
        if self._group is None:
            return word
        import torch
        from torch.distributed import broadcast

        said = torch.tensor(int(word))
        with _others_live():
            broadcast(said, src=0, group=self._group)
        return bool(said)

    def wait(self) -> None:
        """Come back once all are here."""
        if self._group is not None:
            from torch.distributed import barrier

            with _others_live():
                barrier(group=self._group)


@contextmanager
def _others_live() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise IndexFolderError(
            f"another of the processes ended before its work was done, or was never there: {reason}",
            hint="what they encoded is kept: give the same command with --resume, which redoes only what is missing",
        ) from error
