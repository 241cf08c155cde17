"""Verification names what differs: a flipped byte, a missing or truncated file, another encoder's vectors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from stub_encoder import StubEncoder

from ragmoe import Index, IndexFolderError
from ragmoe.index import plan_remove, verify_index
from ragmoe.index.digests import write_digests
from ragmoe.index.manifest import FileRecord, Manifest, commit, file_record, read_manifest, write_manifest
from ragmoe.index.verify import changed_files

KINDS = (
    "passages-1.parquet",
    "texts-1.bin",
    "offsets-1.npy",
    "embeddings-1.npy",
    "digests-1.npy",
    "index-1.faiss",
    "bm25-1/vocab.index.json",
)


def reseal(folder: Path) -> None:
    """Make the manifest say what the files are now, digests and all."""
    manifest = read_manifest(folder)
    write_digests(folder / "embeddings-1.npy", folder / "digests-1.npy")
    files: dict[str, FileRecord] = {name: file_record(folder / name) for name in manifest.files}
    sealed: Manifest = manifest.model_copy(update={"files": files}).sealed()
    write_manifest(folder, sealed)
    commit(folder)


def verify(folder: Path) -> list[str]:
    return verify_index(folder, encoder=StubEncoder())


def test_a_good_index_has_no_problems(folder: Path) -> None:
    assert verify(folder) == []


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_byte(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    (problem,) = verify(folder)
    assert problem.startswith(f"{name} was changed: its sha256 is ")


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert verify(folder) == [f"{name} is missing"]
    with pytest.raises(IndexFolderError, match=f"is damaged: {name} is missing") as caught:
        Index.open(folder)
    assert f"ragmoe index verify {folder}" in str(caught.value.hint)


@pytest.mark.parametrize("name", KINDS)
def test_a_truncated_file(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    with (folder / name).open("r+b") as file:
        file.truncate(size - 1)
    assert verify(folder) == [f"{name} has {size - 1} bytes, expected {size}"]
    with pytest.raises(IndexFolderError, match=f"{name} has {size - 1} bytes, expected {size}"):
        Index.open(folder)


def test_all_problems_are_named(folder: Path) -> None:
    (folder / "texts-1.bin").unlink()
    (folder / "index-1.faiss").write_bytes(b"?")
    assert len(verify(folder)) == 2


def test_another_encoders_vectors(folder: Path) -> None:
    """The manifest agrees with every file, but the vectors are somebody else's: only encoding again can tell."""
    path = folder / "embeddings-1.npy"
    texts = [p.title + "\n" + p.text for p in Index.open(folder).iterate()]
    np.save(path, StubEncoder(9).encode(texts).astype(np.float16))
    reseal(folder)
    problems = verify(folder)
    assert any("passages encoded again differ from what is stored" in problem for problem in problems)
    assert any("not vectors of encoder 'stub-0'" in problem for problem in problems)


def test_another_encoder_of_the_same_name(folder: Path) -> None:
    (problem,) = verify_index(folder, encoder=StubEncoder(4))
    assert "was built with encoder 'stub-0'" in problem and "opened with 'stub-4'" in problem


def test_a_faiss_file_of_other_vectors(folder: Path) -> None:
    from ragmoe.index.trust import remember
    from ragmoe.index.vectors import build_faiss, choose_factory

    other = StubEncoder(5).encode([str(i) for i in range(24)]).astype(np.float16)
    build_faiss(folder / "index-1.faiss", other, choose_factory(24, 64), lambda done: None)
    remember(file_record(folder / "index-1.faiss").sha256)
    reseal(folder)
    assert any(
        "the FAISS file does not find passage 'river-0' by its own vector" in problem for problem in verify(folder)
    )


def test_passages_of_another_corpus(folder: Path) -> None:
    path = folder / "texts-1.bin"
    path.write_bytes(path.read_bytes().replace(b"honey", b"money"))
    reseal(folder)
    assert "the passages are not those of the corpus digest" in verify(folder)


def test_shapes_that_do_not_fit(folder: Path) -> None:
    path = folder / "embeddings-1.npy"
    np.save(path, np.load(path)[:20])
    reseal(folder)
    (problem,) = verify(folder)
    assert "24 passages and embeddings (20, 64), expected (24, 64)" in problem


def test_no_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IndexFolderError, match="there is no index"):
        verify_index(tmp_path / "none")


def test_a_moved_index_is_still_one(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere") == []


def test_an_index_that_is_replaced_meanwhile_is_not_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_remove(folder, domain="river")

    def changed(path: Path, manifest: Manifest) -> list[str]:
        if manifest.generation == 1:
            plan.run()
        return changed_files(path, manifest)

    monkeypatch.setattr("ragmoe.index.verify.changed_files", changed)
    assert verify(folder) == [] and read_manifest(folder).generation == 2
    (folder / "texts-2.bin").unlink()
    assert verify(folder) == ["texts-2.bin is missing"]
