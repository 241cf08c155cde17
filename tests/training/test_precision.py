"""Whether to train in bf16 is asked of the processor, and the question does not take long on any."""

from __future__ import annotations

import pytest
import torch

from ragmoe.training import build


class Clock:
    """Each reading is ``step`` seconds after the last."""

    def __init__(self, step: float) -> None:
        self.step, self.readings = step, 0

    def __call__(self) -> float:
        self.readings += 1
        return self.step * self.readings


@pytest.mark.parametrize(("seconds", "products"), [(1.0, 1), (0.2, 3), (0.001, 50)])
def test_a_slow_product_is_not_repeated(monkeypatch: pytest.MonkeyPatch, seconds: float, products: int) -> None:
    clock = Clock(seconds)
    monkeypatch.setattr(build.time, "perf_counter", clock)
    assert build.matmul_seconds(torch.float32) == pytest.approx(seconds)
    assert clock.readings == 2 * products


@pytest.mark.parametrize(("bf16", "expected"), [(0.5, True), (0.8, False), (100.0, False)])
def test_bf16_must_be_faster_by_a_margin(monkeypatch: pytest.MonkeyPatch, bf16: float, expected: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(build, "matmul_seconds", lambda dtype: bf16 if dtype == torch.bfloat16 else 1.0)
    assert build.wants_bf16("auto") is expected
    assert build.wants_bf16("bf16") is True and build.wants_bf16("fp32") is False
