"""Language modelling: every token once, neighbours of what precedes, and planted leaks that are not returned."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from stub_encoder import StubEncoder
from tiny_decoder import byte_tokenizer

from ragmoe import DataError, Index, Neighbours, Passage
from ragmoe.index import BuildOptions, build_index
from ragmoe.training.config import LanguageConfig
from ragmoe.training.language import LanguageCollator, LanguageDataset, cut_documents
from ragmoe.training.retrieved import Retrieved

WORDS = [f"{a}{b}" for a in ("ri", "mo", "ta", "ke", "lu", "so") for b in ("ver", "nas", "tel", "bin", "dor", "gap")]
CONFIG = LanguageConfig(chunk_tokens=200, neighbours=4)


def changed_config(**changes: Any) -> LanguageConfig:
    return CONFIG.model_copy(update=changes)


def story(seed: int, words: int = 150) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


DOCUMENTS = [Passage(f"d{i}", story(i), domain="a", doc_id=f"d{i}") for i in range(3)]


def changed(text: str) -> str:
    """One word is another: of 138 grams of 13 words, 125 are the same, and 151 are in either, which is 0.83."""
    return " ".join("other" if at == 75 else word for at, word in enumerate(text.split()))


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the documents in pieces, of strangers, and of what must never be a neighbour of document 0."""
    folder = tmp_path_factory.mktemp("leaky")
    rows: list[dict[str, Any]] = []
    for document in DOCUMENTS:
        words = document.text.split()
        for at in range(0, len(words), 30):
            text = " ".join(words[at : at + 42])
            rows.append({"id": f"{document.id}#{at}", "text": text, "doc_id": document.id})
    rows += [{"id": f"s{i}", "text": story(100 + i, 40), "doc_id": f"s{i}"} for i in range(8)]
    copy = changed(DOCUMENTS[0].text).split()
    for at in range(0, len(copy), 30):
        rows.append({"id": f"copy#{at}", "text": " ".join(copy[at : at + 42]), "doc_id": "copy"})
    chunks = cut_documents(DOCUMENTS, byte_tokenizer(), CONFIG)
    rows.append({"id": "quoted", "text": chunks[2].text.strip(), "doc_id": "quoting"})
    # Another part of document 0, of the words that chunk 2 does not have.
    rows.append({"id": "elsewhere", "text": " ".join(DOCUMENTS[0].text.split()[:40]), "doc_id": "elsewhere"})
    # Amid so much else that little of the passage is the document's.
    rows.append({"id": "amid", "text": f"{story(77, 80)} {chunks[2].text.strip()} {story(78, 80)}", "doc_id": "amid"})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = StubEncoder(max_length=400)
    build_index(BuildOptions((str(folder / "corpus.jsonl"),), folder / "index", encoder=encoder))
    return folder / "index"


def dataset(leaky: Path, cache: Path, documents: list[Passage] = DOCUMENTS, **changes: Any) -> LanguageDataset:
    index = Index.open(leaky, encoder=StubEncoder(max_length=400))
    given = {name: changes.pop(name) for name in ("examples", "seed") if name in changes}
    return LanguageDataset(documents, index, byte_tokenizer(), changed_config(**changes), cache=cache, **given)


def test_every_token_is_predicted_once() -> None:
    tokenizer = byte_tokenizer()
    chunks = cut_documents([*DOCUMENTS, Passage("empty", "")], tokenizer, changed_config(context_tokens=7))
    for place, document in enumerate(DOCUMENTS):
        own = [chunk for chunk in chunks if chunk.document == place]
        assert "".join(chunk.text for chunk in own) == document.text
        assert [chunk.number for chunk in own] == list(range(len(own)))
        ids = [tokenizer.bos_token_id, *(token for chunk in own for token in chunk.ids)]
        assert own[0].before == (tokenizer.bos_token_id,)
        for chunk in own[1:]:
            begin = 1 + 200 * chunk.number
            assert list(chunk.before) == ids[begin - 7 : begin]
    batch = LanguageCollator(tokenizer)([type("E", (), {"chunk": c, "neighbours": None})() for c in chunks[:2]])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert (batch["labels"] != -100).sum() == 400
    with pytest.raises(DataError, match="1 documents hold no token"):
        cut_documents([Passage("empty", "")], tokenizer, CONFIG)
    with pytest.raises(ValidationError, match="query_chunks"):
        LanguageConfig(query_chunks=0)


