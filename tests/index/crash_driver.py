"""Run by the crash tests: lets builds and changes of indexes die for good, in forked children.

    python crash_driver.py points STORE          at each crash point of each command: leaves STORE/COMMAND-POINT
    python crash_driver.py limits STORE SIZE...  an addition, where no file can grow beyond a size
    python crash_driver.py random STORE SEED N   by kill -9 at N random moments, and checks what is left
    python crash_driver.py rebuilds STORE N      none dies: builds STORE/a anew N times, of one corpus and another

A real death by `os._exit` or SIGKILL: no `finally`, no `except`, no flush. Prints a line for each.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from small_corpus import rows
from stub_encoder import StubEncoder

from ragmoe._threads import import_faiss
from ragmoe.index import (
    BuildOptions,
    Index,
    _crash,
    blocks,
    build_index,
    plan_add,
    plan_merge,
    plan_remove,
    verify_index,
)
from ragmoe.index.manifest import read_manifest

ALL = [str(row["id"]) for row in rows()]
#: For each command: the ids before, and after. ``merge`` writes over an index of six.
BEFORE = {"build": ALL[:6], "add": ALL[:10], "remove": ALL, "merge": ALL[:6]}
#: As many passages each, so that no size tells a mixture of both.
SIDES = {"a": ALL[:14], "b": ALL[10:]}
AFTER = {"build": ALL, "add": ALL, "remove": [*ALL[:8], *ALL[16:]], "merge": ALL}


def write(path: Path, ids: list[str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows() if row["id"] in ids))
    return str(path)


def prepare(store: Path) -> None:
    """An index for each command to start from, and what it reads."""
    for name, ids in {**BEFORE, **SIDES}.items():
        build_index(BuildOptions((write(store / f"{name}.jsonl", ids),), store / name, encoder=StubEncoder()))
    write(store / "all.jsonl", ALL)


def go(store: Path, command: str, folder: Path, *, resume: bool = False) -> None:
    """Run a command over a folder."""
    everything = str(store / "all.jsonl")
    if command == "build":
        # Where nothing was begun, --resume alone is no licence to replace what is there.
        options = {"resume": resume, "overwrite": True}
        build_index(BuildOptions((everything,), folder, encoder=StubEncoder(), **options))
    elif command == "merge":
        plan_merge(store / "a", store / "b", folder, resume=resume, overwrite=True).run()
    elif command == "add":
        plan_add(folder, [everything], encoder=StubEncoder(), resume=resume).run()
    else:
        plan_remove(folder, domain="market", resume=resume).run()


def check(store: Path, command: str, folder: Path) -> str:
    """What is wrong with what a death left and with how it goes on; '' if nothing."""
    for expected in ((BEFORE[command], AFTER[command]), (AFTER[command],)):
        problems = verify_index(folder, encoder=StubEncoder())
        index = Index.open(folder, encoder=StubEncoder())
        if problems or index.passage_ids not in expected:
            return f"{problems} {index.passage_ids}"
        if index.search(["the tide"], 1)[0][0].passage_id != "river-3":
            return "search"
        go(store, command, folder, resume=True)
    left = {path.name for path in folder.iterdir()} - {"manifest.json", "build.lock", "README.md"}
    generation = index.manifest.generation
    return "" if left == {name.split("/")[0] for name in Index.open(folder).manifest.files} else f"{generation} {left}"


def forked(work: Callable[[], object]) -> int:
    """The id of a child that does some work and leaves with 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_points(store: Path) -> None:
    for command in BEFORE:
        for point in _crash.POINTS:
            folder = Path(shutil.copytree(store / command, store / f"{command}-{point}"))

            def work(command: str = command, point: str = point, folder: Path = folder) -> None:
                seen = []

                def hook(reached: str) -> None:
                    seen.append(reached)
                    if reached == point and (point != "block" or seen.count("block") == 3):
                        os._exit(9)

                _crash.hook = hook
                go(store, command, folder)

            print(command, point, ended(forked(work)), flush=True)


def at_random(store: Path, seed: int, count: int) -> None:
    chance = random.Random(seed)
    takes = {}
    for command in BEFORE:
        folder = Path(shutil.copytree(store / command, store / f"{command}-timed"))
        start = time.perf_counter()
        ended(forked(lambda: go(store, command, folder)))  # noqa: B023
        takes[command] = time.perf_counter() - start
    for number in range(count):
        command = chance.choice(list(BEFORE))
        folder = Path(shutil.copytree(store / command, store / "victim"))
        # Twice: what goes on after a death may die too.
        for resume in (False, True):
            child = forked(lambda: go(store, command, folder, resume=resume))  # noqa: B023
            time.sleep(chance.uniform(0, 1.1 * takes[command]))
            os.kill(child, signal.SIGKILL)
            ended(child)

        def judge() -> None:
            if found := check(store, command, folder):  # noqa: B023
                raise AssertionError(found)

        print(number, command, ended(forked(judge)), flush=True)
        shutil.rmtree(folder)


def at_limits(store: Path, sizes: list[int]) -> None:
    """Let an addition meet a disk on which no file can grow beyond a size; go on with the next size."""
    folder = Path(shutil.copytree(store / "add", store / "add-limited"))

    def limited(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        go(store, "add", folder, resume=True)

    for size in sizes:
        code = ended(forked(lambda: limited(size)))  # noqa: B023
        ended(forked(lambda: print(*verify_index(folder, encoder=StubEncoder()), end="", flush=True)))
        print(size, code, read_manifest(folder).passages, flush=True)


def rebuilds(store: Path, count: int) -> None:
    """Once told to, replace an index of "a" of `SIDES` by one of "b", and that by one of "a" again."""
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(count):
        source = str(store / f"{'ba'[number % 2]}.jsonl")
        build_index(BuildOptions((source,), store / "a", encoder=StubEncoder(), overwrite=True))


def command(*words: object) -> tuple[list[str], dict[str, str]]:
    """How this file is run in a process of its own, and its environment."""
    root = Path(__file__).parents[2]
    paths = f"{root}{os.pathsep}{root / 'tests'}"
    return [sys.executable, __file__, *map(str, words)], {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def drive(*words: object, timeout: int) -> list[list[str]]:
    """Run this file in a process of its own; what it printed, by line and word."""
    line, environment = command(*words)
    done = subprocess.run(
        line,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=timeout,
    )
    return [line.split() for line in done.stdout.splitlines()]


def main() -> None:
    blocks.BLOCK = 5
    mode, store = sys.argv[1], Path(sys.argv[2])
    import_faiss()  # once, before the forks
    prepare(store)
    if mode == "points":
        at_points(store)
    elif mode == "limits":
        at_limits(store, [int(size) for size in sys.argv[3:]])
    elif mode == "rebuilds":
        rebuilds(store, int(sys.argv[3]))
    else:
        at_random(store, int(sys.argv[3]), int(sys.argv[4]))


if __name__ == "__main__":
    main()
