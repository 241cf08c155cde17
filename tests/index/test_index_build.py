"""Building: commits whole or not at all, goes on after a kill, and refuses what would lose or mix anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from small_corpus import rows
from stub_encoder import StubEncoder

from ragmoe import DataError, Index, IndexFolderError, IndexLockedError, ModelError, UsageError
from ragmoe.index import BuildOptions, Manifest, _crash, plan_build, verify_index
from ragmoe.index import blocks as blocks_module
from ragmoe.index.manifest import read_manifest

Build = Callable[..., Manifest]


@pytest.fixture(autouse=True)
def _no_hook() -> Iterator[None]:
    yield
    _crash.hook = None


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK", 5)


def write(path: Path, passages: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in passages))
    return path


def test_the_manifest_says_what_was_built(build: Build, tmp_path: Path) -> None:
    manifest = build()
    assert (manifest.generation, manifest.passages, manifest.skipped) == (1, 24, 0)
    assert manifest.domains == {"archive": 8, "market": 8, "river": 8}
    assert manifest.encoder.id == "stub-0" and manifest.encoder.width == 64
    assert manifest.long_passages.mode == "windows"
    assert manifest.long_passages.longer == 9 and manifest.long_passages.share == 0.375
    assert manifest.faiss.factory == "Flat" and "24 passages, at most 50,000" in manifest.faiss.reason
    assert manifest.intact and manifest == read_manifest(tmp_path / "index")
    on_disk = {p.relative_to(tmp_path / "index").as_posix() for p in (tmp_path / "index").rglob("*") if p.is_file()}
    assert on_disk - set(manifest.files) <= {"manifest.json", "build.lock", "README.md"}
    assert set(manifest.files) < on_disk
    assert verify_index(tmp_path / "index", encoder=StubEncoder()) == []


def test_nothing_is_pickled(build: Build, tmp_path: Path) -> None:
    build()
    for path in (tmp_path / "index").rglob("*.npy"):
        np.load(path, allow_pickle=False)
    assert not [
        p for p in (tmp_path / "index").rglob("*") if p.suffix in (".pkl", ".pt", ".bin") and "texts" not in p.name
    ]


def test_truncation_and_windows_differ_only_for_long_passages(build: Build, tmp_path: Path) -> None:
    build(out=tmp_path / "w")
    manifest = build(out=tmp_path / "t", long_passages="truncate")
    assert manifest.long_passages.mode == "truncate" and manifest.long_passages.longer == 9
    windows, cut = Index.open(tmp_path / "w"), Index.open(tmp_path / "t")
    differ = np.abs(windows.embeddings - cut.embeddings).max(axis=1) > 1e-2
    assert differ.tolist() == (windows.windows() > 1).tolist()


def test_chunks_know_where_they_came_from(build: Build, tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(60))
    source = write(tmp_path / "long.jsonl", [{"id": "long", "text": text}, {"id": "short", "text": "one two"}])
    manifest = build(sources=(str(source),), rechunk=True, chunk_words=25, chunk_overlap=5)
    assert manifest.chunking.chunks == 3 and manifest.passages == 4
    chunks = list(Index.open(tmp_path / "index").chunks())
    assert [chunk.source_id for chunk in chunks] == ["long"] * 3 + ["short"]
    assert all(text[c.start : c.start + len(c.passage.text)] == c.passage.text for c in chunks[:3])


def test_bad_lines_stop_before_anything_is_written(build: Build, tmp_path: Path) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_text('{"id": "a", "text": "fine"}\n{"id": "b"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: no 'text'") as caught:
        build(sources=(str(source),))
    assert "--on-error skip" in str(caught.value.hint)
    assert not (tmp_path / "index").exists()
    manifest = build(sources=(str(source),), on_error="skip")
    assert (manifest.passages, manifest.skipped) == (1, 1)


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_vectors_that_are_none_are_not_stored(build: Build, tmp_path: Path, value: float) -> None:
    class Broken(StubEncoder):
        def encode(self, texts: Sequence[str], *, prompt: str = "") -> NDArray[np.float32]:
            vectors = super().encode(texts, prompt=prompt)
            vectors[["honey of market" in text for text in texts]] = value
            return vectors

    with pytest.raises(ModelError, match=r"'stub-0' gave 1 of 24 passages a vector .* the first is 'market-5'"):
        build(encoder=Broken())
    assert not (tmp_path / "index" / "manifest.json").exists()


def test_no_passages_at_all(build: Build, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no passages in .*empty\.jsonl"):
        build(sources=(str(write(tmp_path / "empty.jsonl", [])),))
    source = tmp_path / "bad.jsonl"
    source.write_text("{\n")
    with pytest.raises(DataError, match=r"1 bad lines were skipped, the first: .*bad\.jsonl:1: not JSON"):
        build(sources=(str(source),), on_error="skip")


def test_a_plan_estimates_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    plan = plan_build(BuildOptions((str(corpus),), tmp_path / "index", encoder=StubEncoder()))
    assert plan.passages == 24 and plan.choice.factory == "Flat" and plan.longer_share == 0.375
    assert not (tmp_path / "index").exists()
    plan.run()
    size = sum(record.bytes for record in read_manifest(tmp_path / "index").files.values())
    # Parquet and BM25 have a few kB of their own, which count for much in so small an index.
    assert plan.disk_bytes / 3 < size < plan.disk_bytes * 3 + 30_000


def test_an_index_is_replaced_only_if_asked(build: Build, corpus: Path, tmp_path: Path) -> None:
    first = build()
    with pytest.raises(IndexFolderError, match="holds an index already") as caught:
        build()
    assert "--overwrite" in str(caught.value.hint)
    write(corpus, rows()[:10])
    second = build(overwrite=True)
    assert (second.generation, second.passages) == (2, 10) and second.corpus_digest != first.corpus_digest
    left = {path.name for path in (tmp_path / "index").iterdir()}
    assert not [name for name in left if "-1" in name] and "partial" not in left


def test_unchanged_passages_are_not_encoded_again(build: Build, corpus: Path, tmp_path: Path) -> None:
    build()
    before = np.array(Index.open(tmp_path / "index").embeddings)
    changed = rows()
    changed[3]["text"] = "Something else entirely."
    write(corpus, changed)
    encoder = StubEncoder()
    build(overwrite=True, encoder=encoder)
    assert encoder.encoded == ["Tide\nSomething else entirely."]
    after = np.array(Index.open(tmp_path / "index").embeddings)
    assert np.array_equal(np.delete(before, 3, 0), np.delete(after, 3, 0)) and not np.array_equal(before[3], after[3])


@pytest.mark.parametrize("change", [{"encoder": StubEncoder(1)}, {"long_passages": "truncate"}])
def test_vectors_made_otherwise_are_not_taken_over(build: Build, tmp_path: Path, change: dict[str, Any]) -> None:
    build()
    build(overwrite=True, **change)
    assert verify_index(tmp_path / "index", encoder=change.get("encoder", StubEncoder())) == []


def test_damaged_vectors_are_not_taken_over(build: Build, tmp_path: Path) -> None:
    build()
    path = tmp_path / "index" / "embeddings-1.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)
    encoder = StubEncoder()
    build(overwrite=True, encoder=encoder)
    assert len(encoder.encoded) >= 24
    assert verify_index(tmp_path / "index", encoder=StubEncoder()) == []


def test_a_damaged_index_can_be_replaced(build: Build, tmp_path: Path) -> None:
    build()
    (tmp_path / "index" / "manifest.json").write_text("{")
    with pytest.raises(IndexFolderError, match="holds an index already"):
        build()
    assert build(overwrite=True).generation == 2
    assert verify_index(tmp_path / "index", encoder=StubEncoder()) == []


def test_folders_that_hold_other_things_are_left_alone(build: Build, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(IndexFolderError, match=r"holds other things than an index: thesis\.tex"):
        build(out=tmp_path / "home", overwrite=True)
    with pytest.raises(IndexFolderError, match=r"thesis\.tex is a file; expected a folder"):
        build(out=tmp_path / "home" / "thesis.tex")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_an_index_may_lie_in_the_folder_it_is_built_of(build: Build, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    corpus.rename(tmp_path / "docs" / "notes.jsonl")
    given: dict[str, Any] = {"sources": (str(tmp_path / "docs"),), "out": tmp_path / "docs" / "index"}
    built = build(**given)
    assert built.passages == 24 and build(**given, overwrite=True).corpus_digest == built.corpus_digest
    # Nor is what a build left that died.
    (tmp_path / "docs" / "index" / "manifest.json").unlink()
    assert build(**given).corpus_digest == built.corpus_digest


def test_two_builds_of_one_index_exclude_each_other(build: Build, tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with (
        FileLock(tmp_path / "index" / "build.lock"),
        pytest.raises(IndexLockedError, match="is locked: another process"),
    ):
        build()
    build()


def test_a_full_disk_leaves_the_old_index(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ragmoe.index.writer.StoreWriter", full)
    with pytest.raises(
        IndexFolderError, match="cannot be written: No space left on device; an index that was there is"
    ):
        build(overwrite=True)
    assert Index.open(tmp_path / "index").digest == first.digest


class Killed(BaseException):
    """Stands for a kill where a real one is not needed."""


def kill_at_block(count: int) -> None:
    left = [count]

    def hook(point: str) -> None:
        if point == "block":
            left[0] -= 1
            if not left[0]:
                raise Killed

    _crash.hook = hook


@pytest.mark.parametrize("step", ["ragmoe.index.card.os.replace", "ragmoe.index.target.shutil.rmtree"])
def test_what_fails_after_the_commit_is_not_said_to_be_undone(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    build()
    write(tmp_path / "corpus.jsonl", rows()[:20])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def begin_to_fail(point: str) -> None:
        if point == "committed":
            patch.setattr(step, full)

    with monkeypatch.context() as patch:
        _crash.hook = begin_to_fail
        with pytest.raises(IndexFolderError, match=r"generation 2 is in force and whole, but .* failed: No space left"):
            build(overwrite=True)
    _crash.hook = None
    assert len(Index.open(tmp_path / "index")) == 20
    manifest = read_manifest(tmp_path / "index")
    assert build(overwrite=True, resume=True) == manifest
    assert "generation 2" in (tmp_path / "index" / "README.md").read_text()
    assert not list((tmp_path / "index").glob("*-1.*"))


@pytest.mark.usefixtures("small_blocks")
def test_a_killed_build_goes_on_where_it_was(build: Build, tmp_path: Path) -> None:
    kill_at_block(3)
    with pytest.raises(Killed):
        build()
    _crash.hook = None
    with pytest.raises(IndexFolderError, match=r"holds a build that did not finish\ngo on with: .* --resume"):
        Index.open(tmp_path / "index")
    encoder = StubEncoder()
    resumed = build(resume=True, encoder=encoder)
    texts = {text.splitlines()[0] for text in encoder.encoded}
    assert texts == {row["title"] for row in rows()[15:]}
    whole = build(out=tmp_path / "whole")
    # The file that the kill left half written is not written to again: another generation takes its place.
    assert (resumed.generation, whole.generation) == (2, 1)
    assert resumed.files["embeddings-2.npy"] == whole.files["embeddings-1.npy"]
    assert not (tmp_path / "index" / "partial").exists()


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_another_corpus_or_encoder_are_not_used(build: Build, corpus: Path, tmp_path: Path) -> None:
    kill_at_block(3)
    with pytest.raises(Killed):
        build()
    _crash.hook = None
    encoder = StubEncoder(1)
    build(resume=True, encoder=encoder)
    assert len({text.splitlines()[0] for text in encoder.encoded}) == 24
    assert verify_index(tmp_path / "index", encoder=StubEncoder(1)) == []


@pytest.mark.usefixtures("small_blocks")
def test_a_block_cut_off_by_the_kill_is_made_again(build: Build, tmp_path: Path) -> None:
    kill_at_block(3)
    with pytest.raises(Killed):
        build()
    _crash.hook = None
    path = tmp_path / "index" / "partial" / "block-000001.npz"
    path.write_bytes(path.read_bytes()[:-50])
    build(resume=True)
    assert verify_index(tmp_path / "index", encoder=StubEncoder()) == []


def test_resuming_what_is_finished_changes_nothing(build: Build, corpus: Path, tmp_path: Path) -> None:
    first = build()
    encoder = StubEncoder()
    assert build(resume=True, encoder=encoder) == first and encoder.encoded == []
    # But --resume is no licence to replace an index of something else.
    write(corpus, rows()[:4])
    with pytest.raises(IndexFolderError, match="holds an index already"):
        build(resume=True)
    assert read_manifest(tmp_path / "index") == first


def test_a_reader_keeps_the_generation_it_opened(build: Build, corpus: Path, tmp_path: Path) -> None:
    build()
    index = Index.open(tmp_path / "index", encoder=StubEncoder())
    before = index.search(["honey"], 3, retriever="dense")
    text = index.passage("market-5").text
    write(corpus, rows()[:10])
    build(overwrite=True)
    assert index.passage("market-5").text == text
    assert index.search(["honey"], 3, retriever="dense") == before
    # What it had not read yet is gone, and it says so instead of reading the new one.
    with pytest.raises(IndexFolderError, match="bm25-1 was replaced meanwhile by generation 2"):
        index.search(["honey"], 3, retriever="bm25")


def test_opening_while_a_build_commits_takes_the_new_one(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build()
    new = build(overwrite=True)
    manifests = iter([old, new, new])
    monkeypatch.setattr("ragmoe.index.folder.read_manifest", lambda folder: next(manifests))
    assert Index.open(tmp_path / "index").manifest.generation == 2


def test_files_that_are_named_like_an_indexs_are_somebodys(build: Build, tmp_path: Path) -> None:
    """Vectors to be imported, say: where nobody built an index they are nobody's leftovers."""
    home = tmp_path / "home"
    (home / "partial").mkdir(parents=True)
    kept = ["embeddings-1.npy", "index-1.html", "partial/mine.txt", "passages-1.parquet", "texts-2024.txt"]
    for name in kept:
        (home / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(IndexFolderError, match=r"holds other things than an index: embeddings-1\.npy, index-1"):
            build(out=home, overwrite=overwrite)
    assert sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()) == kept
    # Another tool's manifest makes it no index.
    (home / "manifest.json").write_text('{"name": "mine"}')
    with pytest.raises(IndexFolderError, match=r"holds other things than an index: embeddings-1\.npy, index-1"):
        build(out=home, resume=True)
    build()
    (tmp_path / "index" / "texts-2024.txt").write_text("mine")
    with pytest.raises(IndexFolderError, match=r"holds other things than an index: texts-2024\.txt"):
        build(overwrite=True)


def test_prompts_may_be_given(build: Callable[..., Manifest], tmp_path: Path) -> None:
    encoder = StubEncoder(query_prompt="own: ", passage_prompt="own: ")
    made = build(encoder=encoder, passage_prompt="passage: ", out=str(tmp_path / "index"))
    assert (made.encoder.query_prompt, made.encoder.passage_prompt) == ("own: ", "passage: ")
    assert encoder.encoded and all(text.startswith("passage: ") for text in encoder.encoded)
    made = build(encoder=encoder, query_prompt="", passage_prompt="", overwrite=True)
    assert (made.encoder.query_prompt, made.encoder.passage_prompt) == ("", "")


def test_a_single_source_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a single source was given, '/tmp/x'; expected a list of them"):
        plan_build(BuildOptions("/tmp/x", tmp_path / "index", encoder=StubEncoder()))
