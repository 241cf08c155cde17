"""An opened index: passages, search by each retriever, and neighbours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stub_encoder import StubEncoder

from ragmoe import EncoderMismatchError, Index, IndexFolderError, Passage, UsageError
from ragmoe.index import Manifest, retriever_names, store
from ragmoe.index.retrievers import Blend, Hybrid, fuse
from ragmoe.index.windows import encode_passages

RETRIEVERS = ("blend", "bm25", "dense", "hybrid")


@pytest.fixture
def index(folder: Path) -> Index:
    return Index.open(folder, encoder=StubEncoder())


def test_passages_come_back_as_they_were(index: Index, folder: Path) -> None:
    assert len(index) == 24 and len(index.passage_ids) == 24 and index.width == 64
    passage = index.passage("market-3")
    assert passage == Passage(
        id="market-3",
        text="The baker of market has number 3 and belongs to stall. Further on it says that the baker was mended "
        "twice, painted once, sold at last, and found again.",
        title="Baker",
        domain="market",
        doc_id="market-d1",
        split="train",
    )
    assert index.passages(["river-1", "market-3"])[1] == passage
    assert [p.id for p in index.iterate()] == index.passage_ids
    assert index.domains[0] == "river"
    assert index.find("nobody") is None
    with pytest.raises(IndexFolderError, match="holds no passage 'nobody'; it holds 24, such as 'river-0'"):
        index.passage("nobody")


def test_embeddings_are_mapped_and_of_unit_length(index: Index) -> None:
    assert isinstance(index.embeddings, np.memmap) and index.embeddings.dtype == np.float16
    assert index.embeddings.shape == (24, 64)
    np.testing.assert_allclose(np.linalg.norm(index.embeddings.astype(np.float32), axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("name", RETRIEVERS)
def test_each_retriever_finds_the_passage_asked_for(index: Index, name: str) -> None:
    for word, expected in (("ferry", "river-0"), ("honey", "market-5"), ("census", "archive-6")):
        (hits,) = index.search([f"the {word} of what number"], 3, retriever=name)
        assert hits[0].passage_id == expected
        assert [hit.rank for hit in hits] == [1, 2, 3]
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert all(index.passage_ids[hit.row] == hit.passage_id for hit in hits)


def test_dense_search_is_exact(index: Index) -> None:
    query = ["a barge and a lock and an anchor"]
    vectors = index.embeddings.astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ index.encode(query)[0]
    hits = index.search(query, 24, retriever="dense")[0]
    assert [hit.row for hit in hits] == np.argsort(-cosines, kind="stable").tolist()
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1], atol=1e-5)


def test_bm25_returns_nothing_without_a_shared_word(index: Index) -> None:
    found = index.search(["zebra", "", "the of", "ferries"], 5, retriever="bm25")
    assert found[:3] == [[], [], []]
    # Stems: the passage says ferry.
    assert found[3][0].passage_id == "river-0"


def test_hybrid_is_the_fusion_of_both(index: Index) -> None:
    query = ["honey and bread"]
    parts = {name: [hit.row for hit in index.search(query, 24, retriever=name)[0]] for name in RETRIEVERS}
    rows, _ = fuse([np.array(parts["dense"]), np.array(parts["bm25"])], Hybrid.weights, Hybrid.constant, 24)
    assert rows.tolist() == parts["hybrid"]


def test_blend_is_the_weighted_sum_of_both(index: Index) -> None:
    query = ["honey and bread"]
    dense = {hit.row: hit.score for hit in index.search(query, 24, retriever="dense")[0]}
    bm25 = {hit.row: hit.score for hit in index.search(query, 24, retriever="bm25")[0]}
    for hit in index.search(query, 24, retriever="blend")[0]:
        expected = Blend.weight * dense[hit.row] + (1 - Blend.weight) * bm25.get(hit.row, 0) / max(bm25.values())
        assert hit.score == pytest.approx(expected, abs=1e-5)


def test_fusion_by_hand() -> None:
    rows, scores = fuse([np.array([3, 1]), np.array([1, 2, 3])], (1.0, 2.0), 60, 10)
    expected = {1: 1 / 62 + 2 / 61, 3: 1 / 61 + 2 / 63, 2: 2 / 62}
    assert rows.tolist() == [1, 3, 2]
    np.testing.assert_allclose(scores, [expected[row] for row in (1, 3, 2)], rtol=1e-6)
    rows, _ = fuse([np.zeros(0, dtype=np.int64)] * 2, (1.0, 1.0), 60, 10)
    assert len(rows) == 0


def test_the_retriever_of_opening_is_the_default_and_a_call_may_name_another(folder: Path) -> None:
    assert retriever_names() == list(RETRIEVERS)
    assert Index.open(folder).retriever == "blend"
    index = Index.open(folder, encoder=StubEncoder(), retriever="bm25")
    assert index.search(["zebra"]) == [[]]
    assert len(index.search(["zebra"], retriever="dense")[0]) == 10
    for call in (lambda: Index.open(folder, retriever="sparse"), lambda: index.search(["x"], retriever="sparse")):
        with pytest.raises(UsageError, match="'sparse' is unknown; there are: blend, bm25, dense, hybrid"):
            call()


@pytest.mark.parametrize("name", RETRIEVERS)
def test_neighbours_are_the_hits_with_cosines(index: Index, name: str) -> None:
    questions = ["where is the ferry", "bread and honey", "the census"]
    neighbours = index.neighbours(questions, 6, retriever=name)
    assert neighbours.embeddings_BNR.shape == (3, 6, 64) and neighbours.embeddings_BNR.dtype == torch.float32
    hits = index.search(questions, 6, retriever=name)
    assert neighbours.passage_ids == [[hit.passage_id for hit in row] for row in hits]
    assert neighbours.mask_BN.sum(1).tolist() == [len(row) for row in hits]
    queries = index.encode(questions)
    for b, row in enumerate(hits):
        for n in range(6):
            vector = neighbours.embeddings_BNR[b, n].numpy()
            if n < len(row):
                np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-6)
                np.testing.assert_allclose(vector, index.embeddings[row[n].row], atol=1e-3)
                assert neighbours.scores_BN[b, n] == pytest.approx(vector @ queries[b], abs=1e-6)
            else:
                assert not vector.any() and neighbours.scores_BN[b, n] == 0


def test_rows_may_have_fewer_neighbours_or_none(index: Index) -> None:
    neighbours = index.neighbours(["zebra", "honey"], 5, retriever="bm25")

    assert neighbours.passage_ids[0] == [] and not neighbours.mask_BN[0].any() and neighbours.mask_BN[1, 0]
    everything = index.neighbours(["honey"], 40, retriever="dense")
    assert everything.mask_BN.sum() == 24 and everything.mask_BN.shape == (1, 40)
    assert len(index.neighbours([], 4)) == 0


def test_neighbours_depend_on_the_question_alone(index: Index) -> None:
    """The answer's text cannot reach its own query: only the question is encoded, and companions change nothing."""
    encoder = index.encoder
    assert isinstance(encoder, StubEncoder)
    question = "which number has the honey of the market"
    before = index.neighbours([question], 8)
    encoder.encoded.clear()
    again = index.neighbours([question, "The answer is: number 5, it belongs to apple."], 8).rows([0])
    assert encoder.encoded == [question, "The answer is: number 5, it belongs to apple."]
    assert again.passage_ids == before.passage_ids
    torch.testing.assert_close(again.embeddings_BNR, before.embeddings_BNR, rtol=0, atol=0)
    torch.testing.assert_close(again.scores_BN, before.scores_BN, rtol=0, atol=1e-6)


