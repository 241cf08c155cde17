"""The index benchmark at a tiny size: its rows, and that what it compares is the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import _index_cases
import index
import numpy as np
import pytest
from _retrieval_data import CORE
from tiny import WORDS, save_tiny_encoder

from ragmoe.corpus import Passage, Question


@pytest.fixture
def data(tmp_path: Path) -> Path:
    words = WORDS.split()
    for domain in CORE:
        folder = tmp_path / "data" / domain
        folder.mkdir(parents=True)
        lines = [{"id": f"{domain}{i}", "text": f"the {word} of {words[i - 1]}"} for i, word in enumerate(words)]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        asked = {
            "id": f"{domain}-q",
            "question": f"the {words[3]} of {words[2]}",
            "answers": ["a"],
            "gold_ids": [f"{domain}3"],
        }
        (folder / "dev.jsonl").write_text(json.dumps(asked) + "\n")
    return tmp_path / "data"


@pytest.mark.slow
def test_the_rows(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(index, "QUERIES", 32)
    words = ["--only", "encode|search", "--passages", "28", "--vectors", "200", "--rounds", "1", "--encoder"]
    out, encoder = tmp_path / "new" / "r.json", save_tiny_encoder(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["index", "--data", str(data), "--json", str(out), *words, str(encoder)])
    index.main()
    rows = {r["metric"]: r for r in json.loads(out.read_text())["rows"]}
    assert list(rows) == [
        "encode", "build to encode alone", "mean cosine", "lowest cosine", "lowest cosine of the 28 read whole",
        "R@20 of 7 questions", "search, 32 queries",
        "one query, ids, scores, embeddings: added to raw", "one query, texts as well: added to raw",
        "open, a fresh process", "open: memory", "first search, a fresh process", "first search: memory",
        "first ids, a fresh process", "first ids: memory",
    ]  # fmt: skip
    # Of a tiny random model both make the same vectors, in whatever precision was found faster.
    assert rows["mean cosine"]["ok"] and rows["lowest cosine"]["value"] > 0.99
    # The questions are their passages, word for word.
    assert rows["R@20 of 7 questions"]["value"] == 1
    assert "tokens a batch" in out.with_suffix(".md").read_text()


def test_a_sample_has_its_share_of_each_domain_and_the_gold(data: Path) -> None:
    questions = {
        name: [
            Question(id=name, question="?", gold_ids=(f"{name}3",)),
            Question(id="x", question="?", gold_ids=("no",)),
        ]
        for name in CORE
    }
    passages, asked = _index_cases.sample(data, questions, 28)
    ids = [p.id for p in passages]
    assert len(ids) == len(set(ids)) == 28 and [q.id for q in asked] == list(CORE)
    assert all(f"{name}3" in ids and sum(p.domain == name for p in passages) == 4 for name in CORE)


def test_made_up_vectors_are_near_real_ones_and_the_same_each_time() -> None:
    base = np.eye(3, 16, dtype=np.float32)
    lines = list(_index_cases.made_up_lines([Passage(id="a", text="river"), Passage(id="b", text="zebra")], 9))
    assert [line["text"] for line in lines][:2] == ["river number 0", "zebra number 1"]
    encoder = _index_cases.MadeUp(base)
    vectors = encoder.encode([line["text"] for line in lines])
    assert len(np.unique(vectors, axis=0)) == 9 and ((vectors @ base.T).max(axis=1) > 0.6).all()
    np.testing.assert_array_equal(encoder.encode([lines[4]["text"]])[0], vectors[4])


@pytest.mark.slow
def test_processes_are_compared_by_the_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(index, "available_threads", lambda: 2)
    out, encoder = tmp_path / "r.json", save_tiny_encoder(tmp_path / "model")
    words = ["--only", "processes", "--passages", "28", "--rounds", "1", "--json", str(out), "--encoder", str(encoder)]
    monkeypatch.setattr(sys, "argv", ["index", "--data", str(data), *words])
    index.main()
    (found,) = json.loads(out.read_text())["rows"]
    assert found["value"] > 0 and found["baseline"] > 0
