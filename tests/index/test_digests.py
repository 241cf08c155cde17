"""Opening reads nothing large; a block of embeddings is verified when rows of it are first taken."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from stub_encoder import StubEncoder

from ragmoe import Index, IndexFolderError
from ragmoe.index import digests, plan_add, verify_index
from ragmoe.index.digests import VerifiedRows, verified, write_digests
from ragmoe.index.manifest import commit, file_record, read_manifest, write_manifest
from ragmoe.index.vectors import Choice, FaissSearcher, build_faiss

BLOCK = 1000
ROWS, WIDTH = 120, 24
#: Ways of taking rows, and the rows they mean.
KEYS: list[tuple[Any, list[int]]] = [
    (0, [0]),
    (-1, [119]),
    (np.int64(21), [21]),
    (slice(40, 60), list(range(40, 60))),
    (slice(None), list(range(120))),
    (slice(0, 0), []),
    (slice(100, None, -7), list(range(100, -1, -7))),
    ([7, 118, -3], [7, 118, 117]),
    (np.array([[3], [90]]), [3, 90]),
    (np.arange(120) == 64, [64]),
    (np.arange(120)[:, None] + np.zeros(24) == 64, [64]),
    ((..., 5), list(range(120))),
    (None, list(range(120))),
    ((slice(10, 12), 3), [10, 11]),
    (np.zeros(0, dtype=np.int64), []),
]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[VerifiedRows, np.ndarray]]:
    """Maps 120 rows in six blocks, some of them in two, with a byte of the file flipped."""
    monkeypatch.setattr(digests, "BLOCK", BLOCK)
    path, listed = tmp_path / "e.npy", tmp_path / "d.npy"
    plain = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float16)
    np.save(path, plain)
    write_digests(path, listed)
    content = path.read_bytes()

    def run(flipped: int | None = None) -> tuple[VerifiedRows, np.ndarray]:
        changed = bytearray(content)
        if flipped is not None:
            changed[flipped] ^= 1
        path.write_bytes(changed)
        return verified(np.load(path, mmap_mode="r"), path, listed), plain

    return run


@pytest.mark.parametrize("key", range(len(KEYS)))
def test_rows_are_those_of_the_plain_array_and_their_blocks_alone_are_verified(
    key: int, small: Callable[..., tuple[VerifiedRows, np.ndarray]]
) -> None:
    at, rows = KEYS[key]
    first, each = 128, 2 * WIDTH
    needed = {b for row in rows for b in ((first + row * each) // BLOCK, (first + (row + 1) * each - 1) // BLOCK)}
    for block in range(6):
        mapped, plain = small(block * BLOCK + 500)
        if block in needed:
            with pytest.raises(
                IndexFolderError, match=rf"e\.npy was changed in bytes {block * BLOCK} and on\n.*verify"
            ):
                mapped[at]
        else:
            taken = mapped[at]
            assert type(taken) is np.ndarray
            np.testing.assert_array_equal(taken, plain[at])


def test_a_block_is_verified_once(
    small: Callable[..., tuple[VerifiedRows, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, plain = small()
    seen: list[int] = []
    sha256 = digests._sha256
    monkeypatch.setattr(digests, "_sha256", lambda content: seen.append(len(content)) or sha256(content))
    for _ in range(3):
        np.testing.assert_array_equal(mapped[[0, 119]], plain[[0, 119]])
    assert seen == [1000, 888]
    np.testing.assert_array_equal(mapped[:], plain)
    assert len(seen) == 6


@pytest.mark.parametrize("at", [[], [0], [119, 3, 119], [[7, 8], [90, 0]]])
def test_rows_are_read_as_they_are_mapped_and_verified_too(
    small: Callable[..., tuple[VerifiedRows, np.ndarray]], monkeypatch: pytest.MonkeyPatch, at: list[Any]
) -> None:
    rows = np.array(at, dtype=np.int64)
    mapped, plain = small()
    read = mapped.gather(rows)
    np.testing.assert_array_equal(read, plain[rows])
    assert read.dtype == np.float16 and read.flags.writeable and not isinstance(read, np.memmap)
    # Where the system cannot read at a place.
    with monkeypatch.context() as elsewhere:
        elsewhere.delattr("os.pread")
        np.testing.assert_array_equal(mapped.gather(rows), plain[rows])
    changed, _ = small(flipped=5850)
    if 119 in at:
        with pytest.raises(IndexFolderError, match=r"e\.npy was changed"):
            changed.gather(rows)
    else:
        np.testing.assert_array_equal(changed.gather(rows), plain[rows])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what of a mapping is in memory")
def test_a_search_keeps_no_embeddings_in_memory(tmp_path: Path) -> None:
    """Neither what it ranked again, nor what it verified on the way."""
    path, listed = tmp_path / "e.npy", tmp_path / "d.npy"
    np.save(path, np.random.default_rng(0).standard_normal((8192, 64)).astype(np.float16))
    write_digests(path, listed)
    plain = np.load(path, mmap_mode="r")
    record = build_faiss(tmp_path / "x.faiss", plain, Choice("IVF16,SQ8", "", 1), lambda done: None)
    assert _resident(path) > 0
    del plain
    searcher = FaissSearcher(tmp_path / "x.faiss", verified(np.load(path, mmap_mode="r"), path, listed), record)
    queries = np.random.default_rng(1).standard_normal((256, 64)).astype(np.float32)
    assert all(len(rows) == 5 for rows, _ in searcher.search(queries, 5))
    assert _resident(path) == 0


def _resident(path: Path) -> int:
    """Bytes of a file that are in memory of this process, in all its mappings."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.partition(" ")[0].endswith(":"):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_digests_of_another_size_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.zeros((4, 4), dtype=np.float16))
    np.save(tmp_path / "d.npy", np.zeros((2, 32), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"d\.npy holds \(2, 32\)"):
        verified(np.load(tmp_path / "e.npy", mmap_mode="r"), tmp_path / "e.npy", tmp_path / "d.npy")


def test_changed_embeddings_do_not_answer(folder: Path) -> None:
    path = folder / "embeddings-1.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    index = Index.open(folder, encoder=StubEncoder())
    for use in (lambda: index.neighbours(["honey"], 3), lambda: index.search(["honey"])):
        with pytest.raises(IndexFolderError, match=r"embeddings-1\.npy was changed in bytes 0 and on"):
            use()


@pytest.mark.parametrize("name", ["embeddings-1.npy", "offsets-1.npy", "digests-1.npy"])
def test_a_header_that_is_none_is_an_error_of_ours(name: str, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    for place in range(128):
        (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        # What is told apart by nothing but a space in the header is read as it was.
        with contextlib.suppress(IndexFolderError):
            assert Index.open(folder).embeddings[23].shape == (64,)


def test_an_index_without_digests_opens_as_before(folder: Path) -> None:
    expected = Index.open(folder, encoder=StubEncoder()).search(["honey"], 3)
    manifest = read_manifest(folder)
    files = {name: record for name, record in manifest.files.items() if name != "digests-1.npy"}
    write_manifest(folder, manifest.model_copy(update={"files": files}).sealed())
    commit(folder)
    (folder / "digests-1.npy").unlink()
    assert Index.open(folder, encoder=StubEncoder()).search(["honey"], 3) == expected
    assert verify_index(folder, encoder=StubEncoder()) == []


def test_opening_hashes_and_reads_nothing_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    file_digest = hashlib.file_digest

    def digest(file: Any, kind: str) -> Any:
        hashed.append(Path(file.name).name)
        return file_digest(file, kind)

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", digest)
        patch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("read"))
        index = Index.open(folder, encoder=StubEncoder())
        assert len(index) == 24
    assert hashed == ["digests-1.npy"]
    assert index.passage_ids[23] == "archive-7" and index.passage("archive-7").title == "Deed"


def test_an_opened_index_that_was_replaced_is_read_on(folder: Path, tmp_path: Path) -> None:
    """Also what was not read before."""
    index = Index.open(folder, encoder=StubEncoder())
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": "new", "text": "The honey is new."}) + "\n")
    plan = plan_add(folder, [str(more)], encoder=StubEncoder())
    assert plan.run().passages == 25
    assert not (folder / "passages-1.parquet").exists() and (folder / "digests-2.npy").exists()
    assert len(index.passage_ids) == 24 and index.find("new") is None
    assert index.passage("market-5").title == "Honey" and index.embeddings[23].shape == (64,)
    assert file_record(folder / "digests-2.npy") == read_manifest(folder).files["digests-2.npy"]
