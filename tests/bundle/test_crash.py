"""A writer that is killed at any point leaves a bundle that opens, bit-equal to the old version or to the new one."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ragmoe.bundle import MAP_NAME, _files, read_bundle, read_map, write_bundle

STEPS = ["base-2-00001-of-00001", "gate.2", "expert.0.2", "expert.1.2", "maps/1.json", MAP_NAME, "bundle.json"]


def state_of(version: int) -> dict[str, Tensor]:
    return {name: torch.full(shape, float(version)) for name, shape in (("base", (3,)), ("gate", (2,)), ("up", (2, 3)))}


def save(folder: Path, version: int) -> None:
    write_bundle(folder, state_of(version), expert_tensors={"up"}, gate_tensors={"gate"})


def forked(action: Callable[[], None]) -> int:
    """Run in a child process and return its id at once."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            action()
        finally:
            os._exit(0)
    return child


def killed(action: Callable[[], None]) -> None:
    """Run in a child that must be killed (SIGKILL: no handler, no clean-up) before it is done."""
    _, status = os.waitpid(forked(action), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the crash point was never reached"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def check(folder: Path, versions: set[int]) -> None:
    """It opens as one of the versions, and the next writer and reader are not disturbed by what is left."""
    found, map_ = read_bundle(folder, verify=True)
    assert map_.version in versions
    assert all(torch.equal(found[name], x) for name, x in state_of(map_.version).items())
    save(folder, map_.version + 1)
    after, newer = read_bundle(folder, verify=True)
    assert newer.version == map_.version + 1
    assert all(torch.equal(after[name], x) for name, x in state_of(newer.version).items())
    earlier, _ = read_bundle(folder, version=map_.version, verify=True)
    assert all(torch.equal(earlier[name], x) for name, x in state_of(map_.version).items())
    assert not list(folder.rglob(".writing-*"))


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_around_a_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, moment: str) -> None:
    save(tmp_path, 1)
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        here = str(Path(target).relative_to(tmp_path)).startswith(step)
        if here and moment == "before":
            die()
        rename(source, target)
        if here:
            die()

    monkeypatch.setattr(_files.os, "replace", replace)
    killed(lambda: save(tmp_path, 2))
    monkeypatch.undo()
    committed = step == "bundle.json" or (step, moment) == (MAP_NAME, "after")
    check(tmp_path, {2} if committed else {1})


def test_killed_in_the_middle_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
        die()

    monkeypatch.setattr(_files, "save_file", half)
    killed(lambda: save(tmp_path, 2))
    monkeypatch.undo()
    check(tmp_path, {1})


def test_killed_in_the_first_save_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == MAP_NAME:
            die()
        rename(source, target)

    monkeypatch.setattr(_files.os, "replace", replace)
    killed(lambda: save(tmp_path, 1))
    monkeypatch.undo()
    assert not (tmp_path / MAP_NAME).exists()
    save(tmp_path, 1)
    check(tmp_path, {1})


@pytest.mark.slow
def test_killed_at_random(tmp_path: Path) -> None:
    """Kill a child that saves one version after another, at moments that nobody chose."""

    def save_on(version: int) -> None:
        while True:
            version += 1
            save(tmp_path, version)

    start = time.perf_counter()
    save(tmp_path, 1)
    seconds = time.perf_counter() - start
    for _ in range(60):
        child = forked(functools.partial(save_on, read_map(tmp_path).version))
        time.sleep(random.uniform(0, 4 * seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child failed by itself"
        found, map_ = read_bundle(tmp_path, verify=True)
        assert all(torch.equal(found[name], x) for name, x in state_of(map_.version).items())
    assert read_map(tmp_path).version > 1, "no child lived long enough to save anything"
