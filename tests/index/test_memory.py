"""Expert memory: what passages say of experts, before and after anything is recorded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from stub_encoder import StubEncoder

from ragmoe import IndexFolderError, Neighbours
from ragmoe.index import BuildOptions, Index, build_index
from ragmoe.index.memory import ExpertMemory, memory_path, read_memory, recall_memory

NAMES, IDS, LAYERS = ["river", "market", "common"], [0, 4, 7], [1, 3]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Four passages: two of the river, one of the market, one of the moor, which no expert is named after."""
    rows = [("p0", "river"), ("p1", "market"), ("p2", "moor"), ("p3", "river")]
    lines = [json.dumps({"id": i, "title": i, "text": f"The {d} has a {i}.", "domain": d}) for i, d in rows]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    build_index(BuildOptions((str(tmp_path / "corpus.jsonl"),), tmp_path / "index", encoder=StubEncoder()))
    return Index.open(tmp_path / "index", encoder=StubEncoder())


def recorded(index: Index) -> ExpertMemory:
    """Two questions about p0: in the first layer three quarters of the choices fell on expert 7."""
    counts = {index.row("p0"): np.array([[1.0, 0.0, 3.0], [0.0, 4.0, 0.0]])}
    return ExpertMemory.of_domains(index, NAMES, IDS, LAYERS).recorded(counts, {index.row("p0"): 2}, "b" * 64)


def test_at_first_a_passage_speaks_for_its_domains_expert(index: Index) -> None:
    memory = ExpertMemory.of_domains(index, NAMES, IDS, LAYERS)
    votes_NLE = memory.votes([index.row(name) for name in ("p0", "p1", "p2")])
    assert votes_NLE[0].tolist() == [[1, 0, 0]] * 2 and votes_NLE[1].tolist() == [[0, 1, 0]] * 2
    assert not votes_NLE[2].any() and not memory.questions_P.any()


def test_recall_puts_the_votes_in_the_neighbours_places(index: Index) -> None:
    memory = recorded(index)
    found = index.neighbours(["the river p0", "the market p1"], 3)
    kept = memory.recall(found.without([[found.passage_ids[0][0]], []]), index)
    assert kept.votes_BNLE.shape == (2, 3, 2, 3) and not kept.votes_BNLE[0, 0].any()
    for b in range(2):
        for n, name in enumerate(found.passage_ids[b]):
            if kept.mask_BN[b, n]:
                assert np.array_equal(kept.votes_BNLE[b, n].numpy(), memory.votes([index.row(name)])[0])


def test_what_is_no_passage_votes_as_a_regression_on_the_passages_says(index: Index) -> None:
    memory = recorded(index)
    near_NR = torch.from_numpy(index.embeddings[:3].astype(np.float32))
    embeddings_BNR = near_NR + 0.3 * torch.randn(2, 3, index.width, generator=torch.Generator().manual_seed(0))
    mask_BN = torch.tensor([[True, True, True], [True, False, False]])
    nameless = Neighbours(embeddings_BNR, torch.zeros(2, 3), mask_BN, [])
    with pytest.raises(ValueError, match="argument"):
        memory.recall(nameless, index)
    found = memory.recall(nameless, index, guess=True)
    # In float64 and with the offset as a column whose weight is not penalised.
    x_PR = np.concatenate([index.embeddings.astype(np.float64), np.ones((len(index), 1))], axis=1)
    penalty = np.diag([1.0] * index.width + [0.0])
    for layer in range(len(LAYERS)):
        said_PE = memory.affinity_PLE[:, layer].astype(np.float64)
        y_PE = np.concatenate([said_PE, 1 - said_PE.sum(axis=1, keepdims=True)], axis=1)
        weight = np.linalg.solve(x_PR.T @ x_PR + penalty, x_PR.T @ y_PE)
        for b, n in mask_BN.nonzero().tolist():
            best = int(np.argmax([*embeddings_BNR[b, n].tolist(), 1.0] @ weight))
            expected = [float(best == expert) for expert in range(3)]
            assert found.votes_BNLE[b, n, layer].tolist() == expected
    assert not found.votes_BNLE[1, 1:].any() and found.votes_BNLE.any()


