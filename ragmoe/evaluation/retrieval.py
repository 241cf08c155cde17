"""What the questions retrieve: fetched once, shared by all arms, and scored with ir-measures."""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ragmoe.evaluation.protocols import Searchable
from ragmoe.evaluation.samples import Sample, write_text

if TYPE_CHECKING:
    from ragmoe.neighbours import Neighbours

DEPTH = 20
METRICS = ("R@1", "R@5", "R@20", "MRR", "nDCG@10")


class Retrieval:
    """The neighbours of questions, kept so that several arms, tasks and conditions search only once.

    Args:
        keep: how many questions are kept at most; the oldest go first (about 30 kB each).
    """

    def __init__(self, index: Searchable, *, keep: int = 20_000) -> None:
        self.index = index
        self._keep = keep
        self._rows: OrderedDict[tuple[str | None, int, str], Neighbours] = OrderedDict()

    def fetch(self, asked: Sequence[str], *, retriever: str | None, depth: int) -> Neighbours:
        """The ``depth`` best neighbours of each text, in the order given."""
        from ragmoe.neighbours import Neighbours

        keys = [(retriever, depth, text) for text in asked]
        new = list(dict.fromkeys(key[2] for key in keys if key not in self._rows))
        fresh = {}
        if new:
            found = self.index.neighbours(new, depth, retriever=retriever)
            fresh = {(retriever, depth, text): found.rows([row]) for row, text in enumerate(new)}
        rows = [fresh[key] if key in fresh else self._rows[key] for key in keys]
        self._rows.update(fresh)
        while len(self._rows) > self._keep:
            self._rows.popitem(last=False)
        return Neighbours.stack(rows)


def score_retrieval(
    samples: Sequence[Sample], gold: Mapping[str, Sequence[str]], folder: Path | None = None
) -> dict[str, Any] | None:
    """Recall at 1, 5 and 20, mean reciprocal rank and nDCG@10, each 0 to 1, by domain and as the mean over domains.

    Args:
        gold: the gold passages of each question id; questions without are left out. Where a search found nothing at
            all, as bm25 may, every figure of that question is 0.
        folder: where the TREC files ``run.trec`` and ``qrels.trec`` are written.

    Returns:
        None where no question has a gold passage.
    """
    import ir_measures
    from ir_measures import RR, Qrel, R, ScoredDoc, nDCG

    asked = [sample for sample in samples if gold.get(sample.id)]
    if not asked:
        return None
    qrels = [Qrel(_token(s.id), _token(name), 1) for s in asked for name in gold[s.id]]
    # trec_eval orders equal scores by id; scores that fall with the rank keep the order that was retrieved.
    run = [
        ScoredDoc(_token(s.id), _token(name), float(len(s.retrieved) - at))
        for s in asked
        for at, name in enumerate(s.retrieved)
    ]
    if folder is not None:
        _write_trec(folder, qrels, run)
    measures = dict(zip([R @ 1, R @ 5, R @ 20, RR, nDCG @ 10], METRICS, strict=True))
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: {name: [] for name in METRICS})
    domains = {_token(sample.id): sample.domain for sample in asked}
    # What the run lacks it gives 0.
    for metric in ir_measures.iter_calc(list(measures), qrels, run):
        values[domains[metric.query_id]][measures[metric.measure]].append(metric.value)
    order = dict.fromkeys(sample.domain for sample in asked)
    per_domain: dict[str, Any] = {
        d: {name: fmean(values[d][name]) for name in METRICS} | {"n": len(values[d]["R@1"])} for d in order
    }
    in_vain = sum(not sample.retrieved for sample in asked)
    mean = {name: fmean(block[name] for block in per_domain.values()) for name in METRICS}
    return {"mean": mean, "per_domain": per_domain, "n": len(asked), "without_retrieval": in_vain}


def _write_trec(folder: Path, qrels: Sequence[Any], run: Sequence[Any]) -> None:
    write_text(folder / "qrels.trec", "".join(f"{q.query_id} 0 {q.doc_id} {q.relevance}\n" for q in qrels))
    lines, rank, last = [], 0, None
    for row in run:
        rank, last = (rank + 1 if row.query_id == last else 1), row.query_id
        lines.append(f"{row.query_id} Q0 {row.doc_id} {rank} {row.score:g} ragmoe\n")
    write_text(folder / "run.trec", "".join(lines))


def _token(name: str) -> str:
    """An id as a TREC file can hold it: columns are parted by white space, so that is percent-encoded."""
    return re.sub(r"[\s%]", lambda match: quote(match.group(0)), name)
