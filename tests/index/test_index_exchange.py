"""Export and import: what leaves an index comes back the same, and other vectors than the encoder's are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import rows
from stub_encoder import StubEncoder

from ragmoe import DataError, EncoderMismatchError, Index, IndexFolderError, RagmoeError, UsageError
from ragmoe.index import ImportOptions, Manifest, export_index, plan_import, verify_index
from ragmoe.index.export import EXPORTERS
from ragmoe.index.windows import encode_passages


def test_parquet_holds_passages_and_embeddings(folder: Path, tmp_path: Path) -> None:
    index = Index.open(folder)
    assert export_index(folder, tmp_path / "out" / "x.parquet", to="parquet").passages == 24
    table = pq.read_table(tmp_path / "out" / "x.parquet")
    assert table.column_names == ["id", "title", "text", "domain", "doc_id", "split", "embedding"]
    assert table.column("id").to_pylist() == index.passage_ids
    assert table.column("text").to_pylist() == [p.text for p in index.iterate()]
    np.testing.assert_array_equal(np.stack(table.column("embedding").to_numpy()), index.embeddings)
    assert json.loads(table.schema.metadata[b"encoder"])["id"] == "stub-0"


def test_beir_is_read_back_as_a_corpus(folder: Path, tmp_path: Path) -> None:
    export_index(folder, tmp_path / "beir", to="beir")
    lines = [json.loads(line) for line in (tmp_path / "beir" / "corpus.jsonl").read_text().splitlines()]
    about = {"domain": "river", "doc_id": "river-d0", "split": "train"}
    first = rows()[0]
    assert lines[0] == {"_id": "river-0", "title": "Ferry", "text": first["text"], "metadata": about}
    from ragmoe.corpus.passages import read_passages

    read = list(read_passages([tmp_path / "beir" / "corpus.jsonl"]))
    assert read == list(Index.open(folder, encoder=StubEncoder()).iterate())


def test_an_export_is_whole_or_not_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="form 'csv' is unknown; there are: beir, parquet"):
        export_index(folder, tmp_path / "x", to="csv")
    (tmp_path / "there").write_text("mine")
    with pytest.raises(IndexFolderError, match="there is there already"):
        export_index(folder, tmp_path / "there", to="beir")

    def full(_: object, path: Path) -> None:
        path.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(EXPORTERS, "beir", full)
    with pytest.raises(IndexFolderError, match="cannot be written: No space left on device; nothing is left"):
        export_index(folder, tmp_path / "beir", to="beir")
    assert {path.name for path in tmp_path.iterdir()} == {"there", folder.name}


def test_an_export_touches_nothing_beside_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "precious.txt").write_text("mine")
    export_index(folder, tmp_path / "out", to="beir")
    assert (tmp_path / "out.part" / "precious.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.part", folder.name}

    def slow(_: object, path: Path) -> None:
        path.write_text("passages")
        (tmp_path / "late").write_text("mine")

    monkeypatch.setitem(EXPORTERS, "beir", slow)
    with pytest.raises(IndexFolderError, match="late is there already"):
        export_index(folder, tmp_path / "late", to="beir")
    assert (tmp_path / "late").read_text() == "mine"


@pytest.fixture
def corpus_and_vectors(corpus: Path) -> tuple[Path, np.ndarray]:
    """The corpus, and vectors of three times unit length in double precision, as something else may have made them."""
    from ragmoe.corpus.passages import read_passages

    vectors, _ = encode_passages(list(read_passages([corpus])), StubEncoder(), mode="truncate")
    return corpus, 3.0 * vectors.astype(np.float64)


def ran(tmp_path: Path, vectors: Path, corpus: Path, **options: Any) -> Manifest:
    given = {"encoder": StubEncoder(), "out": tmp_path / "made", **options}
    return plan_import(ImportOptions(vectors, (str(corpus),), **given)).run()


def test_vectors_in_the_order_of_the_passages(corpus_and_vectors: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    corpus, vectors = corpus_and_vectors
    np.save(tmp_path / "v.npy", vectors)
    encoder = StubEncoder()
    manifest = ran(tmp_path, tmp_path / "v.npy", corpus, encoder=encoder)
    # Only the sample was encoded.
    assert len(encoder.encoded) == 24 and manifest.passages == 24
    assert manifest.long_passages.mode == "truncate" and manifest.long_passages.longer == 9
    index = Index.open(tmp_path / "made", encoder=StubEncoder())
    np.testing.assert_allclose(index.embeddings, vectors / 3, atol=1e-3)
    assert verify_index(tmp_path / "made", encoder=StubEncoder()) == []
    assert index.search(["honey"], 1)[0][0].passage_id == "market-5"


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_vectors_by_id(form: str, corpus_and_vectors: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    corpus, vectors = corpus_and_vectors
    order = np.random.default_rng(0).permutation(24)
    ids = [rows()[i]["id"] for i in order]
    options: dict[str, Any] = {}
    if form == "npy":
        np.save(tmp_path / "v.npy", vectors[order].astype(np.float16))
        (tmp_path / "ids.txt").write_text("".join(f"{name}\n" for name in ids))
        options = {"ids": tmp_path / "ids.txt"}
    else:
        pq.write_table(pa.table({"embedding": list(vectors[order]), "id": ids}), tmp_path / "v.parquet")
    ran(tmp_path, tmp_path / f"v.{form}", corpus, **options)
    np.testing.assert_allclose(Index.open(tmp_path / "made").embeddings, vectors / 3, atol=1e-3)


def test_what_was_exported_is_imported_the_same(folder: Path, corpus: Path, tmp_path: Path) -> None:
    export_index(folder, tmp_path / "x.parquet", to="parquet")
    ran(tmp_path, tmp_path / "x.parquet", tmp_path / "x.parquet", long_passages="windows")
    a, b = Index.open(folder), Index.open(tmp_path / "made")
    assert list(a.iterate()) == list(b.iterate()) and a.manifest.corpus_digest == b.manifest.corpus_digest
    np.testing.assert_allclose(a.embeddings, b.embeddings, atol=1e-3)
    assert (a.windows() == b.windows()).all()


def test_other_vectors_are_refused_with_numbers(corpus_and_vectors: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    corpus, vectors = corpus_and_vectors
    np.save(tmp_path / "v.npy", vectors)
    with pytest.raises(
        EncoderMismatchError, match=r"24 passages encoded again 24 .* the lowest -?0\.\d+ \('"
    ) as caught:
        ran(tmp_path, tmp_path / "v.npy", corpus, encoder=StubEncoder(1))
    assert "'stub-1'" in caught.value.message and "title, line break, text" in str(caught.value.hint)
    # Longer ones were cut, and not made of windows.
    with pytest.raises(EncoderMismatchError, match="24 passages encoded again 9 have a cosine below"):
        ran(tmp_path, tmp_path / "v.npy", corpus, long_passages="windows")
    assert not (tmp_path / "made").exists()


def test_files_of_vectors_that_do_not_fit(corpus_and_vectors: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    corpus, vectors = corpus_and_vectors
    broken = vectors.copy()
    broken[5, 3] = np.nan
    for name, array in {
        "few": vectors[:20], "many": np.concatenate([vectors, vectors[:2]]), "narrow": vectors[:, :10],
        "flat": vectors[0], "whole": vectors.astype(np.int64), "nan": broken, "zero": vectors * 0,
        "pickle": np.array([None, "x"], dtype=object),
    }.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", array)
    content = (tmp_path / "few.npy").read_bytes()
    (tmp_path / "huge.npy").write_bytes(content.replace(b"(20, 64)", b"(2" + b"0" * 9 + b", 64)")[: len(content)])
    (tmp_path / "ids.txt").write_text("a\nb\n")
    pq.write_table(pa.table({"vector": [[1.0]]}), tmp_path / "other.parquet")
    expected: dict[str, tuple[str, dict[str, Any]]] = {
        "few.npy": (r"passage 'archive-4' has no vector in .*few\.npy, which holds 20", {}),
        "many.npy": ("holds 26 vectors, the sources 24 passages", {}),
        "narrow.npy": ("vectors of width 10, encoder 'stub-0' makes such of 64", {}),
        "flat.npy": (r"float64 of shape \(64,\); expected floats", {}),
        "whole.npy": ("holds int64 of shape", {}),
        "nan.npy": ("vector 6 is zero or not finite", {}),
        "zero.npy": ("vector 1 is zero or not finite", {}),
        "pickle.npy": ("pickle.npy cannot be read: .*", {}),
        "huge.npy": ("huge.npy cannot be read: .*", {}),
        "none.npy": ("none.npy: there is no such file", {}),
        "vectors.txt": (r"is no file of vectors; expected one of: \.npy, \.parquet", {}),
        "other.parquet": ("has no column embedding, id; it has:", {}),
        "nan.npy ": ("holds 24 vectors, .*ids.txt 2 ids", {"ids": tmp_path / "ids.txt"}),
    }
    for name, (message, options) in expected.items():
        with pytest.raises(RagmoeError, match=message):
            ran(tmp_path, tmp_path / name.strip(), corpus, **options)
    (tmp_path / "ids.txt").write_text("a\na\n")
    with pytest.raises(DataError, match="id 'a' stands twice"):
        ran(tmp_path, tmp_path / "nan.npy", corpus, ids=tmp_path / "ids.txt")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a"], "embedding": [0.5]}, r"ids of type string and embeddings of type double; expected strings or"),
        ({"id": ["a"], "embedding": [None]}, "embeddings of type null; expected"),
        ({"id": ["a"], "embedding": [["x"]]}, r"embeddings of type list<\w+: string>; expected"),
        ({"id": [["a"]], "embedding": [[0.5]]}, r"ids of type list<\w+: string> and embeddings of"),
        ({"id": ["a", "b"], "embedding": pa.array([[0.5], None])}, "row 2 has no embedding"),
        ({"id": ["a"], "embedding": pa.array([None], pa.list_(pa.float32()))}, "row 1 has no embedding"),
        ({"id": pa.array([b"\xff"]), "embedding": [[0.5]]}, "cannot be read: "),
        ({"id": ["a", "b"], "embedding": [[0.5], [0.5, 1.0]]}, "cannot be read: "),
    ],
)
def test_columns_of_other_types_are_named(columns: dict[str, Any], message: str, corpus: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "v.parquet")
    with pytest.raises(DataError, match=rf"v\.parquet.*{message}"):
        ran(tmp_path, tmp_path / "v.parquet", corpus)


def test_vectors_that_unpack_to_more_than_memory_are_not_read(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pa.table({"id": [str(i) for i in range(5000)], "embedding": [[0.5] * 512] * 5000})
    pq.write_table(made, tmp_path / "v.parquet", compression="zstd", use_dictionary=["id"])
    monkeypatch.setattr("ragmoe._parquet.free_memory", lambda: 10_000_000)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(
        DataError, match=r"v\.parquet cannot be read: row group 1 of 1 says that it unpacks to 2\d\.\d MB, in a file of"
    ):
        ran(tmp_path, tmp_path / "v.parquet", corpus)