def test_what_was_recorded_is_kept_and_found_again(index: Index) -> None:
    memory = recorded(index)
    path = memory.save(index)
    assert path.stat().st_mode & 0o044 == index.folder.stat().st_mode & 0o044
    assert path == memory_path(index, memory.bundle) and [p.name for p in path.parent.iterdir()] == [path.name]
    back = read_memory(index, memory.bundle)
    assert (
        back is not None and back.digest == memory.digest and back.questions_P.tolist() == memory.questions_P.tolist()
    )
    assert back.votes([index.row("p0")])[0].tolist() == [[0.25, 0, 0.75], [0, 1, 0]]
    assert read_memory(index, "c" * 64) is None


def test_what_is_kept_is_on_the_disk_before_it_has_its_name(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    memory = recorded(index)
    path = memory_path(index, memory.bundle)
    for name in ("sync", "sync_folder"):
        monkeypatch.setattr(f"ragmoe.index.manifest.{name}", lambda at: synced.append((at.name, path.exists())))
    memory.save(index)
    assert synced == [(path.with_suffix(f".{os.getpid()}.part").name, False), ("memory", True)]


def test_a_model_takes_the_newest_memory_of_its_own_versions(index: Index) -> None:
    recorded(index).save(index)
    found = recall_memory(index, NAMES, IDS, LAYERS, ["c" * 64, "b" * 64])
    assert found.votes([index.row("p0")])[0].tolist() == [[0.25, 0, 0.75], [0, 1, 0]]
    # Nothing was asked about p1: it speaks for its domain.
    assert found.votes([index.row("p1")])[0].tolist() == [[0, 1, 0]] * 2
    domains = ExpertMemory.of_domains(index, NAMES, IDS, LAYERS).digest
    assert recall_memory(index, NAMES, IDS, LAYERS, ["c" * 64]).digest == domains
    assert recall_memory(index, NAMES, IDS, [1, 2], ["b" * 64]).affinity_PLE[0, 0].tolist() == [1, 0, 0]


def test_a_new_expert_is_reached_through_its_documents_and_others_keep_their_columns(index: Index) -> None:
    recorded(index).save(index)
    found = recall_memory(index, ["common", "river", "moor"], [7, 0, 9], LAYERS, ["b" * 64])
    assert found.votes([index.row("p2")])[0].tolist() == [[0, 0, 1]] * 2
    assert found.votes([index.row("p0")])[0].tolist() == [[0.75, 0.25, 0], [0, 0, 0]]


def test_votes_for_an_expert_that_has_left_go_to_the_others(index: Index) -> None:
    recorded(index).save(index)
    found = recall_memory(index, ["river"], [0], LAYERS, ["b" * 64])
    # All of the second layer's were for experts that are gone: there it has no say.
    assert found.votes([index.row("p0")])[0].tolist() == [[1.0], [0.0]]


def test_memory_of_another_index_is_not_used(index: Index, tmp_path: Path) -> None:
    path = recorded(index).save(index)
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "p9", "title": "", "text": "Else.", "domain": "river"}))
    options = BuildOptions((str(tmp_path / "corpus.jsonl"),), tmp_path / "index", encoder=StubEncoder(), overwrite=True)
    build_index(options)
    other = Index.open(tmp_path / "index", encoder=StubEncoder())
    assert not path.exists() and read_memory(other, "b" * 64) is None


def test_a_damaged_memory_is_named(index: Index) -> None:
    path = recorded(index).save(index)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(IndexFolderError, match="is damaged") as caught:
        read_memory(index, "b" * 64)
    assert str(path) in caught.value.message and "remove that file" in str(caught.value.hint)


def test_no_memory_is_written_through_a_link(index: Index, tmp_path: Path) -> None:
    part = recorded(index).save(index).with_suffix(f".{os.getpid()}.part")
    part.symlink_to(tmp_path / "own.txt")
    with pytest.raises(IndexFolderError, match="part is a link to"):
        recorded(index).save(index)
    assert not (tmp_path / "own.txt").exists()
    shutil.rmtree(index.folder / "memory")
    (tmp_path / "elsewhere").mkdir()
    (index.folder / "memory").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IndexFolderError, match="memory is a link to"):
        recorded(index).save(index)
    assert not list((tmp_path / "elsewhere").iterdir())