def test_the_query_prompt_of_the_manifest_is_applied(build: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = build(encoder=StubEncoder(query_prompt="query: "))
    assert manifest.encoder.query_prompt == "query: "
    # Opened with an object that has forgotten its prompts: the index still knows them.
    encoder = StubEncoder()
    index = Index.open(tmp_path / "index", encoder=encoder)
    index.search(["honey"], retriever="dense")
    assert encoder.encoded == ["query: honey"]


def test_a_query_longer_than_the_encoder_reads_is_read_to_its_end(
    build: Callable[..., Manifest], tmp_path: Path, index: Index
) -> None:
    preamble = " ".join(f"word{i}" for i in range(40))
    first, second = index.encode([f"{preamble} honey", f"{preamble} apple"])
    assert not np.allclose(first, second)
    whole = Passage("p", f"{preamble} honey")
    np.testing.assert_array_equal(first, encode_passages([whole], index.encoder, mode="windows")[0][0])
    # As passages are where whoever built the index wanted them cut.
    build(long_passages="truncate")
    first, second = Index.open(tmp_path / "index", encoder=StubEncoder()).encode(
        [f"{preamble} honey", f"{preamble} apple"]
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("retriever", ["dense", "bm25", "hybrid", "blend"])
def test_a_filtered_search_does_not_depend_on_the_other_queries(
    index: Index, retriever: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of so small an index all is fused otherwise, however deep.
    monkeypatch.setattr(Hybrid, "depth", 2)
    monkeypatch.setattr(Blend, "depth", 2)
    queries = [passage.text for passage in index.iterate()]
    for domain in sorted(set(index.domains)):
        asked = {"retriever": retriever, "where": {"domain": domain}}
        together = index.search(queries, 2, **asked)
        alone = [index.search([query], 2, **asked)[0] for query in queries]
        assert [[hit.row for hit in hits] for hits in together] == [[hit.row for hit in hits] for hits in alone]
        for hits, own in zip(together, alone, strict=True):
            np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in own], atol=1e-6)


def test_each_filtered_query_is_ranked_no_deeper_than_it_needs(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[str, ...], int]] = []
    rank = Index._rank

    def watched(self: Index, queries: Any, k: int, retriever: str | None) -> Any:
        asked.append((tuple(queries.texts), k))
        return rank(self, queries, k, retriever)

    monkeypatch.setattr(Index, "_rank", watched)
    near, far = (index.passage(name).text for name in ("market-1", "river-1"))
    index.search([near, far], 1, retriever="bm25", where={"domain": "market"})
    # Of what was found at once no more is asked.
    assert asked[0] == ((near, far), 4) and len(asked) > 1 and {texts for texts, _ in asked[1:]} == {(far,)}