def test_planted_leaks_are_never_neighbours(leaky: Path, tmp_path: Path) -> None:
    data = dataset(leaky, tmp_path)
    planted = {
        "quoted",
        "amid",
        "elsewhere",
        *(name for name in data.index.passage_ids if name.startswith(("copy", "d0#"))),
    }
    place = next(i for i, chunk in enumerate(data.chunks) if chunk.document == 0 and chunk.number == 2)
    unguarded = data.index.neighbours([data.query(place)], len(data.index)).passage_ids[0]
    # Without the guard some of them come first, and all of them come.
    assert set(unguarded[:4]) & planted and planted <= set(unguarded)
    found = data.neighbours(place)
    assert found is not None and not set(found.passage_ids[0]) & planted
    assert found.passage_ids[0] == [name for name in unguarded if name not in planted][:4]
    everything = changed_config(neighbours=len(data.index) - len(planted))
    data.config = everything
    assert set(data.neighbours(place).passage_ids[0]) == set(data.index.passage_ids) - planted


def test_a_guard_holds_back_no_more_than_it_must(leaky: Path, tmp_path: Path) -> None:
    data = dataset(leaky, tmp_path)
    place = next(i for i, chunk in enumerate(data.chunks) if chunk.document == 1 and chunk.number == 2)
    data.config = changed_config(neighbours=len(data.index))
    held = set(data.index.passage_ids) - set(data.neighbours(place).passage_ids[0])
    assert held == {name for name in data.index.passage_ids if name.startswith("d1#")}
    mask = data.neighbours(place).mask_BN[0]
    assert mask.sum() == len(data.index) - len(held) and not mask[-len(held) :].any()


def test_neighbours_depend_on_what_precedes_alone(leaky: Path, tmp_path: Path) -> None:
    data = dataset(leaky, tmp_path)
    assert not data.neighbours(0).mask_BN.any() and data.neighbours(0).mask_BN.shape == (1, 4)
    text = DOCUMENTS[0].text
    other = replace(DOCUMENTS[0], text=text[:400] + story(55)[: len(text) - 400])
    twin = dataset(leaky, tmp_path, [other, *DOCUMENTS[1:]])
    # Chunk 2 begins at 400: it is another now, and what retrieves for it is the same.
    assert data.chunks[2].text != twin.chunks[2].text
    assert data.query(2) == twin.query(2) == text[200:400]
    assert data.query(1) == text[:200]
    two = dataset(leaky, tmp_path, query_chunks=2)
    assert two.query(2) == text[:400] and two.query(1) == text[:200]
    begin = next(i for i, chunk in enumerate(two.chunks) if chunk.document == 1)
    assert two.query(begin + 1) == DOCUMENTS[1].text[:200]


def test_several_queries_bring_the_best_they_find(leaky: Path, tmp_path: Path) -> None:
    """Not the last chunk alone says what a document is about; what is read is as much, and nothing leaks."""
    own, three = dataset(leaky, tmp_path), dataset(leaky, tmp_path, queries=3)
    place = next(i for i, chunk in enumerate(own.chunks) if chunk.document == 0 and chunk.number == 4)
    best: dict[str, float] = {}
    for at in (place - 2, place - 1, place):
        retrieved, query = own._found[at]
        grams = own.guard.grams(own.chunks[place].text)
        allowed = [
            (row, float(score))
            for row, score in zip(retrieved.rows_QN[query], retrieved.scores_QN[query], strict=True)
            if row >= 0 and own.guard.allows(0, grams, int(row))
        ]
        for row, score in allowed[:4]:
            name = own.index.passage_ids[row]
            best[name] = max(score, best.get(name, score))
    expected = sorted(best, key=lambda name: -best[name])[:4]
    found = three.neighbours(place)
    assert found.passage_ids[0] == expected and found.passage_ids != own.neighbours(place).passage_ids
    assert found.scores_BN[0].tolist() == pytest.approx([best[name] for name in expected])
    rows = three.index.rows(expected)
    assert torch.equal(found.embeddings_BNR[0], torch.from_numpy(three.index.embeddings[rows].astype("float32")))
    # A document's second chunk has one query, its first none; those of the document before are not asked.
    begin = next(i for i, chunk in enumerate(own.chunks) if chunk.document == 1)
    assert three.neighbours(begin + 1).passage_ids == own.neighbours(begin + 1).passage_ids
    assert not three.neighbours(begin).mask_BN.any()


