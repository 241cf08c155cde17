"""Run by the crash test: builds over an index once for each crash point, in a forked child that dies there for good.

    python crash_driver.py STORE OLD_CORPUS NEW_CORPUS

Makes STORE/POINT/index for each point. A real death by `os._exit`: no `finally`, no `except`, no flush.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from stub_encoder import StubEncoder

from ragmoe._threads import import_faiss
from ragmoe.index import BuildOptions, _crash, blocks, build_index


def die_at(point: str) -> None:
    seen = []

    def hook(reached: str) -> None:
        seen.append(reached)
        if reached == point and (point != "block" or seen.count("block") == 2):
            os._exit(9)

    _crash.hook = hook


def main() -> None:
    blocks.BLOCK = 5
    store, old, new = map(Path, sys.argv[1:])
    import_faiss()  # once, before the forks
    for point in _crash.POINTS:
        child = os.fork()
        if child == 0:
            out = store / point / "index"
            build_index(BuildOptions((str(old),), out, encoder=StubEncoder()))
            die_at(point)
            build_index(BuildOptions((str(new),), out, encoder=StubEncoder(), overwrite=True))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(point, os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
