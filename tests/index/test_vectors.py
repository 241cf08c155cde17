"""FAISS: the choice by count, and approximate indexes that answer like the exact one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ragmoe import IndexFolderError
from ragmoe._threads import import_faiss
from ragmoe.index import vectors
from ragmoe.index.manifest import FaissRecord
from ragmoe.index.vectors import Choice, FaissSearcher, build_faiss, choose_factory, exact_search, unit_rows


def embeddings(rows: int, width: int = 16) -> NDArray[np.float16]:
    made = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize(
    ("count", "width", "factory", "bytes_each"),
    [
        (1, 384, "Flat", 1536), (50_000, 384, "Flat", 1536), (50_001, 384, "IVF1024,PQ128x4fs", 72),
        (1_000_000, 384, "IVF4096,PQ128x4fs", 72), (20_000_000, 768, "IVF16384,PQ256x4fs", 136),
        (60_000, 1024, "IVF1024,PQ256x4fs", 136), (60_000, 100, "IVF1024,PQ25x4fs", 21),
        (60_000, 97, "IVF1024,SQ8", 105),
    ],
)  # fmt: skip
def test_the_choice_by_count(count: int, width: int, factory: str, bytes_each: int) -> None:
    choice = choose_factory(count, width)
    assert (choice.factory, choice.bytes_each) == (factory, bytes_each)
    assert f"{count:,}" in choice.reason
    faiss = import_faiss()
    assert faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT).metric_type == faiss.METRIC_INNER_PRODUCT


def test_exact_search_by_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_BLOCK", 7)
    stored = embeddings(50)
    queries = unit_rows(embeddings(60), np.arange(50, 60))
    expected = np.argsort(-(queries @ unit_rows(stored, np.arange(50)).T), axis=1, kind="stable")[:, :9]
    assert np.array_equal(exact_search(stored, queries, 9), expected)


@pytest.mark.parametrize("width", [16, 17])
def test_beyond_the_flat_limit_recall_is_measured_and_scores_stay_cosines(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "FLAT_LIMIT", 10)
    monkeypatch.setattr(vectors, "_DEPTHS", (25, 50, 100))
    # Fewer at a time than are ranked again for one query, and more than one batch.
    monkeypatch.setattr(vectors, "_ROWS_AT_ONCE", 60)
    np.save(tmp_path / "embeddings.npy", embeddings(1000, width))
    stored = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    choice = choose_factory(1000, width)
    assert choice.factory == {16: "IVF128,PQ4x4fs", 17: "IVF128,SQ8"}[width]
    record = build_faiss(tmp_path / "x.faiss", stored, choice, lambda done: None)
    assert record.nprobe is not None and record.depth is not None and record.recall_at_20 is not None
    # Codes of one bit a dimension lose some; otherwise the lists to visit are as many as it takes.
    assert record.recall_at_20 >= (0.98 if width == 17 else 0.6)
    searcher = FaissSearcher(tmp_path / "x.faiss", stored, record)
    queries = unit_rows(stored, np.arange(20))
    exact = exact_search(stored, queries, 5)
    found = searcher.search(queries, 5)
    assert np.mean([len(np.intersect1d(a, rows)) / 5 for a, (rows, _) in zip(exact, found, strict=True)]) > 0.8
    for query, (rows, scores) in zip(queries, found, strict=True):
        np.testing.assert_allclose(scores, unit_rows(stored, rows) @ query, atol=1e-6)
        assert (np.diff(scores) <= 0).all()
    # The questions of a batch are answered as each by itself.
    for number, (rows, _) in enumerate(found):
        assert np.array_equal(searcher.search(queries[number : number + 1], 5)[0][0], rows)


def test_codes_that_confuse_are_ranked_again_deeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Visited and ranked again is as little as finds the share; deeper where codes are coarse."""
    stored = embeddings(2000, 32)
    records = {
        name: build_faiss(tmp_path / "x.faiss", stored, Choice(name, "", 1), lambda done: None)
        for name in ("IVF16,Flat", "IVF16,PQ16x4fs")
    }
    exact, coarse = records["IVF16,Flat"], records["IVF16,PQ16x4fs"]
    assert exact.depth == 100 < (coarse.depth or 0)
    for record in records.values():
        assert (record.recall_at_20 or 0) >= 0.98 and record.nprobe == exact.nprobe
    # Where no depth is enough, lists beyond what helps are not visited.
    monkeypatch.setattr(vectors, "_DEPTHS", (20, 21))
    hopeless = build_faiss(tmp_path / "x.faiss", stored, Choice("IVF16,PQ4x4fs", "", 1), lambda done: None)
    assert (hopeless.recall_at_20 or 0) < 0.9 and hopeless.depth == 21


