"""Run by the memory test: builds an index of N passages and works on it; prints what each step held at most.

    python memory_driver.py STORE change|exchange N...

Counted is what Python and numpy hold, and what pyarrow holds: not the pages of files that the system keeps, and not
FAISS, whose needs are its own.
"""

from __future__ import annotations

import json
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from stub_encoder import StubEncoder

from ragmoe._threads import import_faiss
from ragmoe.index import (
    BuildOptions,
    ImportOptions,
    blocks,
    bm25,
    build_index,
    export,
    export_index,
    given,
    plan_add,
    plan_import,
    plan_merge,
    plan_remove,
    store,
    vectors,
)

WORDS = tuple("abcdefghijklmnop")


class Quick(StubEncoder):
    """A vector of a text without a look at its words."""

    def encode(self, texts: Sequence[str], *, prompt: str = "") -> NDArray[np.float32]:
        seeds = np.array([zlib.crc32(text.encode()) for text in texts], dtype=np.float64)
        made = np.sin(seeds[:, None] * np.arange(1, self.width + 1))
        return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def write(path: Path, numbers: range) -> str:
    with path.open("w") as file:
        for number in numbers:
            # Each text is another, but all are made of sixteen words: a vocabulary grows with what a language has.
            text = " ".join(WORDS[int(digit, 16)] * 3 for digit in f"{number:04x}{zlib.crc32(b'%d' % number):032x}")
            file.write(json.dumps({"id": f"p{number}", "text": text, "title": WORDS[number % len(WORDS)]}) + "\n")
    return str(path)


def held(work: Callable[[], object]) -> float:
    """Megabytes at the peak."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def changes(folder: Path, out: Path, count: int) -> dict[str, Callable[[], object]]:
    """Builds it, adds some passages, and removes some."""
    source = write(folder / "corpus.jsonl", range(count))
    more = write(folder / "more.jsonl", range(count, count + 50))
    ids = [f"p{number}" for number in range(50)]
    return {
        "build": lambda: build_index(BuildOptions((source,), out, encoder=Quick())),
        "add": lambda: plan_add(out, [more], encoder=Quick()).run(),
        "remove": lambda: plan_remove(out, ids=ids).run(),
    }


def exchanges(folder: Path, out: Path, count: int) -> dict[str, Callable[[], object]]:
    """Exports it, makes another of what was exported, and one of both."""
    source, vectors = write(folder / "corpus.jsonl", range(count)), folder / f"vectors-{count}.parquet"
    build_index(BuildOptions((source,), out, encoder=Quick()))
    made, merged = folder / f"made-{count}", folder / f"merged-{count}"
    options = ImportOptions(vectors, (source,), made, encoder=Quick(), long_passages="windows")
    return {
        "export": lambda: export_index(out, vectors, to="parquet"),
        "import": lambda: plan_import(options).run(),
        "merge": lambda: plan_merge(out, made, merged).run(),
    }


def peaks(folder: Path, kind: str, count: int) -> dict[str, float]:
    """The most that each step held, at a number of passages."""
    steps = {"change": changes, "exchange": exchanges}[kind](folder, folder / f"index-{count}", count)
    found = {name: held(work) for name, work in steps.items()}
    return {**found, "pyarrow": (pa.default_memory_pool().max_memory() or 0) / 1e6}


def main() -> None:
    # Blocks so small that even the smaller corpus has several of each kind.
    blocks.BLOCK = 64
    for module in (bm25, vectors):
        module._BLOCK = 64
    for module in (store, export, given):
        module._BATCH = 64
    import_faiss()
    folder, kind, *counts = sys.argv[1:]
    peaks(Path(folder), kind, 100)  # what is imported on the way counts once, here
    print(json.dumps([peaks(Path(folder), kind, int(count)) for count in counts]))


if __name__ == "__main__":
    main()
