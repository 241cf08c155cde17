"""FAISS: the choice by count, and approximate indexes that answer like the exact one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ragmoe import IndexFolderError
from ragmoe._threads import import_faiss
from ragmoe.index import vectors
from ragmoe.index.vectors import Choice, FaissSearcher, build_faiss, choose_factory, exact_search, unit_rows


def embeddings(rows: int, width: int = 16) -> NDArray[np.float16]:
    made = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize(
    ("count", "factory", "bytes_each"),
    [
        (1, "Flat", 1536), (50_000, "Flat", 1536), (50_001, "IVF1024,Flat", 1544), (1_000_000, "IVF4096,Flat", 1544),
        (1_000_001, "IVF4096,SQ8", 392), (20_000_000, "IVF16384,PQ96", 104),
    ],
)  # fmt: skip
def test_the_choice_by_count(count: int, factory: str, bytes_each: int) -> None:
    choice = choose_factory(count, 384)
    assert (choice.factory, choice.bytes_each) == (factory, bytes_each)
    assert f"{count:,}" in choice.reason
    faiss = import_faiss()
    assert faiss.index_factory(384, factory, faiss.METRIC_INNER_PRODUCT).metric_type == faiss.METRIC_INNER_PRODUCT


def test_exact_search_by_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_BLOCK", 7)
    stored = embeddings(50)
    queries = unit_rows(embeddings(60), np.arange(50, 60))
    expected = np.argsort(-(queries @ unit_rows(stored, np.arange(50)).T), axis=1, kind="stable")[:, :9]
    assert np.array_equal(exact_search(stored, queries, 9), expected)


@pytest.mark.parametrize("limits", [(10, 10**6, 10**7), (10, 20, 10**7), (10, 20, 30)])
def test_beyond_the_flat_limit_recall_is_measured_and_scores_stay_cosines(
    limits: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in zip(("FLAT_LIMIT", "_FULL_LIMIT", "_SCALAR_LIMIT"), limits, strict=True):
        monkeypatch.setattr(vectors, name, limit)
    stored = embeddings(1000)
    choice = choose_factory(1000, 16)
    assert choice.factory.startswith("IVF")
    record = build_faiss(tmp_path / "x.faiss", stored, choice, lambda done: None)
    assert record.nprobe is not None and record.recall_at_20 is not None
    # Beyond ten million the codes themselves lose some; otherwise the lists to visit are as many as it takes.
    assert record.recall_at_20 >= (0.98 if "PQ" not in choice.factory else 0.5)
    searcher = FaissSearcher(tmp_path / "x.faiss", stored, record)
    queries = unit_rows(stored, np.arange(20))
    exact = exact_search(stored, queries, 5)
    found = searcher.search(queries, 5)
    assert np.mean([len(np.intersect1d(a, rows)) / 5 for a, (rows, _) in zip(exact, found, strict=True)]) > 0.9
    for query, (rows, scores) in zip(queries, found, strict=True):
        np.testing.assert_allclose(scores, unit_rows(stored, rows) @ query, atol=1e-6)
        assert (np.diff(scores) <= 0).all()


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
