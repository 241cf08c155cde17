"""Readers while an index is replaced: each sees one index, whole, or is told that another took its place."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from crash_driver import SIDES, command
from small_corpus import rows
from stub_encoder import StubEncoder

from ragmoe import Index, IndexFolderError
from ragmoe.index import Manifest
from ragmoe.index.rows import OldIndex

TEXTS = {row["id"]: row["text"] for row in rows()}


def read(folder: Path, retriever: str) -> tuple[int, str]:
    """Open an index and read all of it, expecting one of the two: its generation, and what it said was replaced."""
    index, said = Index.open(folder, encoder=StubEncoder()), ""
    assert index.passage_ids in SIDES.values()
    try:
        (hits,) = index.search(["the tide of the honey market"], 14, retriever=retriever)
        assert hits and all(index.passage_ids[hit.row] == hit.passage_id for hit in hits)
    except IndexFolderError as error:
        said = error.message
        assert "was replaced meanwhile by generation" in said
    # What was opened stays whole, whatever became of the rest.
    assert [(p.id, p.text) for p in index.iterate()] == [(name, TEXTS[name]) for name in index.passage_ids]
    return index.manifest.generation, said


@pytest.mark.slow
def test_each_reader_sees_one_index_while_it_is_replaced_twenty_times(tmp_path: Path) -> None:
    line, environment = command("rebuilds", tmp_path, 20)
    pipe, seen = subprocess.PIPE, set()
    with subprocess.Popen(line, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            # What reading imports takes longer than many builds.
            read(tmp_path / "a", "blend")
            process.stdin.write("\n")
            process.stdin.flush()
            for retriever in itertools.cycle(("dense", "bm25", "blend")):
                # Asked before, so that the last one is read too.
                over = process.poll() is not None
                seen.add(read(tmp_path / "a", retriever)[0])
                if over:
                    break
        finally:
            process.kill()
    assert process.returncode == 0
    assert len(seen) > 3 and max(seen) == 21


@pytest.mark.parametrize(("retriever", "name"), [("dense", "index-1.faiss"), ("bm25", "bm25-1")])
def test_a_file_that_goes_while_it_is_read_is_not_called_damaged(
    retriever: str, name: str, build: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    index, check = Index.open(tmp_path / "index", encoder=StubEncoder()), Index._check_digests

    def replaced(self: Index, names: list[str]) -> None:
        check(self, names)
        monkeypatch.undo()
        build(overwrite=True)

    monkeypatch.setattr(Index, "_check_digests", replaced)
    with pytest.raises(IndexFolderError, match=f"{name} was replaced meanwhile by generation 2\nopen the index again"):
        index.search(["honey"], retriever=retriever)
    # Where nothing took its place it is.
    index = Index.open(tmp_path / "index", encoder=StubEncoder())
    for path in (tmp_path / "index" / name.replace("-1", "-2"), tmp_path / "index" / "bm25-2" / "vocab.index.json"):
        if path.is_file():
            path.unlink()
    with pytest.raises(IndexFolderError, match=r"is damaged: .* is missing"):
        index.search(["honey"], retriever=retriever)


def test_nothing_is_taken_over_from_an_index_that_was_replaced(build: Callable[..., Manifest], tmp_path: Path) -> None:
    folder, old = tmp_path / "index", build()
    new = build(overwrite=True)
    with pytest.raises(IndexFolderError, match="index was replaced meanwhile\ngive the command again"):
        OldIndex(folder, old)
    (folder / "passages-2.parquet").unlink()
    with pytest.raises(IndexFolderError, match=r"is damaged: .*passages-2\.parquet is missing; nothing is taken over"):
        OldIndex(folder, new)


def test_opening_while_a_pull_puts_another_of_the_same_generation(
    build: Callable[..., Manifest], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(long_passages="truncate", out=tmp_path / "other")
    new = build()
    assert old.generation == new.generation == 1 and old.digest != new.digest
    manifests = iter([old, new, new])
    monkeypatch.setattr("ragmoe.index.folder.read_manifest", lambda folder: next(manifests))
    assert Index.open(tmp_path / "index").digest == new.digest
