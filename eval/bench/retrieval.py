"""Recall of the retrievers over an index of the seven core domains, on the dev questions.

    python eval/bench/retrieval.py --data DIR --index DIR [--out eval/results/retrieval_core7.json]

R@1, R@5 and R@20 (ir-measures) per domain and as a mean over the seven, asked with `question` and with
`question_raw`. The hybrid retriever must reach BM25's own R@20 as a mean; exit 1 if it does not. What it does not do:
build the index (`RAGMOE_DATA=DIR ragmoe index build --recipe indexes/core7.yaml`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _result import row, table, write_result
from _retrieval_data import (
    CORE,
    CUTOFFS,
    FIELDS,
    Remembering,
    data_folder,
    dev_questions,
    recalls,
    text_of,
    with_mean,
)

from ragmoe.index import Index, load_encoder

RETRIEVERS = ("dense", "bm25", "hybrid", "blend")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one folder a domain (or RAGMOE_DATA)")
    parser.add_argument("--index", type=Path, default=Path("indexes/core7"), help="the pooled index")
    parser.add_argument("--out", type=Path, default=Path("eval/results/retrieval_core7.json"))
    arguments = parser.parse_args()
    questions = dev_questions(data_folder(arguments.data))
    index = Index.open(arguments.index, encoder=Remembering(load_encoder("minilm")))
    results: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for field in FIELDS:
        for name in RETRIEVERS:
            found = {
                domain: index.search([text_of(q, field) for q in part], k=max(CUTOFFS), retriever=name)
                for domain, part in questions.items()
            }
            ids = {domain: [[hit.passage_id for hit in hits] for hits in part] for domain, part in found.items()}
            results[name, field] = with_mean({domain: recalls(questions[domain], ids[domain]) for domain in questions})
    rows, lines = [], []
    for (name, field), values in results.items():
        for domain, recall in values.items():
            for k in CUTOFFS:
                baseline = None if name == "bm25" else results["bm25", field][domain][k]
                target = 1.0 if (name, field, domain, k) == ("hybrid", "question", "mean", 20) else None
                rows.append(row(f"{name}, {field}, {domain}", f"R@{k}", recall[k], baseline=baseline, target=target))
        cells = [" / ".join(f"{values[domain][k]:.3f}" for k in CUTOFFS) for domain in (*CORE, "mean")]
        lines.append([name, field, *cells])
    manifest = index.manifest
    report = (
        "# Retrieval over the seven core domains\n\n"
        f"{manifest.passages:,} passages in one index (encoder {manifest.encoder.id}, long passages: "
        f"{manifest.long_passages.mode}, BM25 {manifest.bm25}); {sum(map(len, questions.values())):,} dev questions; "
        "R@1 / R@5 / R@20. "
        "`hybrid` is reciprocal-rank fusion, `blend` (the default) a weighted sum of scores; constants chosen on "
        "1,050 train questions.\n\n"
        + table(["retriever", "asked with", *CORE, "mean"], lines)
        + "\nMade by `python eval/bench/retrieval.py --data DIR --index DIR`.\n"
    )
    write_result(arguments.out, "retrieval_core7", rows, report)
    print(report)
    if any(line["ok"] is False for line in rows):
        sys.exit("error: hybrid's mean R@20 is below BM25's own")


if __name__ == "__main__":
    main()
