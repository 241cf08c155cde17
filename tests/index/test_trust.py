"""An index that is not one's own: its FAISS file is never parsed, and nothing of it is unpickled."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stub_encoder import StubEncoder
from test_verify import reseal

import ragmoe
from ragmoe import Index, IndexFolderError
from ragmoe._threads import import_faiss
from ragmoe.index import plan_add, trust, verify_index
from ragmoe.index.manifest import file_record
from ragmoe.index.vectors import Choice

QUERIES = ["the honey of the market", "a ferry", "letters and deeds"]


def hits(folder: Path, retriever: str = "dense") -> list[list[Any]]:
    return Index.open(folder, encoder=StubEncoder()).search(QUERIES, 24, retriever=retriever)


@pytest.fixture
def abroad(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that somebody else built: the user's own list is empty. faiss reads only files of the user's cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("RAGMOE_CACHE", str(cache))
    faiss = import_faiss()
    read = faiss.read_index

    def refuse(path: str, *flags: Any) -> Any:
        return read(path, *flags) if Path(path).is_relative_to(cache) else pytest.fail(f"{path} was parsed")

    monkeypatch.setattr(faiss, "read_index", refuse)
    return folder


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "choose_factory", lambda rows, width: Choice("IVF2,Flat", "a test", 8 + 4 * width))


def test_an_own_file_is_read_and_another_gives_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Index.open(folder, encoder=StubEncoder())
    assert trust.is_ours(own.manifest.files["index-1.faiss"].sha256)
    expected = own.search(QUERIES, 24, retriever="dense")
    monkeypatch.setattr(trust, "rebuilt", lambda *_: pytest.fail("built anew"))
    assert hits(folder) == expected
    monkeypatch.undo()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "nobody"))
    monkeypatch.setattr(import_faiss(), "read_index", lambda *_: pytest.fail("parsed"))
    assert hits(folder) == expected


def test_a_hostile_file_with_a_forged_manifest_is_not_parsed(abroad: Path) -> None:
    expected = hits(abroad)
    (abroad / "index-1.faiss").write_bytes(b"IxFI" + bytes(1000))
    reseal(abroad)
    assert hits(abroad) == expected and verify_index(abroad, encoder=StubEncoder()) == []


@pytest.mark.usefixtures("lists")
def test_a_large_one_is_built_once_and_said(abroad: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (abroad / "index-1.faiss").write_bytes(b"?")
    reseal(abroad)
    index = Index.open(abroad, encoder=StubEncoder())
    assert index.faiss.index.nlist == 2
    kept = next((tmp_path / "cache" / "faiss").glob("*.faiss"))
    (said,) = caplog.messages
    assert "was not written by this user" in said and "24 vectors (IVF2,Flat)" in said and str(kept) in said
    found = [row for row, _ in index.faiss.search(np.asarray(index.embeddings, dtype=np.float32), 1)]
    assert np.concatenate(found).tolist() == list(range(24))
    made = kept.stat().st_mtime_ns
    assert hits(abroad) == index.search(QUERIES, 24, retriever="dense")
    assert kept.stat().st_mtime_ns == made and len(caplog.messages) == 1
    # What somebody put into the cache is not believed either.
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    assert hits(abroad) == index.search(QUERIES, 24, retriever="dense")
    assert len(caplog.messages) == 2 and trust.is_ours(file_record(kept).sha256)
    assert sorted(path.suffix for path in kept.parent.iterdir()) == [".faiss", ".json"]


@pytest.mark.usefixtures("lists")
def test_what_was_long_not_used_goes_from_the_cache(abroad: Path, tmp_path: Path) -> None:
    hits(abroad)
    cache = tmp_path / "cache" / "faiss"
    (record,) = cache.glob("*.json")
    for name, days in (("used", 80), ("unused", 100)):
        for suffix in (".json", ".faiss"):
            copied = shutil.copy(record.with_suffix(suffix), cache / f"{name}{suffix}")
            os.utime(copied, (time.time() - days * 24 * 3600,) * 2)
    record.with_suffix(".faiss").unlink()
    hits(abroad)
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        [f"{record.stem}.faiss", record.name, "used.faiss", "used.json"]
    )
    # To be used is to be kept on.
    os.utime(record, (0, 0))
    hits(abroad)
    assert record.stat().st_mtime > time.time() - 3600


@pytest.mark.usefixtures("lists")
def test_vectors_that_are_not_those_of_the_manifest_are_not_kept(abroad: Path, tmp_path: Path) -> None:
    path = abroad / "embeddings-1.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IndexFolderError, match=r"embeddings-1\.npy was changed"):
        hits(abroad)
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("lists")
def test_a_cache_that_cannot_be_written(abroad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("?")
    monkeypatch.setenv("RAGMOE_CACHE", str(tmp_path / "file"))
    with pytest.raises(IndexFolderError, match=r"cannot be written: .*\nexport RAGMOE_CACHE=DIR"):
        hits(abroad)


def test_a_list_that_others_can_write_to_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    trust.remember("a" * 64)
    trust.remember("b" * 64)
    (path,) = (tmp_path / "ragmoe").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600 and trust.is_ours("a" * 64) and trust.is_ours("b" * 64)
    assert not trust.is_ours("a" * 63) and not trust.is_ours("")
    path.chmod(0o620)
    assert not trust.is_ours("a" * 64)
    # Nothing can be noted: then nothing is trusted, and building goes on.
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)
    trust.remember("a" * 64)
    assert not trust.is_ours("a" * 64)


def bm25_json(folder: Path, **changes: Any) -> None:
    path = folder / "bm25-1" / "params.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def bm25_rows(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / "bm25-1" / "indices.csc.index.npy"
    np.save(path, change(np.load(path, allow_pickle=False)))


@pytest.mark.parametrize(
    "forge",
    [
        lambda folder: bm25_json(folder, backend="numba", num_docs=10**6),
        lambda folder: bm25_json(folder, num_docs=3),
        lambda folder: bm25_rows(folder, lambda rows: rows + 10**6),
    ],
)
def test_a_forged_bm25_side_is_an_error_of_ours(forge: Callable[[Path], None], folder: Path) -> None:
    forge(folder)
    reseal(folder)
    with pytest.raises(IndexFolderError, match="bm25-1 is damaged"):
        hits(folder, "bm25")


def test_nothing_is_unpickled(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads an index: opening, each way of searching, neighbours, figures, verifying, adding."""
    from ragmoe.index.summary import summarise

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("unpickled"))
    index = Index.open(folder, encoder=StubEncoder())
    for retriever in ("dense", "bm25", "hybrid", "blend"):
        index.search(QUERIES, 3, retriever=retriever)
    index.neighbours(QUERIES, 3)
    assert len(list(index.chunks())) == 24 and summarise(index).sampled == 24
    more = tmp_path / "more.txt"
    more.write_text("The honey is new.")
    plan = plan_add(folder, [str(more)], encoder=StubEncoder())
    assert plan.run().passages == 25
    assert verify_index(folder, encoder=StubEncoder()) == []


_LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def _unpickles(node: ast.AST) -> bool:
    """Whether a piece of code imports what unpickles, or loads without forbidding it."""
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in _LOADERS for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in _LOADERS
    if not isinstance(node, ast.Call):
        return False
    said = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
    name = ast.unparse(node.func)
    return (
        said.get("allow_pickle", False) is not False
        or (name in ("np.load", "numpy.load") and "allow_pickle" not in said)
        or (name == "torch.load" and said.get("weights_only") is not True)
    )


def test_no_module_unpickles() -> None:
    for code in ("import pickle", "from joblib import load", "np.load(p)", "f(allow_pickle=x)", "torch.load(p)"):
        assert any(map(_unpickles, ast.walk(ast.parse(code)))), code
    for path in Path(ragmoe.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [node.lineno for node in ast.walk(tree) if _unpickles(node)], path  # type: ignore[attr-defined]
