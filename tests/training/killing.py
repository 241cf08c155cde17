"""A training run that is killed in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ragmoe.training.trainer import RagmoeTrainer


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Expect a run inside, and end it by an exception as it computes the loss of a step, counted from 1."""

    class KilledError(Exception):
        pass

    steps = 0
    real = RagmoeTrainer.compute_loss

    def until_killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            raise KilledError
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RagmoeTrainer, "compute_loss", until_killed)
        with pytest.raises(KilledError):
            yield
