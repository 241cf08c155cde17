"""FAISS indexes of ten thousand, a hundred thousand and a million vectors: the automatic choice beside others.

    python eval/bench/scale.py --index DIR [DIR ...] [--sizes 10000 100000 1000000] [--only REGEX] [--json]

Vectors are those of real passages (of built indexes) over and over, each time with other noise of the same covariance;
queries are made in the same way of passages, and none is among the vectors. Each case is built in one process, and
opened and searched in another that does nothing else; the rates are of those processes by turns, a batch at a time.
Exact search of full vectors is the baseline. At a million and more the automatic choice must find 95 % of the exact
top 10 at 20 times the rate of exact search, in a quarter of its memory; exit 1 if it does not. What it does not do:
encode, or read passages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _result import machine, row, table, write_result
from _scale_case import CASES, K
from _scale_data import Source, real_vectors
from _timing import Clock, chosen, options

from ragmoe._room import size as readable

_CASE = Path(__file__).with_name("_scale_case.py")
_EXACT, _OURS = "Flat", "automatic"
_HNSW_LIMIT = 100_000
_MILLION = 1_000_000
_RECALL, _RATE, _MEMORY = 0.95, 20.0, 4.0
_HEADERS = ["vectors", "case", "FAISS", "lists, candidates", "built in, with", "file", "R@10", "queries a second",
            "holds", "of it mapped", "PSS", "peak"]  # fmt: skip


@dataclass
class Case:
    """What was found of one case at one size."""

    count: int
    name: str
    built: dict[str, Any]
    file: int
    held: dict[str, dict[str, int]]
    recall: float = 0.0
    rate: float = 0.0


class Worker:
    """A process that opened a case and searches when asked to."""

    def __init__(self, folder: Path, name: str, environment: dict[str, str]) -> None:
        command = [sys.executable, str(_CASE), "search", str(folder), name]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.held: dict[str, dict[str, int]] = self._answer()

    def search(self) -> None:
        """One batch of all queries."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: {self.process.args!r} ended with {self.process.wait()}")
        return json.loads(line)


def measure(folder: Path, count: int, names: list[str], queries: int, clock: Clock, threads: int) -> list[Case]:
    """All cases of one size; ``folder`` holds the embeddings and the queries."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    cases, workers = [], {}
    for name in names:
        command = [sys.executable, str(_CASE), "build", str(folder), name]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        built = json.loads(done.stdout)
        (folder / f"{name}.json").write_text(json.dumps(built["record"]))
        cases.append(Case(count, name, built, (folder / f"{name}.faiss").stat().st_size, {}))
    with ExitStack() as stack:
        for case in cases:
            workers[case.name] = worker = Worker(folder, case.name, environment)
            stack.callback(worker.close)
            case.held = worker.held
        seconds = clock.medians({name: worker.search for name, worker in workers.items()})
    exact = np.load(folder / f"{_EXACT}.npy")
    for case in cases:
        found = np.load(folder / f"{case.name}.npy")
        case.recall = float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(exact, found, strict=True)]))
        case.rate = queries / seconds[case.name]
    return cases


def rows_of(case: Case, exact: Case) -> list[dict[str, Any]]:
    """A case's rows of the result, beside exact search of the same size."""
    label = f"{case.count:,}, {case.name} ({case.built['record']['factory']})"
    judged = case.name == _OURS and case.count >= _MILLION
    now, base = case.held["after"], exact.held["after"]
    made = [
        row(label, f"R@{K}", case.recall, baseline=exact.recall, target=_RECALL if judged else None),
        row(label, "rate", case.rate, baseline=exact.rate, target=_RATE if judged else None, unit="queries/s"),
        row(label, "resident memory, times less than exact", base["resident"] / now["resident"], baseline=1.0,
            target=_MEMORY if judged else None, unit="times"),
        row(label, "build", case.built["seconds"], baseline=exact.built["seconds"], target=None, unit="s"),
        row(label, "file", case.file / 1e6, baseline=exact.file / 1e6, target=None, unit="MB"),
        row(label, "peak of the build", case.built["peak"] / 1e6, baseline=None, target=None, unit="MB"),
    ]  # fmt: skip
    for what in ("resident", "anonymous", "mapped", "pss", "peak"):
        made.append(row(label, f"memory: {what}", now[what] / 1e6, baseline=base[what] / 1e6, target=None, unit="MB"))
    empty = case.held["before"]["resident"] / 1e6
    return [*made, row(label, "memory: resident before opening", empty, baseline=None, target=None, unit="MB")]


def line_of(case: Case) -> list[str]:
    """A case's line of the table."""
    record, now = case.built["record"], case.held["after"]
    visits = f"{record['nprobe']}, {record.get('depth')}" if record["nprobe"] else "-"
    memory = [readable(now[what]) for what in ("resident", "mapped", "pss", "peak")]
    built = f"{case.built['seconds']:.1f} s, {readable(case.built['peak'])}"
    return [f"{case.count:,}", case.name, record["factory"], visits, built, readable(case.file), f"{case.recall:.3f}",
            f"{case.rate:,.0f}", *memory]  # fmt: skip


def main() -> None:
    parser = options(__doc__, "scale", rounds=5)
    parser.add_argument("--index", type=Path, nargs="+", required=True, metavar="DIR", help="built indexes")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, _MILLION])
    parser.add_argument("--noise", type=float, default=0.6, help="mean length of what is added to a unit vector")
    parser.add_argument("--queries", type=int, default=500, help="in a batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="a folder on a disk with room (a temporary one if none)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    sizes, queries = ([2000], 50) if arguments.smoke else (arguments.sizes, arguments.queries)
    clock = Clock(rounds=arguments.rounds, seconds=600.0)
    source, rows, lines = Source(real_vectors(arguments.index), arguments.noise), [], []
    for count in sizes:
        with tempfile.TemporaryDirectory(dir=arguments.work) as name:
            folder = Path(name)
            source.write(folder / "embeddings.npy", count)
            np.save(folder / "queries.npy", source.queries(queries))
            names = [_EXACT] + [
                name
                for name in CASES
                if name != _EXACT
                and (name != "HNSW" or count <= _HNSW_LIMIT)
                and chosen(f"{count:,}, {name}", arguments.only)
            ]
            cases = measure(folder, count, names, queries, clock, arguments.threads)
        rows += [made for case in cases for made in rows_of(case, cases[0])]
        lines += [line_of(case) for case in cases]
    report = (
        f"# Indexes by size\n\nVectors of {len(source.real_PR):,} real passages over and over, with noise of mean "
        f"length {arguments.noise}; batches of {queries} queries that are not among them, on {arguments.threads} "
        f"threads; {machine()}. Memory is that of a process that opened the index and searched: resident, what of it "
        "is mapped from files (libraries and embeddings), its proportional share, and the most it had.\n\n"
        + table(_HEADERS, lines)
        + f"\nMade by `python eval/bench/scale.py --index DIR --noise {arguments.noise:g}`.\n"
    )
    write_result(arguments.out, "scale", rows, report)
    print(json.dumps({"bench": "scale", "machine": machine(), "rows": rows}) if arguments.json else report)
    if any(line["ok"] is False for line in rows):
        sys.exit("error: at a million the automatic choice misses a target")


if __name__ == "__main__":
    main()