def test_another_encoder_is_refused_and_both_are_named(folder: Path) -> None:
    with pytest.raises(EncoderMismatchError) as caught:
        Index.open(folder, encoder=StubEncoder(7))
    message = caught.value.message
    assert "was built with encoder 'stub-0'" in message and "but was opened with 'stub-7'" in message
    assert StubEncoder().digest[:12] in message and StubEncoder(7).digest[:12] in message
    with pytest.raises(EncoderMismatchError, match=r"width 64\), but was opened with 'stub-0' .*width 32"):
        Index.open(folder, encoder=StubEncoder(width=32))


def test_the_encoder_is_loaded_only_when_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("ragmoe.index.folder.load_encoder", refuse)
    assert Index.open(folder, retriever="bm25").search(["honey"])[0][0].passage_id == "market-5"


def test_a_name_that_stands_for_another_model_now_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ragmoe.index.folder.load_encoder", lambda name: StubEncoder(3))
    with pytest.raises(EncoderMismatchError, match=r"'stub-0'.*'stub-3'"):
        Index.open(folder).search(["honey"])


def test_bad_arguments(index: Index) -> None:
    with pytest.raises(UsageError, match="0 passages were asked for; expected at least 1"):
        index.search(["x"], 0)
    with pytest.raises(UsageError, match="a single string was given; expected a list of queries"):
        index.search("x")
    with pytest.raises(UsageError, match=r"the query 'caf\\udce9' holds what is not UTF-8; expected text"):
        index.search(["café", "caf\udce9"])
    with pytest.raises(UsageError, match="a single string"):
        index.neighbours("x")
    with pytest.raises(UsageError, match="the query None is of the type NoneType; expected text"):
        index.search([None])
    with pytest.raises(UsageError, match=r"the filter asks for \['a', 'b'\]; expected one text for each of domain"):
        index.search(["x"], where={"domain": ["a", "b"]})


def test_one_passage_and_more_asked_for_than_there_are(build: Callable[..., Manifest], tmp_path: Path) -> None:
    source = tmp_path / "one.jsonl"
    source.write_text(json.dumps({"id": "only", "text": "The of"}) + "\n")
    build(sources=(str(source),))
    index = Index.open(tmp_path / "index", encoder=StubEncoder())
    for name in RETRIEVERS:
        assert len(index.search(["anything"], 50, retriever=name)[0]) <= 1
    assert index.search(["anything"], 50, retriever="hybrid")[0][0].passage_id == "only"
    assert index.neighbours(["anything"], 16).mask_BN.sum() == 1


def test_folders_that_are_no_index_say_why(tmp_path: Path) -> None:
    with pytest.raises(IndexFolderError, match=r"there is no index at .*: no such folder") as caught:
        Index.open(tmp_path / "none")
    assert "ragmoe index build" in str(caught.value.hint)
    (tmp_path / "thing.txt").write_text("?")
    with pytest.raises(IndexFolderError, match=r"is not an index: it has no manifest\.json; it holds: thing\.txt"):
        Index.open(tmp_path)
    with pytest.raises(IndexFolderError, match=r"is a file; an index is a folder"):
        Index.open(tmp_path / "thing.txt")


def test_damaged_manifests_are_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    for damaged, reason in (
        (text[:100], "is damaged"),
        (text.replace('"format": 1', '"format": 99'), "is of format 99, this version reads format 1"),
        (text.replace('"passages": 24', '"passages": 25'), "does not have the digest it names"),
        (text.replace('"skipped": 0', '"skiped": 0'), "is damaged: .*skip"),
    ):
        path.write_text(damaged)
        with pytest.raises(IndexFolderError, match=reason):
            Index.open(folder)


def test_the_digest_is_of_the_content(build: Callable[..., Manifest], tmp_path: Path, corpus: Path) -> None:
    first = build(out=tmp_path / "a")
    assert Index.open(tmp_path / "a").digest == first.digest
    assert build(out=tmp_path / "b", encoder=StubEncoder(1)).digest != first.digest


@pytest.mark.parametrize("scans", [0, 2])
def test_ids_are_found_whether_looked_through_or_in_a_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, scans: int
) -> None:
    monkeypatch.setattr(store, "_SMALL", 0)
    monkeypatch.setattr(store, "_SCANS", scans)
    index = Index.open(folder, encoder=StubEncoder())
    ids = list(index.passage_ids)
    for _ in range(4):
        asked = [ids[7], ids[0], ids[7], ids[-1]]
        assert index.rows(asked) == [7, 0, 7, len(ids) - 1]
        assert [passage.id for passage in index.passages(asked)] == asked
        assert index.find("nobody") is None and index.find(ids[3]) == index.passage(ids[3])
        with pytest.raises(IndexFolderError, match="holds no passage 'nobody'; it holds"):
            index.rows([ids[1], "nobody"])
    assert index.passages([]) == []
    assert "_row_of" in index._store.__dict__
