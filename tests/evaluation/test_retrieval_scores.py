from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ragmoe.evaluation.retrieval import Retrieval, score_retrieval
from ragmoe.evaluation.samples import Sample

Make = Callable[..., Sample]


def test_retrieval_metrics_by_hand(sample: Make) -> None:
    rows = [
        sample("1", 1.0, retrieved=("p1", "p2", "p3")),
        sample("2", 1.0, retrieved=("p9", "p2", "p1")),
        sample("3", 1.0, domain="b", retrieved=("p1", "p2", "p3")),
    ]
    found = score_retrieval(rows, {"1": ["p1"], "2": ["p1", "p2"], "3": ["p8"]})
    assert found is not None
    a, b = found["per_domain"]["a"], found["per_domain"]["b"]
    assert (a["R@1"], a["R@5"], a["R@20"]) == (0.5, 1.0, 1.0)
    assert a["MRR"] == pytest.approx((1 + 1 / 2) / 2)
    ideal, got = 1 + 1 / math.log2(3), 1 / math.log2(3) + 1 / 2
    assert a["nDCG@10"] == pytest.approx((1 + got / ideal) / 2)
    assert b == {"R@1": 0.0, "R@5": 0.0, "R@20": 0.0, "MRR": 0.0, "nDCG@10": 0.0, "n": 1}
    assert found["mean"]["R@5"] == 0.5


def test_trec_files_keep_the_order_that_was_retrieved(sample: Make, tmp_path: Path) -> None:
    # Ids that would sort the other way, and one with a space, which parts columns.
    score_retrieval([sample("q 1", 1.0, retrieved=("z", "a"))], {"q 1": ["a"]}, tmp_path)
    run = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert [(r[0], r[2], r[3]) for r in run] == [("q%201", "z", "1"), ("q%201", "a", "2")]
    assert float(run[0][4]) > float(run[1][4])
    assert (tmp_path / "qrels.trec").read_text() == "q%201 0 a 1\n"


def test_questions_without_gold_are_left_out_and_without_any_there_is_nothing(sample: Make) -> None:
    rows = [sample("1", 1.0, retrieved=("p",)), sample("2", 1.0, retrieved=("p",))]
    found = score_retrieval(rows, {"1": ["p"], "2": []})
    assert found is not None
    assert found["n"] == 1
    assert score_retrieval(rows, {}) is None


def test_a_text_is_searched_once(index: Any) -> None:
    retrieval = Retrieval(index)
    one = retrieval.fetch(["the ferry", "bronze coins", "the ferry"], retriever=None, depth=3)
    two = retrieval.fetch(["bronze coins", "the ferry"], retriever=None, depth=3)
    assert index.searched == ["the ferry", "bronze coins"]
    assert one.passage_ids == [two.passage_ids[1], two.passage_ids[0], two.passage_ids[1]]
    assert one.embeddings_BNR[1].equal(two.embeddings_BNR[0])
    retrieval.fetch(["the ferry"], retriever="bm25", depth=3)
    assert len(index.searched) == 3


def test_the_oldest_go_first(index: Any) -> None:
    retrieval = Retrieval(index, keep=1)
    assert len(retrieval.fetch(["a", "b"], retriever=None, depth=1)) == 2
    retrieval.fetch(["b"], retriever=None, depth=1)
    assert index.searched == ["a", "b"]
    retrieval.fetch(["a"], retriever=None, depth=1)
    assert index.searched == ["a", "b", "a"]


def test_a_search_in_vain_counts_nothing_found(sample: Make, tmp_path: Path) -> None:
    rows = [sample("1", 1.0, retrieved=("p",)), sample("2", 0.0, retrieved=())]
    found = score_retrieval(rows, {"1": ["p"], "2": ["q"]}, tmp_path)
    assert found is not None
    assert (found["n"], found["without_retrieval"]) == (2, 1)
    assert found["per_domain"]["a"] == {**dict.fromkeys(("R@1", "R@5", "R@20", "MRR", "nDCG@10"), 0.5), "n": 2}
    assert "2 0 q 1" in (tmp_path / "qrels.trec").read_text()
    alone = score_retrieval(rows[1:], {"2": ["q"]})
    assert alone is not None and alone["mean"]["R@20"] == 0.0
