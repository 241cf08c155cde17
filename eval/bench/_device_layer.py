"""One large layer on a GPU, by its share of what a dense matrix product reaches there."""

from __future__ import annotations

import torch
from _layers import DTYPES, Case, by_kernel, gated
from _result import row
from _timing import BOTH, FORWARD, Clock, Run, passes
from transformers.integrations.sonicmoe import is_sonicmoe_loadable

# To be beaten on an H200: what was published of plain grouped products, and of fused Triton kernels.
PLAIN = {FORWARD: 0.24, BOTH: 0.24}
FUSED = {FORWARD: 0.51, BOTH: 0.42}


def device_rows(clock: Clock, case: Case, side: int = 8192) -> list[dict]:
    """Our gated layer by ``grouped_mm``, and by sonicmoe where that installs, to a dense product of ``side`` cubed."""
    ours, x = gated(case)["gated"], case.input()
    targets = {"grouped_mm": PLAIN}
    if case.device == "cuda" and is_sonicmoe_loadable():
        targets["sonicmoe"] = FUSED
    a, b = (torch.randn(side, side, device=case.device, dtype=DTYPES[case.dtype]) for _ in range(2))
    runs: dict[tuple[str, str], Run] = {("dense product", FORWARD): lambda: a @ b}
    for kernel in targets:
        forward = by_kernel(ours.module, kernel, ours.flops).forward
        runs |= {(kernel, way): run for way, run in passes(ours.module, forward, x).items()}
    seconds = clock.medians(runs)
    best = 2.0 * side**3 / seconds["dense product", FORWARD] / 1e12
    return [
        row(str(case), f"{kernel} to a dense product, {way}", times * ours.flops / seconds[kernel, way] / 1e12,
            baseline=best, target=target[way], unit="TFLOP/s")
        for kernel, target in targets.items()
        for way, times in ((FORWARD, 1), (BOTH, 3))
    ]  # fmt: skip
