"""Ctrl-C and SIGTERM while training: the step that is under way is finished and kept, and the run can go on from it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback


class StopCallback(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint; the next signal stops at once."""

    def __init__(self) -> None:
        self.came: int | None = None
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals inside, where Python can and they are not ignored; then stop, where one came.

        Raises:
            KeyboardInterrupt: it was SIGINT.
            SystemExit: it was SIGTERM; with the code of a process that it has ended.
        """
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        handlers = {number: signal.getsignal(number) for number in numbers}
        self._before = {n: handler for n, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
        for number in self._before:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            self._give_back()
        if self.came == signal.SIGINT:
            raise KeyboardInterrupt
        if self.came is not None:
            raise SystemExit(128 + self.came)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.came is not None:
            control.should_log = control.should_save = control.should_training_stop = True

    def _hear(self, number: int, _: Any) -> None:
        self.came = number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
