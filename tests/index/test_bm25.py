"""BM25: counted block by block, the scores are those of bm25s, which needs everything in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ragmoe.index import bm25


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_scores_are_those_of_bm25s(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bm25s

    monkeypatch.setattr(bm25, "_BLOCK", block)
    words = ["ferry", "ferries", "quay", "pilot", "the", "of", "tide", "barge", "lock", "bread"]
    drawn = np.random.default_rng(0)
    texts = [" ".join(drawn.choice(words, size=drawn.integers(0, 30))) for _ in range(60)]
    files = bm25.build_bm25(tmp_path / "bm25-1", iter(texts), tmp_path / "scratch")
    assert all(path.parent.name == "bm25-1" for path in files) and not (tmp_path / "scratch").exists()
    ours = bm25s.BM25.load(str(tmp_path / "bm25-1"))
    whole = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    whole.index(bm25.text_tokens(texts), show_progress=False)
    known = set(ours.vocab_dict) - {"\0"}
    assert known == set(whole.vocab_dict)
    for word in known - {""}:
        np.testing.assert_array_equal(ours.get_scores([word]), whole.get_scores([word]))


def test_nothing_but_stop_words(tmp_path: Path) -> None:
    bm25.build_bm25(tmp_path / "bm25-1", ["the of", "and"], tmp_path / "scratch")
    searcher = bm25.Bm25Searcher(tmp_path / "bm25-1", 2)
    assert [len(rows) for rows, _ in searcher.search(["the ferry", "of"], 5)] == [0, 0]
