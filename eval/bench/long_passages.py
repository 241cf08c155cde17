"""Which vector retrieves a passage longer than the encoder reads best?

    python eval/bench/long_passages.py --data DIR [--cache FILE.npz] [--out eval/results/long_passages.json]

Pools the seven core corpora, encodes every window once, and compares, by dense search of the dev questions:
`truncate` (the first window), `windows` (mean of all windows weighted by their tokens: the default), `plain` (their
plain mean) and `max` (a row a window, a passage scores as its best window). What it does not do: compare encoders, or
look at BM25.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
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
from numpy.typing import NDArray

from ragmoe.corpus import read_passages
from ragmoe.index import load_encoder
from ragmoe.index.encoder import Encoder
from ragmoe.index.windows import Windows, cut_windows, pool_windows

VARIANTS = ("truncate", "windows", "plain", "max")
_BLOCK = 2048


def window_vectors(windows: Windows, encoder: Encoder, cache: Path | None) -> NDArray[np.float32]:
    """The vector of every window, float32 (W, R), from the cache where that holds these very windows."""
    keys = np.array([hashlib.sha256(text.encode()).hexdigest() for text in windows.texts])
    if cache is not None and cache.is_file():
        with np.load(cache, allow_pickle=False) as stored:
            if np.array_equal(stored["keys"], keys):
                return stored["vectors"]
    vectors = np.zeros((len(windows.texts), encoder.width), dtype=np.float32)
    for start in range(0, len(windows.texts), _BLOCK):
        vectors[start : start + _BLOCK] = encoder.encode(windows.texts[start : start + _BLOCK])
        print(f"encoded {min(start + _BLOCK, len(windows.texts)):,} of {len(windows.texts):,} windows", flush=True)
    if cache is not None:
        np.savez(cache, vectors=vectors, owner=windows.owner, keys=keys)
    return vectors


def passage_scores(
    variant: str, queries: NDArray[np.float32], vectors: NDArray[np.float32], windows: Windows
) -> NDArray[np.float32]:
    """The score of every passage for every query, float32 (B, passages)."""
    first = np.unique(windows.owner, return_index=True)[1]
    if variant == "max":
        return np.maximum.reduceat(queries @ vectors.T, first, axis=1)
    if variant == "truncate":
        return queries @ vectors[first].T
    if variant == "plain":
        windows = replace(windows, tokens=np.ones_like(windows.tokens))
    return queries @ pool_windows(vectors, windows).T


def best(scores: NDArray[np.float32], ids: Sequence[str]) -> list[list[str]]:
    """The ids of the best 20 passages of each query."""
    top = np.argsort(-scores, axis=1, kind="stable")[:, : max(CUTOFFS)]
    return [[ids[i] for i in line] for line in top]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one folder a domain (or RAGMOE_DATA)")
    parser.add_argument("--cache", type=Path, help="npz file that keeps the window vectors between runs")
    parser.add_argument("--out", type=Path, default=Path("eval/results/long_passages.json"))
    arguments = parser.parse_args()
    folder = data_folder(arguments.data)
    passages = list(read_passages([folder / name / "corpus.jsonl" for name in CORE]))
    ids = [passage.id for passage in passages]
    encoder = Remembering(load_encoder("minilm"))
    windows = cut_windows(passages, encoder, prompt=encoder.prompts["passage"])
    vectors = window_vectors(windows, encoder, arguments.cache)
    longer = windows.per_passage > 1
    domains = np.array([passage.domain for passage in passages])
    questions = dev_questions(folder)
    results: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for field in FIELDS:
        encoded = {
            name: encoder.encode([text_of(q, field) for q in part], prompt=encoder.prompts["query"])
            for name, part in questions.items()
        }
        for variant in VARIANTS:
            results[variant, field] = with_mean(
                {
                    name: recalls(part, best(passage_scores(variant, encoded[name], vectors, windows), ids))
                    for name, part in questions.items()
                }
            )
    rows, lines = [], []
    for (variant, field), values in results.items():
        base = results["truncate", field]
        for name, recall in values.items():
            for k in CUTOFFS:
                baseline = None if variant == "truncate" else base[name][k]
                rows.append(row(f"{variant}, {field}, {name}", f"R@{k}", recall[k], baseline=baseline, target=None))
        cells = [f"{values[name][5]:.3f} / {values[name][20]:.3f}" for name in (*CORE, "mean")]
        lines.append([variant, field, *cells])
    shares = ", ".join(f"{name} {longer[domains == name].mean():.0%}" for name in CORE)
    report = (
        "# Passages longer than the encoder reads\n\n"
        f"Dense retrieval (minilm, 256 tokens, windows overlapping by 64) over {len(ids):,} passages of seven domains, "
        f"{int(longer.sum()):,} of them longer ({longer.mean():.0%}: {shares}); dev questions, R@5 / R@20.\n\n"
        "`truncate`: the first window. `windows`: mean of the windows weighted by tokens. `plain`: their plain mean. "
        f"`max`: a row a window ({len(windows.texts):,} rows), the best window counts.\n\n"
        + table(["vector", "asked with", *CORE, "mean"], lines)
        + "\nMade by `python eval/bench/long_passages.py --data DIR`.\n"
    )
    write_result(arguments.out, "long_passages", rows, report)
    print(report)


if __name__ == "__main__":
    main()
