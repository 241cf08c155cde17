"""Damage, full disks and hostile files: found, said, and nothing that was there is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crash_driver import drive
from stub_encoder import StubEncoder
from test_verify import reseal

from ragmoe import Index, IndexFolderError, RagmoeError
from ragmoe.index import plan_add, plan_remove, verify_index
from ragmoe.index.manifest import NAME, Manifest, commit, read_manifest, write_manifest

FILES = (
    NAME, "passages-1.parquet", "texts-1.bin", "offsets-1.npy", "embeddings-1.npy", "digests-1.npy", "index-1.faiss",
    "bm25-1/data.csc.index.npy", "bm25-1/indices.csc.index.npy", "bm25-1/indptr.csc.index.npy",
    "bm25-1/params.index.json", "bm25-1/vocab.index.json",
)  # fmt: skip


def damages(content: bytes) -> list[bytes]:
    """The content with a byte flipped in each of 24 regions, and cut at five places."""
    made = []
    for place in np.linspace(0, len(content) - 1, 24).astype(int).tolist():
        made.append(content[:place] + bytes([content[place] ^ 0xD5]) + content[place + 1 :])
    return made + [content[: int(share * len(content))] for share in (0, 0.1, 0.5, 0.9)] + [content[:-1]]


def said(work: Callable[[], object]) -> str:
    """What is wrong, in our own words: an error's message, or what was returned; '' if nothing."""
    try:
        return str(work() or "")
    except RagmoeError as error:
        return error.message


def use(folder: Path) -> None:
    """Open an index, search it, and read all of it."""
    index = Index.open(folder, encoder=StubEncoder())
    for retriever in ("dense", "bm25"):
        index.search(["the honey of the market"], 24, retriever=retriever)
    assert len(list(index.chunks())) == len(index.domains) == 24


@pytest.mark.parametrize("name", FILES)
def test_each_region_of_each_file_is_guarded(name: str, folder: Path) -> None:
    """`verify` finds whatever was flipped or cut; using the index without it errs in our own words or works."""
    path = folder / name
    content = path.read_bytes()
    for damaged in damages(content):
        path.write_bytes(damaged)
        if name == NAME:
            assert said(lambda: verify_index(folder, encoder=StubEncoder()))
        else:
            assert verify_index(folder, encoder=StubEncoder())
        # Whatever else it raises is a crash, and fails here.
        said(lambda: use(folder))
    path.write_bytes(content)
    assert verify_index(folder, encoder=StubEncoder()) == []


def changed(folder: Path, **fields: Any) -> None:
    """Put a manifest in force that says something else, with a digest that is right."""
    manifest = read_manifest(folder)
    write_manifest(folder, Manifest.model_construct(**{**dict(manifest), **fields}).sealed())
    commit(folder)


@pytest.mark.parametrize("name", ["../secret-1.npy", "/etc/passwd-1", "bm25-1/../../secret-1", "bm25-1", ".ssh-1/id"])
def test_paths_cannot_leave_the_folder(name: str, folder: Path) -> None:
    files = read_manifest(folder).files
    changed(folder, files={**files, name: files["texts-1.bin"]})
    for reader in (Index.open, verify_index):
        with pytest.raises(IndexFolderError, match=r"is damaged: files: .* is no file of generation 1"):
            reader(folder)


@pytest.mark.parametrize(
    "fields", [{"passages": 10**15}, {"passages": -1}, {"passages": 0}, {"generation": 0}, {"files": {}}]
)
def test_manifests_that_make_no_sense(fields: dict[str, Any], folder: Path) -> None:
    changed(folder, **fields)
    with pytest.raises(IndexFolderError, match="is damaged"):
        Index.open(folder)


def test_a_manifest_too_large_to_be_one_is_not_read(folder: Path) -> None:
    with (folder / NAME).open("r+b") as file:
        file.truncate(10**10)  # sparse: takes no room
    with pytest.raises(IndexFolderError, match=r"has 10000000000 bytes; expected at most"):
        Index.open(folder)


