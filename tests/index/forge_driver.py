"""Reads indexes that somebody forged, in a process of its own whose memory and time are limited.

    python forge_driver.py FOLDER SEED COUNT

FOLDER holds ``index``. Each line on stdout is a forgery about to be read, ``number file kind``, or ``failed`` with what
was raised; so the last line names the forgery that the process died of. The manifest agrees with each of them, digests
and all: only what reads a file can tell.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from stub_encoder import StubEncoder
from test_verify import reseal

from ragmoe import Index, RagmoeError
from ragmoe.index import plan_add, verify_index
from ragmoe.index.summary import summarise

# Beside what the process has when it begins; more than any forgery of a few kilobytes may ask for.
_MEMORY = 2 << 30
_SECONDS = 20
_NUMBERS = (-1, 0, 1, 25, 2**31 - 1, 2**31, 2**62, -(2**63))


def flip(content: bytearray, draw: random.Random) -> None:
    """Some bytes are others."""
    for _ in range(draw.choice((1, 3, 30))):
        content[draw.randrange(len(content))] = draw.randrange(256)


def number(content: bytearray, draw: random.Random) -> None:
    """Eight bytes are a number that a reader may not expect."""
    at = draw.randrange(max(len(content) - 8, 1)) // 8 * 8
    content[at : at + 8] = draw.choice(_NUMBERS).to_bytes(8, "little", signed=True)


def cut(content: bytearray, draw: random.Random) -> None:
    """The end is missing."""
    del content[draw.randrange(len(content)) :]


def repeat(content: bytearray, draw: random.Random) -> None:
    """A stretch of it comes twice."""
    begin = draw.randrange(len(content))
    content[begin:begin] = content[begin : begin + draw.randrange(1, 200)]


def digits(content: bytearray, draw: random.Random) -> None:
    """A number that is written out is another one."""
    places = [at for at, byte in enumerate(content) if chr(byte).isdigit()]
    if places:
        at = draw.choice(places)
        content[at : at + 1] = str(draw.choice(_NUMBERS)).encode()


KINDS: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, number, cut, repeat, digits)


def use(folder: Path, more: Path) -> None:
    """Everything that reads an index."""
    index = Index.open(folder, encoder=StubEncoder())
    for retriever in ("dense", "bm25", "blend"):
        for found in index.search(["the honey of the market", "a ferry"], 24, retriever=retriever):
            index.passages([hit.passage_id for hit in found])
    index.neighbours(["letters and deeds"], 3)
    list(index.chunks())
    summarise(index)
    verify_index(folder, encoder=StubEncoder())
    plan_add(folder, [str(more)], encoder=StubEncoder()).run()


def main(root: Path, seed: int, count: int) -> None:
    more = root / "more.txt"
    more.write_text("The honey is new.")
    # Once what is right, so that all that is imported is in memory.
    use(Path(shutil.copytree(root / "index", root / "right")), more)
    used = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmSize")).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, ((used << 10) + _MEMORY, resource.RLIM_INFINITY))
    names = sorted(json.loads((root / "index" / "manifest.json").read_text())["files"])
    for at in range(seed, seed + count):
        draw = random.Random(at)
        name, kind = draw.choice(names), draw.choice(KINDS)
        folder = Path(shutil.copytree(root / "index", root / "forged"))
        content = bytearray((folder / name).read_bytes())
        kind(content, draw)
        (folder / name).write_bytes(content)
        print(at, name, kind.__name__, flush=True)
        signal.alarm(_SECONDS)
        try:
            reseal(folder)
            use(folder, more)
        except RagmoeError:
            pass
        except BaseException:
            print("failed", " | ".join(traceback.format_exc().splitlines()[-3:]), flush=True)
        signal.alarm(0)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
