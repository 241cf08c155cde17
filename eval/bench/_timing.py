"""What the speed benchmarks share: runs taken by turns, their medians, and the options of the command line."""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

Run = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Clock:
    """Times runs by turns, so that what slows the machine down slows all of them.

    Attributes:
        rounds: how often each is timed at most, after once that does not count.
        seconds: no round is begun after so many, once there are three.
        device: is waited for.
    """

    rounds: int
    seconds: float
    device: str = "cpu"

    def medians(self, runs: Mapping[Name, Run]) -> dict[Name, float]:
        """The median of the seconds that each run took."""
        for run in runs.values():
            run()
        taken: dict[Name, list[float]] = {name: [] for name in runs}
        names, begin = list(runs), time.perf_counter()
        for turn in range(self.rounds):
            if turn >= 3 and time.perf_counter() - begin > self.seconds:
                break
            # What runs before leaves its traces in memory and caches, and two that multiply the same sizes help each
            # other: of several equal ones the first has oneDNN compile its products, which keeps but so many.
            for name in random.Random(turn).sample(names, len(names)):
                taken[name].append(self._seconds(runs[name]))
        return {name: median(values) for name, values in taken.items()}

    def _seconds(self, run: Run) -> float:
        self._wait()
        begin = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def where_time_goes(run: Run, *, device: str = "cpu", top: int = 8) -> list[list[str]]:
    """The operations that take most of a run's time by themselves: name, share, number of calls."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    run()
    with torch.profiler.profile(activities=activities) as found:
        run()
    spent = {
        event.key: (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total, event.count)
        for event in found.key_averages()
    }
    total = sum(time for time, _ in spent.values())
    longest = sorted(spent.items(), key=lambda item: -item[1][0])[:top]
    return [[f"`{name}`", f"{time / total:.1%}", str(count)] for name, (time, count) in longest]


FORWARD, BOTH = "forward", "forward+backward"


def passes(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Run]:
    """What is timed of a module: its forward pass alone, and with the backward pass to all parameters and to x."""
    grad = torch.randn_like(x)

    def once() -> None:
        with torch.no_grad():
            forward(x)

    def both() -> None:
        module.zero_grad(set_to_none=True)
        forward(x.detach().requires_grad_()).backward(grad)

    return {FORWARD: once, BOTH: both}


def options(description: str | None, name: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options that the speed benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each is timed at most")
    parser.add_argument("--only", default="", metavar="REGEX", help="the cases to run, by their names (see stderr)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, and nothing else")
    parser.add_argument("--out", type=Path, default=Path(f"eval/results/{name}.json"))
    return parser


def chosen(case: object, only: str) -> bool:
    """Whether a case is to be run; if it is, says so on stderr."""
    if not re.search(only, str(case)):
        return False
    print(case, file=sys.stderr, flush=True)
    return True