def test_queries_are_shown_in_the_place_of_what_they_find(
    leaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control that searches nothing: each query's embedding, all of one weight, and none before a second chunk."""
    monkeypatch.setattr(Index, "neighbours", lambda *_, **__: pytest.fail("something was searched"))
    data = dataset(leaky, tmp_path, shown="queries", queries=3)
    place = next(i for i, chunk in enumerate(data.chunks) if chunk.document == 1 and chunk.number == 4)
    asked = [data.query(at) for at in (place - 2, place - 1, place)]
    found = data.neighbours(place)
    assert torch.equal(found.embeddings_BNR[0], torch.from_numpy(data.index.encode(asked)))
    assert found.mask_BN.all() and found.mask_BN.shape == (1, 3) and not found.scores_BN.any()
    assert not found.passage_ids
    assert data.neighbours(place - 3).mask_BN.sum() == 1 and not data.neighbours(place - 4).mask_BN.any()
    batch = LanguageCollator(byte_tokenizer())([data.example(at) for at in (place - 4, place - 3, place)])
    assert batch["neighbour_mask"].sum(dim=1).tolist() == [0, 1, 3]
    # They are kept: another run encodes nothing.
    monkeypatch.setattr(Index, "encode", lambda *_: pytest.fail("something was encoded twice"))
    again = dataset(leaky, tmp_path, shown="queries", queries=3)
    assert torch.equal(again.neighbours(place).embeddings_BNR, found.embeddings_BNR)
    dropped = again.example(place, random.Random(0)).neighbours
    assert dropped is not None and dropped.mask_BN.shape == (1, 3)


def test_the_order_is_the_seeds(leaky: Path, tmp_path: Path) -> None:
    one, again, other = (dataset(leaky, tmp_path, examples=40, seed=s, drop_each=0.5) for s in (1, 1, 2))
    assert one.order == again.order != other.order
    n = len(one.chunks)
    assert sorted(one.order[:n]) == list(range(n)) and one.order[:n] != one.order[n : 2 * n]
    a, b = (LanguageCollator(byte_tokenizer())([data[at] for at in range(20, 28)]) for data in (one, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {"neighbour_embeddings", "neighbour_scores", "neighbour_mask"} <= set(a)
    assert [data.order for data in (dataset(leaky, tmp_path),)] == [list(range(n))]


def test_a_gate_that_makes_nothing_of_neighbours_waits_for_none(
    leaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Index, "neighbours", lambda *a, **k: pytest.fail("retrieved"))
    told: list[str] = []

    def recall(neighbours: Neighbours, domain: str) -> Neighbours:
        told.append(domain)
        return neighbours

    index = Index.open(leaky, encoder=StubEncoder(max_length=400))
    given = {"cache": tmp_path, "retrieves": False, "recall": recall}
    data = LanguageDataset(DOCUMENTS, index, byte_tokenizer(), changed_config(), **given)
    data.retrieve(range(len(data.chunks)))
    batch = LanguageCollator(byte_tokenizer())([data[at] for at in range(4)])
    # The domain is told all the same, and a batch has the shapes that it would have.
    assert told == [DOCUMENTS[data.chunks[place].document].domain for place in data.order[:4]]
    assert not batch["neighbour_mask"].any()
    assert batch["neighbour_embeddings"].shape == (4, data.config.neighbours, index.width)


def test_a_short_run_retrieves_for_what_it_shows(leaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    retrieve = Retrieved.of.__func__

    def watched(cls: Any, index: Any, texts: Any, *args: Any, **kwargs: Any) -> Any:
        asked.extend(texts)
        return retrieve(cls, index, texts, *args, **kwargs)

    monkeypatch.setattr(Retrieved, "of", classmethod(watched))
    whole = dataset(leaky, tmp_path)
    assert asked == [whole.query(at) for at, chunk in enumerate(whole.chunks) if chunk.number]
    asked.clear()
    data = dataset(leaky, tmp_path, examples=4, seed=3)
    shown = sorted(at for at in data.order if data.chunks[at].number)
    assert asked == [data.query(at) for at in shown] and 0 < len(asked) <= 4
    # Of others when they are asked for, and of none twice.
    asked.clear()
    other = next(at for at, chunk in enumerate(data.chunks) if chunk.number and at not in shown)
    with pytest.raises(ValueError, match=f"chunk {other} is none of those shown"):
        data.neighbours(other)
    data.retrieve([0, *shown, other])
    assert asked == [data.query(other)]
    for at in (other, *shown):
        ours, known = data.neighbours(at), whole.neighbours(at)
        assert ours.passage_ids == known.passage_ids and torch.equal(ours.embeddings_BNR, known.embeddings_BNR)


def test_without_an_index_there_are_no_neighbours(tmp_path: Path) -> None:
    data = LanguageDataset(DOCUMENTS, None, byte_tokenizer(), CONFIG, cache=tmp_path)
    assert data[1].neighbours is None
    assert "neighbour_mask" not in LanguageCollator(byte_tokenizer())([data[0], data[1]])
