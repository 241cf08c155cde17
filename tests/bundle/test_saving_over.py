"""Saving over a bundle changes what differs and nothing else; what was there before still opens."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from ragmoe import BundleError
from ragmoe.bundle import MAP_NAME, BundleMap, read_bundle, read_map, write_bundle


def small_state() -> dict[str, Tensor]:
    return {"base": torch.randn(3), "gate": torch.randn(2), "up": torch.randn(3, 2), "down": torch.randn(3, 4)}


def save(folder: Path, state: dict[str, Tensor], **arguments: object) -> BundleMap:
    fused = {name for name in ("up", "down") if name in state}
    return write_bundle(folder, state, **{"expert_tensors": fused, "gate_tensors": {"gate"}, **arguments})


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Inode and content of each file, so that a rewritten equal file counts as touched."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def touched(folder: Path, before: dict[str, tuple[int, str]]) -> set[str]:
    after = snapshot(folder)
    assert before.keys() <= after.keys(), "a file vanished"
    return {name for name in after if after[name] != before.get(name)}


def test_one_changed_expert_is_one_new_file(tmp_path: Path) -> None:
    state = small_state()
    save(tmp_path, state, expert_ids=[0, 2, 5])
    before = snapshot(tmp_path)
    state["down"][1, 0] += 1
    map_ = save(tmp_path, state)
    assert touched(tmp_path, before) == {"expert.2.2.safetensors", "maps/1.json", "bundle.json", MAP_NAME}
    assert [(e.id, e.version) for e in map_.experts] == [(0, 1), (2, 2), (5, 1)]
    assert map_.lineage[-1].changed == ["expert 2 (expert2): version 2"]
    assert map_.lineage[-1].parent == hashlib.sha256((tmp_path / "maps/1.json").read_bytes()).hexdigest()
    assert torch.equal(read_bundle(tmp_path, verify=True)[0]["down"], state["down"])


@pytest.mark.parametrize(
    ("name", "file"), [("base", "base-2-00001-of-00001.safetensors"), ("gate", "gate.2.safetensors")]
)
def test_a_changed_base_or_gate_is_one_new_file(tmp_path: Path, name: str, file: str) -> None:
    state = small_state()
    save(tmp_path, state)
    before = snapshot(tmp_path)
    state[name][0] += 1
    map_ = save(tmp_path, state)
    assert touched(tmp_path, before) == {file, "maps/1.json", "bundle.json", MAP_NAME}
    assert (map_.base_version, map_.gate_version) == ((2, 1) if name == "base" else (1, 2))


def test_saving_the_same_again_commits_nothing(tmp_path: Path) -> None:
    state = small_state()
    first = save(tmp_path, state, extra={"threshold": 0.5})
    before = snapshot(tmp_path)
    assert save(tmp_path, {name: x.clone() for name, x in state.items()}, extra={"threshold": 0.5}) == first
    assert touched(tmp_path, before) <= {"bundle.json"}


def test_metadata_alone_is_a_new_map_and_no_new_file(tmp_path: Path) -> None:
    state = small_state()
    save(tmp_path, state, extra={"threshold": 0.5}, encoder={"id": "a", "digest": "1"})
    before = snapshot(tmp_path)
    map_ = save(tmp_path, state, expert_names=["bank", "clinic", "archive"])
    assert touched(tmp_path, before) == {"maps/1.json", "bundle.json", MAP_NAME}
    assert (map_.version, map_.extra, map_.encoder) == (2, {}, None)
    assert "expert 0: renamed from expert0 to bank" in map_.lineage[-1].changed
    assert {"encoder changed", "extra changed"} <= set(map_.lineage[-1].changed)


def test_negative_zero_and_dtype_count_as_changes(tmp_path: Path) -> None:
    save(tmp_path, {"base": torch.zeros(2), "gate": torch.zeros(1)})
    assert save(tmp_path, {"base": -torch.zeros(2), "gate": torch.zeros(1)}).base_version == 2
    assert save(tmp_path, {"base": torch.zeros(2).half(), "gate": torch.zeros(1)}).base_version == 3


def test_earlier_versions_open_bit_equal(tmp_path: Path) -> None:
    states = []
    for step in range(3):
        state = small_state()
        states.append({name: x.clone() for name, x in state.items()})
        assert save(tmp_path, state).version == step + 1
    for step, state in enumerate(states, start=1):
        found, map_ = read_bundle(tmp_path, version=step, verify=True)
        assert map_.version == step
        assert all(torch.equal(found[name], state[name]) for name in state)
    with pytest.raises(BundleError, match=r"no version 7; it has \[1, 2, 3\]"):
        read_map(tmp_path, version=7)


def test_adding_removing_and_reordering_experts(tmp_path: Path) -> None:
    state = small_state()
    save(tmp_path, state)
    for name in ("up", "down"):
        state[name] = torch.cat([state[name][[2, 0]], torch.randn(1, state[name].shape[1])])
    before = snapshot(tmp_path)
    map_ = save(tmp_path, state, expert_ids=[2, 0, 3])
    assert touched(tmp_path, before) == {"expert.3.1.safetensors", "maps/1.json", "bundle.json", MAP_NAME}
    assert (map_.expert_ids, map_.next_expert_id) == ([2, 0, 3], 4)
    changed = ["expert 3 (expert3): version 1", "expert 1 (expert1): removed", "order of the experts: [2, 0, 3]"]
    assert map_.lineage[-1].changed == changed
    assert torch.equal(read_bundle(tmp_path)[0]["up"], state["up"])


def test_an_id_is_never_used_again(tmp_path: Path) -> None:
    state = small_state()
    save(tmp_path, state)
    fewer = {**state, "up": state["up"][:2], "down": state["down"][:2]}
    save(tmp_path, fewer, expert_ids=[0, 1])
    with pytest.raises(BundleError, match=r"never reused: \[2\] were used before; the next free one is 3"):
        save(tmp_path, state, expert_ids=[0, 1, 2])
    with pytest.raises(BundleError, match=r"have 3 experts; the expert ids are \[0, 1\]") as caught:
        save(tmp_path, state)
    assert "next_expert_id" in (caught.value.hint or "")


def test_a_version_left_by_a_killed_writer_is_not_written_again(tmp_path: Path) -> None:
    state = small_state()
    save(tmp_path, state)
    (tmp_path / "expert.1.7.safetensors").write_bytes(b"left behind")
    (tmp_path / ".writing-gate.2.safetensors").write_bytes(b"half")
    state["up"][1] += 1
    assert save(tmp_path, state).experts[1].version == 8
    assert (tmp_path / "expert.1.7.safetensors").read_bytes() == b"left behind"
    assert not (tmp_path / ".writing-gate.2.safetensors").exists()


def test_a_damaged_file_is_written_anew_by_the_next_save(tmp_path: Path) -> None:
    state = small_state()
    save(tmp_path, state)
    (tmp_path / "gate.1.safetensors").write_bytes(b"damaged")
    assert save(tmp_path, state).gate_version == 2
    assert torch.equal(read_bundle(tmp_path, verify=True)[0]["gate"], state["gate"])


def test_a_locked_expert_cannot_change(tmp_path: Path) -> None:
    state = small_state()
    map_ = save(tmp_path, state, expert_names=["bank", "clinic", "archive"])
    locked = [e.model_copy(update={"locked": e.id == 1}) for e in map_.experts]
    (tmp_path / MAP_NAME).write_text(map_.model_copy(update={"experts": locked}).to_json())
    state["up"][0] += 1
    assert [e.locked for e in save(tmp_path, state).experts] == [False, True, False]
    before = snapshot(tmp_path)
    state["up"][1] += 1
    with pytest.raises(BundleError, match=r"expert 1 \(clinic\) is locked"):
        save(tmp_path, state)
    assert not touched(tmp_path, before)


def test_leftovers_of_a_plain_save_are_removed(tmp_path: Path) -> None:
    strays = [
        "model.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model-00001-of-00002.safetensors",
        "pytorch_model-00001-of-00002.bin",
    ]
    others = ["adapter_model.safetensors", "config.json", "tokenizer.json"]
    for name in (*strays, *others):
        (tmp_path / name).write_text("{}")
    plain = {"metadata": {"total_size": 4}, "weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (tmp_path / MAP_NAME).write_text(json.dumps(plain))
    save(tmp_path, small_state())
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & set(strays)
    assert left >= set(others)
    assert read_map(tmp_path).version == 1


def test_a_damaged_map_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / MAP_NAME).write_text('{"metadata": ')
    with pytest.raises(BundleError, match="damaged"):
        save(tmp_path, small_state())
    assert (tmp_path / MAP_NAME).read_text() == '{"metadata": '


def test_writers_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ragmoe.bundle.write._LOCK_SECONDS", 0.05)
    with (
        FileLock(tmp_path / ".bundle.lock", is_singleton=False),
        pytest.raises(BundleError, match=r"somebody else.*\.bundle\.lock"),
    ):
        save(tmp_path, small_state())
    assert save(tmp_path, small_state()).version == 1


def test_readers_see_old_or_new_while_others_write(tmp_path: Path) -> None:
    """The version number is written into every tensor, so that a mixture of two versions would show."""

    def state_of(version: int) -> dict[str, Tensor]:
        return {name: torch.full_like(x, version) for name, x in small_state().items()}

    save(tmp_path, state_of(1))
    last = 12
    writer = threading.Thread(target=lambda: [save(tmp_path, state_of(v)) for v in range(2, last + 1)])
    writer.start()
    seen = set()
    while not seen or writer.is_alive():
        found, map_ = read_bundle(tmp_path)
        assert all(bool((x == map_.version).all()) for x in found.values())
        seen.add(map_.version)
    writer.join()
    assert read_bundle(tmp_path)[1].version == last


def test_an_unwritable_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot write the bundle"):
        save(tmp_path / "file" / "bundle", small_state())
