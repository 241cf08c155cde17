"""The benchmark of sizes: its vectors, and each case in processes of its own. Nothing here looks at the clock."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scale
from _scale_data import Source
from stub_encoder import StubEncoder

from ragmoe.index import BuildOptions, build_index

WORDS = ("river", "clinic", "bank", "archive", "law", "zebra")


def test_vectors_lie_around_those_of_passages_where_texts_differ(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    # Passages differ in the first three of eight dimensions only: so does the noise.
    real = np.zeros((40, 8), dtype=np.float32)
    real[:, :3] = chance.standard_normal((40, 3))
    real /= np.linalg.norm(real, axis=1, keepdims=True)
    source = Source(real, 0.3)
    made = source.draw(0, 4000)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    assert np.abs(made[:, 3:]).max() < 1e-3 < np.abs(made[:40, :3] - real[:, :3]).max()
    cosines = (made * real[np.arange(4000) % 40]).sum(axis=1)
    assert 0.9 < cosines.mean() < 0.99
    assert np.allclose(Source(real, 0).draw(7, 50), real[np.arange(7, 57) % 40], atol=1e-6)
    source.write(tmp_path / "x.npy", 4000)
    assert np.array_equal(np.load(tmp_path / "x.npy"), made.astype(np.float16))
    # Queries are new, and of passages evenly spread.
    queries = source.queries(20)
    assert len(queries) == 20 and (queries @ made.T).max() < 1 - 1e-6
    assert len(np.unique((queries @ real.T).argmax(axis=1))) > 10


@pytest.mark.slow
def test_rows_of_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "result.json"
    texts = [" ".join(WORDS[(i * j + j) % 6] + str(i % (j + 2)) for j in range(5)) for i in range(60)]
    corpus.write_text("".join(json.dumps({"id": f"p{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    build_index(BuildOptions((str(corpus),), tmp_path / "index", encoder=StubEncoder(width=16)))
    words = ["--smoke", "--rounds", "1", "--only", "IVF-SQ8", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["scale", "--index", str(tmp_path / "index"), *words])
    scale.main()
    rows = json.loads(out.read_text())["rows"]
    found = {(r["case"].split(", ")[1], r["metric"]): r for r in rows}
    cases = sorted({case for case, _ in found})
    exact, other = ({metric: r for (case, metric), r in found.items() if case == name} for name in cases)
    assert exact["R@10"]["value"] == 1 and 0.9 < other["R@10"]["value"] <= 1
    # 2,000 vectors of 16 numbers: in full, and at a byte a number.
    assert 0.128 <= exact["file"]["value"] < 0.129 and other["file"]["value"] < 0.08
    for made in (exact, other):
        parts = made["memory: anonymous"]["value"] + made["memory: mapped"]["value"]
        assert parts == pytest.approx(made["memory: resident"]["value"], rel=0.05)
        assert made["rate"]["value"] > 0 and made["rate"]["target"] is None
    assert "| 2,000 | IVF-SQ8 |" in out.with_suffix(".md").read_text()


def test_only_a_million_is_judged() -> None:
    held = {"before": {"resident": 1}, "after": dict.fromkeys(("resident", "anonymous", "mapped", "pss", "peak"), 400)}
    built = {"seconds": 1.0, "peak": 1, "record": {"factory": "F"}}
    large = {"before": held["before"], "after": dict.fromkeys(held["after"], 1700)}
    for count, targets in ((100_000, [None] * 3), (1_000_000, [0.95, 20.0, 4.0])):
        exact = scale.Case(count, "Flat", built, 1, large, recall=1.0, rate=10.0)
        ours = scale.Case(count, "automatic", built, 1, held, recall=0.96, rate=190.0)
        rows = scale.rows_of(ours, exact)
        assert [r["target"] for r in rows[:3]] == targets and all(r["target"] is None for r in rows[3:])
        if count == 1_000_000:
            assert [r["ok"] for r in rows[:3]] == [True, False, True]
