"""An index opened in a process of its own: how long it takes until it answers, and what the process then holds.

    python eval/bench/_open_case.py FOLDER

Prints one line of JSON: seconds to open, of the first search by a vector, of the first passage by its id, and the bytes
that each has added to what the process held.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np
from _scale_case import held

from ragmoe import Index
from ragmoe._threads import import_faiss


def main() -> None:
    import_faiss()
    taken: dict[str, dict[str, float]] = {}

    def timed(name: str, do: Callable[[], object]) -> None:
        before, begin = held()["resident"], time.perf_counter()
        do()
        taken[name] = {"seconds": time.perf_counter() - begin, "bytes": held()["resident"] - before}

    found: list[Index] = []
    timed("open", lambda: found.append(Index.open(sys.argv[1])))
    index = found[0]
    vector = np.asarray(index.embeddings[:1], dtype=np.float32)
    timed("first search", lambda: index.faiss.search(vector, 10))
    timed("first ids", lambda: index.passages(index.passage_ids[:1]))
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
