"""One case of the benchmark of sizes, in a process of its own: builds a FAISS file, or opens one and searches.

    python eval/bench/_scale_case.py build FOLDER CASE
    python eval/bench/_scale_case.py search FOLDER CASE

FOLDER holds embeddings.npy and queries.npy. A build prints its figures. A search prints its memory once it has
searched, leaves what it found in CASE.npy, and searches again for each line that it is sent. Figures are lines of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragmoe._threads import import_faiss
from ragmoe.index.manifest import FaissRecord
from ragmoe.index.vectors import Choice, FaissSearcher, build_faiss, choose_factory, list_count

K = 10
_EF_SEARCH = 64

#: What is compared, by name: the factory string for a number of vectors of a width.
CASES: dict[str, Callable[[int, int], str]] = {
    "Flat": lambda count, width: "Flat",
    "automatic": lambda count, width: choose_factory(count, width).factory,
    "IVF-Flat": lambda count, width: f"IVF{list_count(count)},Flat",
    "IVF-SQ8": lambda count, width: f"IVF{list_count(count)},SQ8",
    "IVF-PQ": lambda count, width: f"IVF{list_count(count)},PQ{width // 4}x4fs",
    "HNSW": lambda count, width: "HNSW32",
}


def build(folder: Path, case: str) -> dict[str, Any]:
    """Build a case's FAISS file; seconds, the most memory that this process had, and the record."""
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
    choice = Choice(CASES[case](*embeddings.shape), case, 0)
    import_faiss()
    begin = time.perf_counter()
    record = build_faiss(folder / f"{case}.faiss", embeddings, choice, lambda done: None)
    seconds = time.perf_counter() - begin
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak": peak, "record": record.model_dump()}


def search(folder: Path, case: str) -> None:
    """Open a case, search, print what this process holds then; and search again whenever a line comes."""
    queries, record = np.load(folder / "queries.npy"), FaissRecord(**json.loads((folder / f"{case}.json").read_text()))
    import_faiss()
    before = held()
    searcher = FaissSearcher(folder / f"{case}.faiss", np.load(folder / "embeddings.npy", mmap_mode="r"), record)
    if case == "HNSW":
        searcher.index.hnsw.efSearch = _EF_SEARCH
    np.save(folder / f"{case}.npy", rows_of(searcher, queries))
    print(json.dumps({"before": before, "after": held()}), flush=True)
    for _ in sys.stdin:
        rows_of(searcher, queries)
        print("{}", flush=True)


def rows_of(searcher: FaissSearcher, queries: NDArray[np.float32]) -> NDArray[np.int64]:
    """The best rows of each query (B, K), -1 where fewer were found."""
    found = np.full((len(queries), K), -1, dtype=np.int64)
    for number, (rows, _) in enumerate(searcher.search(queries, K)):
        found[number, : len(rows)] = rows
    return found


def held() -> dict[str, int]:
    """Bytes that this process holds: its own (anonymous), those of mapped files, both, and its share of both (PSS)."""
    lines = (
        Path("/proc/self/status").read_text().splitlines() + Path("/proc/self/smaps_rollup").read_text().splitlines()
    )
    found = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return {
        "anonymous": found["RssAnon"], "mapped": found["RssFile"], "resident": found["VmRSS"], "pss": found["Pss"],
        "peak": found["VmHWM"],
    }  # fmt: skip


if __name__ == "__main__":
    mode, where, name = sys.argv[1:]
    if mode == "build":
        print(json.dumps(build(Path(where), name)))
    else:
        search(Path(where), name)
