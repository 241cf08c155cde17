"""Freed memory stays with the process, where the C library can be told so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from ragmoe._memory import keep_freed_memory

# Page faults while large tensors are made and freed, again and again, in a process of its own.
FAULTS = """
import resource, sys
import torch
if sys.argv[1] == "keep":
    from ragmoe._memory import keep_freed_memory
    assert keep_freed_memory({})
def work():
    for _ in range(10):
        torch.ones(16_000_000)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_what_the_user_has_set_up_wins(name: str) -> None:
    assert not keep_freed_memory({name: "1"})


KEPT = """
import torch
from ragmoe._memory import give_back_freed_memory, keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
assert keep_freed_memory({})
# What is freed lies below what is still in use.
freed, used = torch.ones(16_000_000), torch.ones(1000)
del freed
kept = resident()
give_back_freed_memory()
print(kept - resident())
"""


@on_glibc
def test_freed_memory_can_be_given_back_all_the_same() -> None:
    given = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, check=True).stdout
    assert int(given) > 50_000_000


@pytest.mark.slow
@on_glibc
def test_freed_tensors_are_used_again() -> None:
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "plain")
    }
    assert faults["keep"] * 10 < faults["plain"]