def npy(shape: str, descr: str = "'<i8'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(200)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".npy")])
@pytest.mark.parametrize("content", [npy("(1000000000000,)"), npy("(25,)", "'|O'")], ids=["huge", "objects"])
def test_absurd_arrays_are_refused_before_they_are_allotted(name: str, content: bytes, folder: Path) -> None:
    """Digests and sizes agree: only the array's own header is hostile. Objects would be pickles."""
    from ragmoe.index.manifest import file_record

    (folder / name).write_bytes(content)
    changed(folder, files={**read_manifest(folder).files, name: file_record(folder / name)})
    with pytest.raises(IndexFolderError, match="is damaged"):
        Index.open(folder, encoder=StubEncoder()).search(["honey"], retriever="bm25")


def refuse_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a column of a parquet file that is read is one too many: it was to be refused before."""
    for name in ("read", "iter_batches"):
        monkeypatch.setattr(pq.ParquetFile, name, lambda *_, **__: pytest.fail("read"))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (
            lambda table: table.set_column(1, "title", [["a" * 2_000_000] * 24]),
            r"24 rows of 4\d{7} bytes, expected 24 of",
        ),
        (lambda table: table.drop_columns(["doc_id", "windows"]), "the passages have no doc_id, windows"),
        (lambda table: table.drop_columns(["text"]), "the passages have no text"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), r"25 rows of \d+ bytes, expected 24 of at most"),
    ],
    ids=["huge", "no fields", "no texts", "a row more"],
)
def test_passages_that_say_they_are_others_are_not_read(
    harm: Callable[[pa.Table], pa.Table], reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests and sizes agree: only what the parquet file says of itself is hostile."""
    path = folder / "passages-1.parquet"
    pq.write_table(harm(pq.read_table(path)), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 30_000
    reseal(folder)
    refuse_to_read(monkeypatch)
    with pytest.raises(IndexFolderError, match=f"{folder} is damaged: .*{reason}"):
        Index.open(folder)
    with pytest.raises(IndexFolderError, match=f"{path} is damaged: .*{reason}"):
        plan_remove(folder, domain="river")
    assert any(re.search(reason, problem) for problem in verify_index(folder, encoder=StubEncoder()))


def test_an_index_that_lost_its_texts_is_mended_by_the_next_change(folder: Path) -> None:
    texts = Index.open(folder).passages(["market-3", "river-1"])
    (folder / "texts-1.bin").unlink()
    plan = plan_remove(folder, domain="archive")
    assert plan.run().passages == 16
    assert Index.open(folder).passages(["market-3", "river-1"]) == texts


def test_a_faiss_file_that_was_changed_is_not_parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ragmoe._threads import import_faiss

    path = folder / "index-1.faiss"
    content = bytearray(path.read_bytes())
    content[40] ^= 0xFF
    path.write_bytes(content)
    monkeypatch.setattr(import_faiss(), "read_index", lambda *_: pytest.fail("parsed"))
    with pytest.raises(IndexFolderError, match=r"index-1\.faiss was changed"):
        Index.open(folder, encoder=StubEncoder()).search(["honey"], retriever="dense")


def test_a_full_disk_loses_nothing_and_says_so(tmp_path: Path) -> None:
    """No file may grow beyond a limit, which grows, so that each kind of file is the one that does not fit."""
    sizes = (100, 1_000, 2_500, 4_500, 6_500, 8_000, 1_000_000)
    ends = [" ".join(words) for words in drive("limits", tmp_path, *sizes, timeout=100)]
    refused = [end for end in ends if end.startswith("IndexFolderError: ")]
    assert len(refused) >= 5 and ends[-1] == "1000000 0 24", ends
    assert all("cannot be written: " in end and "an index that was there is untouched" in end for end in refused)
    # After each, what was there before is all there.
    assert [end.split()[1:] for end in ends if end[0].isdigit()][: len(refused)] == [["1", "10"]] * len(refused)


def test_what_failed_gives_its_room_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ragmoe._threads import import_faiss

    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": "new", "text": "The honey is new."}) + "\n")
    before = {path.name for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise RuntimeError("Error: 'ret == (size)' failed: write error")

    plan = plan_add(folder, [str(more)], encoder=StubEncoder())
    with monkeypatch.context() as patch:
        patch.setattr(import_faiss(), "write_index", full)
        with pytest.raises(IndexFolderError, match="faiss could not write it whole"):
            plan.run()
    # What was encoded stays, for whoever makes room.
    assert {path.name for path in folder.iterdir()} == before | {"partial"}
    encoder = StubEncoder()
    plan = plan_add(folder, [str(more)], encoder=encoder, resume=True)
    assert plan.run().passages == 25 and encoder.encoded == []


def test_a_reader_of_one_generation_never_sees_the_next(folder: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": "new", "text": "The honey is new."}) + "\n")
    reader = Index.open(folder, encoder=StubEncoder())
    found = reader.search(["honey"], 3, retriever="dense")
    plan = plan_add(folder, [str(more)], encoder=StubEncoder())
    plan.run()
    assert reader.search(["honey"], 3, retriever="dense") == found and reader.find("new") is None
    assert Index.open(folder, encoder=StubEncoder()).search(["The honey is new."], 1)[0][0].passage_id == "new"


LINKS = (
    *FILES[:7], "bm25-1/", "build.lock", f"{NAME}.part", "README.md", "README.md.part", "texts-2.bin", "bm25-2/",
    "partial/", "partial/state.json", "partial/block-000000.part", "partial/words/", "memory/",
    "memory/recorded.safetensors",
)  # fmt: skip


def linked(path: Path, outside: Path, *, is_folder: bool) -> None:
    """Put a link in a place, and what was there, or something else, where it leads."""
    outside.mkdir()
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.rename(outside / "it")
    elif is_folder:
        (outside / "it").mkdir()
        (outside / "it" / "own.safetensors").write_bytes(b"somebody's own")
    else:
        (outside / "it").write_bytes(b"somebody's own")
    path.symlink_to(outside / "it")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("planted", ["before", "meanwhile"])
def test_nothing_is_written_or_removed_through_a_link(name: str, planted: str, folder: Path, tmp_path: Path) -> None:
    """Whoever made the folder may have put one there; it is found before reading, and again under the lock."""
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": "new", "text": "The honey is new."}) + "\n")
    outside = tmp_path / "outside"
    plan = plan_add(folder, [str(more)], encoder=StubEncoder()) if planted == "meanwhile" else None
    linked(folder / name, outside, is_folder=name.endswith("/"))
    before, there = contents(outside), contents(folder)
    with pytest.raises(IndexFolderError, match=f"{name.removesuffix('/')} is a link to {outside / 'it'}, .*\nremove"):
        plan.run() if plan else plan_add(folder, [str(more)], encoder=StubEncoder())
    assert contents(outside) == before and {**contents(folder), "build.lock": b""} == {**there, "build.lock": b""}


def test_no_build_replaces_an_index_through_a_link(build: Callable[..., Manifest], tmp_path: Path) -> None:
    build()
    linked(tmp_path / "index" / f"{NAME}.part", tmp_path / "outside", is_folder=False)
    with pytest.raises(IndexFolderError, match=rf"{NAME}\.part is a link to"):
        build(overwrite=True)
    assert contents(tmp_path / "outside") == {"it": b"somebody's own"}


def test_links_are_read_through_and_the_folder_itself_may_be_one(folder: Path, tmp_path: Path) -> None:
    """The Hub's cache is made of links."""
    (tmp_path / "cache").mkdir()
    for path in folder.iterdir():
        (tmp_path / "cache" / path.name).symlink_to(path)
    use(tmp_path / "cache")
    assert verify_index(tmp_path / "cache", encoder=StubEncoder()) == []
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": "new", "text": "The honey is new."}) + "\n")
    (tmp_path / "link").symlink_to(folder)
    plan = plan_add(tmp_path / "link", [str(more)], encoder=StubEncoder())
    assert plan.run().passages == 25 == len(Index.open(folder))
