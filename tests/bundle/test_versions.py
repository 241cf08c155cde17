"""A bundle goes back to an earlier version by its next map, and experts that are locked stay what they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from tiny import save_tiny_bert

from ragmoe import BundleError, load
from ragmoe.bundle import (
    MAP_NAME,
    BundleMap,
    _files,
    list_versions,
    lock_experts,
    merge_experts,
    prune_experts,
    read_bundle,
    read_map,
    rename_expert,
    roll_back,
)
from ragmoe.models import RagmoeBertForQuestionAnswering


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Version 1 of a reader with three experts, nothing in it zero."""
    torch.manual_seed(3)
    dense = save_tiny_bert(tmp_path / "dense")
    model = RagmoeBertForQuestionAnswering.from_dense(
        dense, experts=3, expert_rank=8, neighbour_width=16, gate_width=8, expert_names=["bank", "clinic", "archive"]
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


def retrain(bundle: Path, expert: int, threshold: float) -> None:
    """Another version of one expert and of the settings."""
    model = load(bundle)
    with torch.no_grad():
        model.moe_layers[0].experts.up_b[expert] += 1.0
    model.config.no_answer_threshold = threshold
    model.save_pretrained(bundle, message=f"train {expert}")


def as_read(bundle: Path, version: int | None = None) -> Any:
    state, map_ = read_bundle(bundle, version=version, verify=True)
    return {name: x.tolist() for name, x in state.items()}, map_.experts, map_.extra


@pytest.mark.parametrize(
    "change",
    [
        lambda b: prune_experts(b, ["clinic"]),
        lambda b: merge_experts(b, "bank", "clinic", "town"),
        lambda b: rename_expert(b, "bank", "mint"),
        lambda b: retrain(b, 1, 2.0),
    ],
)
def test_what_was_changed_is_taken_back_and_that_too(bundle: Path, change: Any) -> None:
    change(bundle)
    files = {path.name for path in bundle.glob("*.safetensors")}
    first, changed = as_read(bundle, 1), as_read(bundle)
    assert first != changed
    map_ = roll_back(bundle)
    assert map_.version == 3 and map_.lineage[-1].message == "roll back to version 1" and map_.lineage[-1].changed
    assert as_read(bundle) == first and as_read(bundle, 2) == changed
    assert {path.name for path in bundle.glob("*.safetensors")} == files
    settings = json.loads((bundle / "config.json").read_text())
    assert (settings["experts"], settings["expert_names"]) == (3, ["bank", "clinic", "archive"])
    assert settings["no_answer_threshold"] == load(bundle).config.no_answer_threshold == 0.0
    roll_back(bundle)
    assert as_read(bundle) == changed
    # An id that was used once is not used again, whatever the way here.
    assert read_map(bundle).next_expert_id == read_map(bundle, version=2).next_expert_id
    assert [step.version for step in list_versions(bundle)] == [1, 2, 3, 4]


def test_to_any_version(bundle: Path) -> None:
    retrain(bundle, 1, 2.0)
    retrain(bundle, 2, 3.0)
    map_ = roll_back(bundle, 1, message="as on Monday")
    assert map_.lineage[-1].message == "as on Monday"
    assert map_.lineage[-1].changed == [
        "expert 1 (clinic): version 1 in the place of 2",
        "expert 2 (archive): version 1 in the place of 2",
        "extra changed",
    ]
    # What is saved next has files of its own, and does not write over those of the version that was left.
    left = as_read(bundle, 3)
    retrain(bundle, 1, 4.0)
    assert as_read(bundle, 3) == left and read_map(bundle).find("clinic").version == 3


def test_it_descends_from_what_it_went_back_to(bundle: Path) -> None:
    """By which it finds the expert memory that was recorded with its own versions, and no other's."""
    retrain(bundle, 1, 2.0)
    retrain(bundle, 2, 3.0)
    first, second, third = (read_map(bundle, version=version).digest for version in (1, 2, 3))
    assert load(bundle).bundle_digests == [third, second, first]
    fourth = roll_back(bundle, 1)
    assert fourth.descent == load(bundle).bundle_digests == [fourth.digest, first]
    fifth = roll_back(bundle, 3)
    assert fifth.descent == [fifth.digest, third, second, first]
    prune_experts(bundle, ["clinic"])
    assert read_map(bundle).descent == [read_map(bundle).digest, *fifth.descent]
    assert BundleMap.from_json((bundle / MAP_NAME).read_text(), "map") == read_map(bundle)
    assert '"restores": 1' in (bundle / MAP_NAME).read_text() and "null" not in json.dumps(
        [step.model_dump() for step in list_versions(bundle)][1:]
    )


def test_the_copies_for_other_tools_are_those_of_the_version(bundle: Path) -> None:
    model = load(bundle)
    model.config.index_digest, model.config.encoder = "ab" * 32, {"id": "e", "digest": "0"}
    model.config.expert_thresholds = [None, 1.0, None]
    model.save_pretrained(bundle)
    roll_back(bundle)
    settings = json.loads((bundle / "config.json").read_text())
    assert [settings[name] for name in ("index_digest", "encoder", "expert_thresholds")] == [None] * 3
    (bundle / "config.json").write_text(json.dumps({**settings, "top_k": 3}))
    # A step that was stopped between the map and its copies is made good by asking again.
    with pytest.raises(BundleError, match="nothing to do"):
        roll_back(bundle, 3)
    assert json.loads((bundle / "config.json").read_text())["top_k"] == 2


@pytest.mark.parametrize("damaged", ["", '{"top_k": 2', "[1]"])
def test_a_damaged_copy_is_made_anew(bundle: Path, damaged: str) -> None:
    (bundle / "config.json").write_text(damaged)
    assert rename_expert(bundle, "bank", "mint").version == 2
    settings = json.loads((bundle / "config.json").read_text())
    assert settings["expert_names"] == ["mint", "clinic", "archive"] and settings["top_k"] == 2
    assert load(bundle).config.to_dict() == load(bundle, version=2).config.to_dict()


def test_a_locked_expert_keeps_its_threshold(bundle: Path) -> None:
    model = load(bundle)
    model.config.expert_thresholds = [None, 1.0, None]
    model.save_pretrained(bundle)
    lock_experts(bundle, ["clinic"])
    model = load(bundle)
    for changed in ([None, 2.0, None], None):
        model.config.expert_thresholds = changed
        with pytest.raises(BundleError, match=r"is locked: its no-answer threshold cannot change from 1\.0 to"):
            model.save_pretrained(bundle)
    with pytest.raises(BundleError, match=r"is locked: its no-answer threshold cannot change from 1\.0 to None"):
        roll_back(bundle, 1)
    model.config.expert_thresholds = [3.0, 1.0, None]
    model.save_pretrained(bundle)
    assert load(bundle).config.expert_thresholds == [3.0, 1.0, None]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "is version 1: there is none before it"),
        (1, "version 1 of .* is what version 1 is: there is nothing to do"),
        (7, r"has no version 7; it has \[1\]"),
    ],
)
def test_where_there_is_no_way_back(bundle: Path, version: int | None, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        roll_back(bundle, version)
    assert read_map(bundle).version == 1 and not (bundle / "maps").exists()


def test_a_version_whose_files_are_gone_is_not_gone_back_to(bundle: Path) -> None:
    prune_experts(bundle, ["clinic"])
    (bundle / "expert.1.1.safetensors").unlink()
    with pytest.raises(BundleError, match=r"lacks expert\.1\.1\.safetensors, which version 1 of its map lists"):
        roll_back(bundle)
    assert read_map(bundle).version == 2


def test_locked_experts_stay(bundle: Path) -> None:
    retrain(bundle, 1, 2.0)
    map_ = lock_experts(bundle, ["clinic", 0])
    assert [expert.locked for expert in map_.experts] == [True, True, False]
    assert map_.lineage[-1].message == "lock bank, clinic"
    assert map_.lineage[-1].changed == ["expert 0 (bank): locked", "expert 1 (clinic): locked"]
    assert lock_experts(bundle, ["bank"]).version == map_.version
    with pytest.raises(BundleError, match=r"expert 1 \(clinic\) is locked at its version 2; in version 1") as caught:
        roll_back(bundle, 1)
    assert caught.value.hint == f"ragmoe experts unlock {bundle} 1"
    with pytest.raises(BundleError, match=r"expert 1 \(clinic\) is locked"):
        retrain(bundle, 1, 3.0)
    assert read_map(bundle).version == map_.version
    # Another one may go and come back, and that opens no lock.
    prune_experts(bundle, ["archive"])
    assert [expert.locked for expert in roll_back(bundle, 2).experts] == [True, True, False]
    lock_experts(bundle, ["clinic"], locked=False)
    assert [(e.version, e.locked) for e in roll_back(bundle, 1).experts] == [(1, True), (1, False), (1, False)]
    with pytest.raises(BundleError, match="there is no expert 'mint'; there are: 0"):
        lock_experts(bundle, ["mint"])


def test_no_other_writer_comes_between_the_map_and_its_copies(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, written = os.replace, []

    def held(target: Path) -> None:
        with pytest.raises(Timeout):
            FileLock(bundle / ".bundle.lock", timeout=0).acquire()
        written.append(target)

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == "config.json":
            held(target)
        rename(source, target)

    monkeypatch.setattr(_files.os, "replace", replace)
    rename_expert(bundle, "bank", "mint")
    merge_experts(bundle, "mint", "clinic", "town")
    roll_back(bundle)
    assert len(written) == 3
    model = load(bundle)
    monkeypatch.setattr(type(model.config), "save_pretrained", lambda config, folder: held(folder))
    model.save_pretrained(bundle)
    assert len(written) == 4