def test_more_candidates_where_more_are_asked_for(tmp_path: Path) -> None:
    stored = embeddings(2000, 32)
    record = build_faiss(tmp_path / "x.faiss", stored, Choice("IVF16,PQ16x4fs", "", 1), lambda done: None)
    searcher = FaissSearcher(tmp_path / "x.faiss", stored, record)
    queries = unit_rows(stored, np.arange(0, 2000, 40))
    exact = exact_search(stored, queries, 60)
    found = searcher.search(queries, 60)
    assert np.mean([len(np.intersect1d(a, rows)) / 60 for a, (rows, _) in zip(exact, found, strict=True)]) > 0.93


def test_records_of_before_have_no_depth_and_stay_as_they_are() -> None:
    before = {"factory": "IVF16,Flat", "reason": "of old", "nprobe": 4, "recall_at_20": 0.99}
    assert FaissRecord.model_validate(before).model_dump() == before
    assert FaissRecord.model_validate({**before, "depth": 200}).model_dump() == {**before, "depth": 200}


def test_files_that_faiss_cannot_read_or_that_do_not_fit(tmp_path: Path) -> None:
    record = build_faiss(tmp_path / "x.faiss", embeddings(10), choose_factory(10, 16), lambda done: None)
    with pytest.raises(IndexFolderError, match=r"it holds 10 vectors of width 16, the embeddings are \(9, 16\)"):
        FaissSearcher(tmp_path / "x.faiss", embeddings(9), record)
    (tmp_path / "x.faiss").write_bytes(b"not faiss")
    with pytest.raises(IndexFolderError, match="faiss cannot read it"):
        FaissSearcher(tmp_path / "x.faiss", embeddings(10), record)


def test_more_asked_for_than_there_are(tmp_path: Path) -> None:
    record = build_faiss(tmp_path / "x.faiss", embeddings(1), choose_factory(1, 16), lambda done: None)
    ((rows, _),) = FaissSearcher(tmp_path / "x.faiss", embeddings(1), record).search(
        unit_rows(embeddings(1), np.arange(1)), 9
    )
    assert rows.tolist() == [0]


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,SQ8"])
def test_many_queries_at_once_rank_as_one_by_one(factory: str, tmp_path: Path) -> None:
    stored = embeddings(60)
    # Pairs that are the same: of equal scores the first row comes first.
    stored[30:] = stored[:30]
    record = build_faiss(tmp_path / "x.faiss", stored, Choice(factory, "", 1), lambda done: None)
    # In but one list there are fewer than are asked for.
    record = record.model_copy(update={"nprobe": record.nprobe and 1})
    searcher = FaissSearcher(tmp_path / "x.faiss", stored, record)
    queries = unit_rows(stored, np.arange(150) % 60)
    _, rows = searcher.index.search(queries, 60)
    sizes = set()
    for query, among, (found, scores) in zip(queries, rows, searcher.search(queries, 20), strict=True):
        among = among[among >= 0]
        cosines = unit_rows(stored, among) @ query
        best = np.lexsort((among, -cosines.round(6)))[:20]
        assert found.tolist() == among[best].tolist()
        np.testing.assert_allclose(scores, cosines[best], atol=1e-6)
        sizes.add(len(found))
    assert (sizes == {20}) == (factory == "Flat")


def test_more_than_the_usual_lists_hold_is_found_in_more_of_them(tmp_path: Path) -> None:
    stored = embeddings(2000)
    record = build_faiss(tmp_path / "x.faiss", stored, Choice("IVF32,SQ8", "", 8), lambda done: None)
    searcher = FaissSearcher(tmp_path / "x.faiss", stored, record)
    searcher.index.nprobe = 1
    query = unit_rows(stored, np.arange(1))
    (everything,) = searcher.search(query, 2000)
    assert sorted(everything[0].tolist()) == list(range(2000))
    assert len(searcher.search(query, 1000)[0][0]) == 1000
    # What is asked for usually costs what was tuned.
    assert searcher._probes(searcher.candidates(1)) is None
