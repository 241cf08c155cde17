"""Run by the test of several processes, by torchrun: the program itself, with a stub encoder and small blocks.

    torchrun --nproc-per-node=2 ranks_driver.py FOLDER index build ...

Each rank leaves what it encoded for the index, an id a line, in FOLDER/encoded-RANK. With KILL set, the rank of this
number kills itself after its first block.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from stub_encoder import StubEncoder

from ragmoe.cli.main import main
from ragmoe.corpus import Passage
from ragmoe.index import _crash, blocks, build
from ragmoe.index.ahead import BlockEncoder
from ragmoe.index.blocks import Encoded


def run() -> int:
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    blocks.BLOCK = 5
    build.load_encoder = lambda name: StubEncoder()  # type: ignore[assignment]
    encode, ids = BlockEncoder.encode, []

    def noted(self: BlockEncoder, number: int, passages: Sequence[Passage]) -> Encoded:
        ids.extend(passage.id for passage in passages)
        return encode(self, number, passages)

    def kill(point: str) -> None:
        if point == "block":
            os.kill(os.getpid(), signal.SIGKILL)

    BlockEncoder.encode = noted  # type: ignore[method-assign]
    if os.environ.get("KILL") == rank:
        _crash.hook = kill
    code = main(sys.argv[2:])
    (folder / f"encoded-{rank}").write_text("".join(f"{name}\n" for name in ids))
    return code


if __name__ == "__main__":
    sys.exit(run())
