"""Changing an index: the result is what a build of the same passages gives, and nothing is encoded twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from safetensors import SafetensorError
from small_corpus import rows
from stub_encoder import StubEncoder

from ragmoe import DataError, EncoderMismatchError, Index, IndexFolderError, IndexLockedError, UsageError
from ragmoe.index import (
    BuildOptions,
    _crash,
    blocks,
    build_index,
    plan_add,
    plan_merge,
    plan_remove,
    verify_index,
)
from ragmoe.index.manifest import read_manifest
from ragmoe.index.memory import ExpertMemory, memory_path, read_memory

Build = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_hook() -> Iterator[None]:
    yield
    _crash.hook = None


def write(path: Path, passages: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in passages))
    return path


@pytest.fixture
def make(tmp_path: Path) -> Build:
    """Builds an index of some passages."""

    def run(name: str, passages: list[dict[str, Any]], **options: Any) -> Path:
        source = write(tmp_path / f"{name}.jsonl", passages)
        build_index(
            BuildOptions(**{"sources": (str(source),), "out": tmp_path / name, "encoder": StubEncoder(), **options})
        )
        return tmp_path / name

    return run


def same(folder: Path, built: Path) -> None:
    """Two indexes hold the same passages, vectors and words, each in its own generation."""
    assert verify_index(folder, encoder=StubEncoder()) == []
    a, b = read_manifest(folder), read_manifest(built)
    name = f"-{a.generation}", f"-{b.generation}"
    files = {
        path.replace(name[0], name[1]): record for path, record in a.files.items() if not path.startswith("passages")
    }
    assert files == {path: record for path, record in b.files.items() if not path.startswith("passages")}
    kinds = {"generation", "files", "digest", "skipped"}
    assert a.model_dump(exclude=kinds) == b.model_dump(exclude=kinds)
    assert list(Index.open(folder).chunks()) == list(Index.open(built).chunks())


def test_adding_gives_what_building_all_gives_and_encodes_only_what_is_new(make: Build, tmp_path: Path) -> None:
    folder, built = make("part", rows()[:10]), make("whole", rows())
    encoder = StubEncoder()
    plan = plan_add(folder, [str(write(tmp_path / "more.jsonl", rows()[8:]))], encoder=encoder)
    assert (plan.contents.new, plan.rows.duplicates, plan.passages) == (14, 2, 24)
    assert encoder.encoded == []
    assert plan.run().generation == 2
    assert {text.splitlines()[0] for text in encoder.encoded} == {row["title"] for row in rows()[10:]}
    same(folder, built)


def test_adding_what_is_there_changes_nothing(make: Build, tmp_path: Path) -> None:
    folder = make("whole", rows())
    before = read_manifest(folder)
    # The same text under another id is there already, also where it comes twice.
    renamed = [{**row, "id": f"new-{number}"} for number, row in enumerate(rows()[:3])]
    again = plan_add(folder, [str(write(tmp_path / "same.jsonl", renamed))], encoder=StubEncoder())
    assert again.rows.duplicates == 3 and again.run() == before == read_manifest(folder)
    fresh = {"id": "x", "text": "A fresh text."}
    twice = write(tmp_path / "twice.jsonl", [fresh, {**fresh, "id": "y"}])
    assert plan_add(folder, [str(twice)], encoder=StubEncoder()).run().passages == 25
    assert Index.open(folder).find("y") is None
    with pytest.raises(DataError, match=r"no passages in .*none\.jsonl"):
        plan_add(folder, [str(write(tmp_path / "none.jsonl", []))], encoder=StubEncoder())


def test_an_id_that_is_taken_by_another_text(make: Build, tmp_path: Path) -> None:
    folder = make("whole", rows())
    more = [str(write(tmp_path / "more.jsonl", [{"id": "river-1", "text": "Else."}, {"id": "x", "text": "New."}]))]
    with pytest.raises(DataError, match=r"id 'river-1' is in .*whole already, with another title or text") as caught:
        plan_add(folder, more, encoder=StubEncoder())
    assert "ragmoe index remove" in str(caught.value.hint)
    manifest = plan_add(folder, more, encoder=StubEncoder(), on_error="skip").run()
    assert (manifest.passages, manifest.skipped) == (25, 1)
    assert Index.open(folder).passage("river-1").text.startswith("The quay")


def text(words: int, kind: str) -> str:
    return " ".join(f"{kind}{number}." for number in range(words))


@pytest.mark.parametrize(("before", "after"), [(8, 30), (30, 8), (25, 40)])
def test_two_versions_of_a_document_are_not_mixed(make: Build, tmp_path: Path, before: int, after: int) -> None:
    """Nor where one of them was cut, and the other was not or has more pieces."""
    note = tmp_path / "note.txt"
    note.write_text(text(before, "old"))
    options: dict[str, Any] = {"chunk_words": 10, "chunk_overlap": 2}
    folder = make("index", [], sources=(str(note),), **options)
    ids = Index.open(folder).passage_ids
    note.write_text(text(after, "new"))
    more = [str(note), str(write(tmp_path / "more.jsonl", rows()[:1]))]
    with pytest.raises(DataError, match=r"id 'note\.txt' is in .* already, with another title or text"):
        plan_add(folder, more, encoder=StubEncoder())
    other = make("other", [], sources=(str(note),), **options)
    with pytest.raises(DataError, match=r"id 'note\.txt.* is in both .* with different texts"):
        plan_merge(folder, other, tmp_path / "both")
    assert plan_add(folder, more, encoder=StubEncoder(), on_error="skip").run().skipped == 1
    assert Index.open(folder).passage_ids == [*ids, "river-0"]


def test_a_piece_that_was_passed_over_or_removed_can_be_added(make: Build, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text(text(30, "word"))
    options: dict[str, Any] = {"chunk_words": 10, "chunk_overlap": 2, "sources": (str(tmp_path / "note.txt"),)}
    whole, part = make("whole", [], **options), make("part", [], **options)
    ids = Index.open(whole).passage_ids
    plan_remove(part, ids=ids[:1]).run()
    assert plan_merge(part, whole, tmp_path / "both").run().passages == len(ids)
    assert plan_add(part, options["sources"], encoder=StubEncoder()).run().passages == len(ids)


def test_text_is_cut_and_read_as_the_index_was_built(make: Build, tmp_path: Path) -> None:
    options = {"chunk_words": 10, "chunk_overlap": 2, "rechunk": True, "long_passages": "truncate", "domain": "d"}
    folder, built = make("part", rows()[:10], **options), make("whole", rows(), **options)
    more = [str(write(tmp_path / "more.jsonl", rows()[10:]))]
    plan_add(folder, more, encoder=StubEncoder(), domain="d").run()
    same(folder, built)


def test_another_encoder_is_refused(make: Build, tmp_path: Path) -> None:
    folder = make("part", rows()[:10])
    more = [str(write(tmp_path / "more.jsonl", rows()))]
    with pytest.raises(EncoderMismatchError, match=r"was built with encoder 'stub-0'.*opened with 'stub-1'"):
        plan_add(folder, more, encoder=StubEncoder(1))
    with pytest.raises(EncoderMismatchError, match="'stub-0' reading 20 tokens, but 'stub-0' reads 9 now"):
        plan_add(folder, more, encoder=StubEncoder(max_length=9))


@pytest.mark.parametrize("how", [{"domain": "market"}, {"ids": [f"market-{number}" for number in range(8)]}])
def test_removing_gives_what_building_the_rest_gives(make: Build, how: dict[str, Any]) -> None:
    folder, built = make("whole", rows()), make("rest", [row for row in rows() if row["domain"] != "market"])
    assert plan_remove(folder, **how).run().passages == 16
    same(folder, built)
    assert Index.open(folder).find("market-3") is None


def test_what_cannot_be_removed(make: Build) -> None:
    folder = make("whole", rows())
    before = read_manifest(folder)
    with pytest.raises(DataError, match="does not hold 1 of 2 ids, such as 'nobody'; nothing was removed"):
        plan_remove(folder, ids=["river-1", "nobody"])
    with pytest.raises(DataError, match="does not hold the domain 'moor'; there are: archive, market, river"):
        plan_remove(folder, domain="moor")
    with pytest.raises(UsageError, match="these are all 24 passages"):
        plan_remove(folder, ids=[row["id"] for row in rows()])
    for how in ({}, {"ids": ["river-1"], "domain": "river"}):
        with pytest.raises(UsageError, match="expected one of the two"):
            plan_remove(folder, **how)  # type: ignore[arg-type]
    assert read_manifest(folder) == before
    # Only who goes on with something may ask for what is gone.
    plan_remove(folder, ids=["river-1"]).run()
    with pytest.raises(DataError, match="1 of 1 ids"):
        plan_remove(folder, ids=["river-1"])
    assert plan_remove(folder, ids=["river-1"], resume=True).run() == read_manifest(folder)


def test_the_passage_prompt_goes_with_the_index(make: Build, tmp_path: Path) -> None:
    """It is in the manifest and in front of all that is encoded, whatever the encoder would put there by now."""
    prompt, plain = "the law: ", make("plain", rows())
    whole = make("whole", rows(), encoder=StubEncoder(passage_prompt=prompt))
    folder = make("index", rows()[:14], encoder=StubEncoder(passage_prompt=prompt))
    encoder = StubEncoder(passage_prompt="another: ")
    plan_add(folder, [str(write(tmp_path / "more.jsonl", rows()[14:]))], encoder=encoder).run()
    assert len(encoder.encoded) >= 10 and all(text.startswith(prompt) for text in encoder.encoded)
    same(folder, whole)
    assert read_manifest(folder).encoder.passage_prompt == prompt and read_manifest(plain).encoder.passage_prompt == ""
    encoder = StubEncoder(passage_prompt="another: ")
    assert verify_index(folder, encoder=encoder) == []
    assert encoder.encoded and all(text.startswith(prompt) for text in encoder.encoded)
    vectors = [np.asarray(Index.open(path).embeddings, dtype=np.float32) for path in (plain, folder)]
    assert ((vectors[0] * vectors[1]).sum(axis=1) < 0.98).all()
    with pytest.raises(EncoderMismatchError, match=r"passage_prompt 'the law: '; .* passage_prompt ''"):
        plan_merge(folder, plain, tmp_path / "merged")


def test_merging_gives_what_building_both_gives(make: Build, tmp_path: Path) -> None:
    a, b, built = make("a", rows()[:14]), make("b", rows()[10:]), make("whole", rows())
    before = read_manifest(a), read_manifest(b)
    plan = plan_merge(a, b, tmp_path / "c")
    assert plan.rows.duplicates == 4 and plan.encoder is None
    plan.run()
    same(tmp_path / "c", built)
    assert (read_manifest(a), read_manifest(b)) == before
    with pytest.raises(IndexFolderError, match="holds an index already"):
        plan_merge(a, b, tmp_path / "c")
    with pytest.raises(IndexFolderError, match="is one of the two"):
        plan_merge(a, b, a, overwrite=True)


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"encoder": StubEncoder(1)}, "encoder 'stub-0' with digest .* encoder 'stub-1' with digest"),
        ({"encoder": StubEncoder(max_length=30)}, "max_length '20'; .* max_length '30'"),
        ({"encoder": StubEncoder(query_prompt="q: ")}, "query_prompt ''; .* query_prompt 'q: '"),
        ({"long_passages": "truncate"}, "long passages 'windows'; .* long passages 'truncate'"),
    ],
)
def test_indexes_of_different_vectors_are_not_merged(
    make: Build, tmp_path: Path, options: dict[str, Any], differs: str
) -> None:
    a, b = make("a", rows()[:5]), make("b", rows()[5:], **options)
    with pytest.raises(EncoderMismatchError, match=differs) as caught:
        plan_merge(a, b, tmp_path / "c")
    assert str(a) in caught.value.message and str(b) in caught.value.message
    assert not (tmp_path / "c").exists()


def test_an_id_in_both_with_different_texts(make: Build, tmp_path: Path) -> None:
    a, b = make("a", rows()[:5]), make("b", [{**rows()[2], "text": "Else."}])
    with pytest.raises(DataError, match=r"id 'river-2' is in both .* with different texts"):
        plan_merge(a, b, tmp_path / "c")


def test_nothing_is_taken_over_from_a_damaged_index(make: Build, tmp_path: Path) -> None:
    for file in ("embeddings-1.npy", "passages-1.parquet"):
        folder = make(file[:4], rows()[:5])
        other = make("other", rows()[5:], overwrite=True)
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (folder / file).write_bytes(content)
        for plan in (lambda: plan_remove(folder, ids=["river-0"]), lambda: plan_merge(other, folder, tmp_path / "c")):  # noqa: B023
            with pytest.raises(IndexFolderError, match=f"{file} was changed; nothing is taken"):
                plan()


def test_a_plan_that_came_too_late(make: Build, tmp_path: Path) -> None:
    folder = make("whole", rows())
    first, second = plan_remove(folder, domain="river"), plan_remove(folder, domain="market")
    with FileLock(folder / "build.lock"), pytest.raises(IndexLockedError, match="another process"):
        first.run()
    first.run()
    with pytest.raises(IndexFolderError, match="was changed meanwhile"):
        second.run()
    assert Index.open(folder).domains.count("market") == 8


def test_what_was_encoded_before_a_kill_is_not_encoded_again(
    make: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 5)
    folder, built = make("part", rows()[:3]), make("whole", rows())
    more = [str(write(tmp_path / "more.jsonl", rows()))]

    def die(point: str) -> None:
        seen.append(point)
        if seen.count("block") == 3:
            raise KeyboardInterrupt

    seen: list[str] = []
    plan = plan_add(folder, more, encoder=StubEncoder())
    _crash.hook = die
    with pytest.raises(KeyboardInterrupt):
        plan.run()
    _crash.hook = None
    assert len(Index.open(folder)) == 3
    encoder = StubEncoder()
    plan_add(folder, more, encoder=encoder, resume=True).run()
    assert {text.splitlines()[0] for text in encoder.encoded} == {row["title"] for row in rows()[15:]}
    same(folder, built)


def remember(folder: Path, bundle: str, scale: float = 1.0) -> ExpertMemory:
    """A memory in which each passage has an affinity of its own, and the odd rows none."""
    index = Index.open(folder)
    affinity_PLE = np.zeros((len(index), 2, 3), dtype=np.float16)
    questions_P = np.zeros(len(index), dtype=np.int32)
    for row, name in enumerate(index.passage_ids):
        if row % 2 == 0:
            affinity_PLE[row] = scale * (1 + [r["id"] for r in rows()].index(name))
            questions_P[row] = row + 1
    memory = ExpertMemory(affinity_PLE, questions_P, [0, 4, 7], [1, 3], bundle * 64, index.digest)
    memory.save(index)
    return memory


def recorded(folder: Path, bundle: str) -> dict[str, tuple[float, int]]:
    """What is recorded of each passage."""
    index = Index.open(folder)
    memory = read_memory(index, bundle * 64)
    assert memory is not None and (memory.expert_ids, memory.layers) == ([0, 4, 7], [1, 3])
    assert [path.name for path in (folder / "memory").iterdir()] == [memory_path(index, bundle * 64).name]
    return {
        name: (float(memory.affinity_PLE[row].max()), int(memory.questions_P[row]))
        for row, name in enumerate(index.passage_ids)
    }


def test_what_was_recorded_goes_with_the_passages(make: Build, tmp_path: Path) -> None:
    folder = make("part", rows()[:10])
    remember(folder, "b")
    before = recorded(folder, "b")
    assert before["river-2"] == (3, 3)
    plan_add(folder, [str(write(tmp_path / "more.jsonl", rows()))], encoder=StubEncoder()).run()
    added = recorded(folder, "b")
    assert {name: added[name] for name in before} == before
    assert len(added) == 24 and {added[name] for name in added.keys() - before.keys()} == {(0.0, 0)}
    plan_remove(folder, ids=["river-0", "river-1", "archive-2"]).run()
    left = recorded(folder, "b")
    assert left == {name: value for name, value in added.items() if name not in ("river-0", "river-1", "archive-2")}


def test_merging_keeps_what_both_have_recorded(make: Build, tmp_path: Path) -> None:
    a, b = make("a", rows()[:10]), make("b", rows()[7:])
    remember(a, "b")
    remember(b, "b", scale=-1.0)
    expected = recorded(b, "b") | recorded(a, "b")
    # Of these three that are in both, the first index knows one, and the second the two others.
    expected |= {"river-7": (-8.0, 1), "market-0": (9.0, 9), "market-1": (-10.0, 3)}
    plan_merge(a, b, tmp_path / "c").run()
    assert recorded(tmp_path / "c", "b") == expected


def test_what_both_indexes_recorded_of_a_passage_is_weighed_by_its_questions(make: Build, tmp_path: Path) -> None:
    a, b = make("a", rows()[:10]), make("b", rows()[8:])
    remember(a, "b")
    remember(b, "b", scale=-1.0)
    plan_merge(a, b, tmp_path / "c").run()
    assert recorded(tmp_path / "c", "b")["market-0"] == (pytest.approx((9 * 9 - 1 * 9) / 10, rel=1e-3), 10)


def test_until_the_commit_the_old_memory_counts(make: Build) -> None:
    folder = make("whole", rows())
    remember(folder, "b")
    before = recorded(folder, "b")
    plan = plan_remove(folder, domain="river")

    at = ""

    def die(point: str) -> None:
        if point == at:
            raise KeyboardInterrupt

    _crash.hook = die
    for point, count in (("manifest-written", 24), ("committed", 16)):
        at = point
        with pytest.raises(KeyboardInterrupt):
            plan.run()
        index = Index.open(folder)
        memory = read_memory(index, "b" * 64)
        assert memory is not None and len(memory.questions_P) == len(index) == count
        assert {name: int(memory.questions_P[index.row(name)]) for name in index.passage_ids} == {
            name: before[name][1] for name in index.passage_ids
        }


def test_a_disk_that_is_full_at_the_memory_leaves_the_index_as_it_was(
    make: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("whole", rows())
    memory = remember(folder, "b")
    # What an annotation left that was killed; it goes with the next change.
    (folder / "memory" / "x.1.part").touch()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        with pytest.raises(IndexFolderError, match=r"cannot write .*memory.*\.safetensors: .* No space left"):
            memory.save(Index.open(folder))
        with pytest.raises(IndexFolderError, match="No space left"):
            plan_remove(folder, domain="river").run()
    left = {path for path in folder.rglob("*") if path.is_file()} - {folder / "partial" / "state.json"}
    assert left == before.keys() and all(path.read_bytes() == content for path, content in before.items())
    plan_remove(folder, domain="river").run()
    assert len(recorded(folder, "b")) == 16
