"""A folder that is not what its map says is refused, with what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ragmoe import BundleError
from ragmoe.bundle import MAP_NAME, read_bundle, write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    state = {"base": torch.randn(30), "gate": torch.randn(2), "up": torch.randn(2, 3)}
    write_bundle(tmp_path, state, expert_tensors={"up"}, gate_tensors={"gate"}, expert_names=["bank", "clinic"])
    return tmp_path


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / MAP_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(bundle: Path, message: str, **arguments: bool) -> None:
    with pytest.raises(BundleError, match=message):
        read_bundle(bundle, **arguments)


def test_no_folder_and_no_map(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no bundle at .*nowhere: no such folder")
    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path, rf"not a bundle: it has no {MAP_NAME}, but notes\.txt\nragmoe train")


def test_a_missing_file(bundle: Path) -> None:
    (bundle / "expert.1.1.safetensors").unlink()
    refused(bundle, r"lacks expert\.1\.1\.safetensors, which its map \(version 1\) lists; it has base-1")


def test_a_truncated_file(bundle: Path) -> None:
    path = bundle / "base-1-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused(bundle, r"base-1-00001-of-00001\.safetensors is damaged")


def test_an_empty_file(bundle: Path) -> None:
    (bundle / "gate.1.safetensors").write_bytes(b"")
    refused(bundle, r"gate\.1\.safetensors is damaged")


def test_a_flipped_bit_is_found_by_verify(bundle: Path) -> None:
    path = bundle / "gate.1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    read_bundle(bundle)
    refused(bundle, r"gate\.1\.safetensors was changed: its sha256 is", verify=True)


def test_a_file_with_other_tensors(bundle: Path) -> None:
    save_file({"gate.other": torch.ones(1), "base": torch.ones(1)}, bundle / "gate.1.safetensors")
    refused(bundle, r"it lacks 'gate' and holds 'base', 'gate\.other', which the map does not list there")


def test_experts_of_different_shapes(bundle: Path) -> None:
    save_file({"up.1": torch.ones(4)}, bundle / "expert.1.1.safetensors")
    refused(bundle, r"disagree about 'up': expert 0 \(3,\) torch\.float32, expert 1 \(4,\)")


@pytest.mark.parametrize(
    "file",
    ["../gate.1.safetensors", "/etc/gate.1.safetensors", "sub/gate.1.safetensors", "gate.1.safetensors/../x", "x.bin"],
)
def test_a_path_that_leaves_the_folder(bundle: Path, file: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["weight_map"]["gate"] = file
        content["metadata"]["digests"][file] = content["metadata"]["digests"].pop("gate.1.safetensors")

    edit(bundle, change)
    refused(bundle, f"'{file}' is not a file of this bundle")


def test_a_name_in_two_files(bundle: Path) -> None:
    path = bundle / MAP_NAME
    path.write_text(path.read_text().replace('"weight_map": {', '"weight_map": {"gate": "expert.0.1.safetensors",'))
    refused(bundle, "'gate' is listed twice, as 'expert.0.1.safetensors' and 'gate.1.safetensors'")


EDITS = [
    (lambda c: c["weight_map"].pop("up.1"), r"expert 1 \(clinic\) has no tensor 'up'"),
    (lambda c: c["weight_map"].update({"up.1": "expert.0.1.safetensors"}), "'up.1' is listed in 'expert.0.1.saf"),
    (lambda c: c["weight_map"].update({"base": "expert.0.1.safetensors"}), "'base' is listed in 'expert.0.1.saf"),
    (lambda c: c["metadata"]["experts"].pop(), r"'expert\.1\.1\.safetensors' is not a file of this bundle"),
    (lambda c: c["metadata"]["experts"].append(c["metadata"]["experts"][0]), r"expert ids repeat: \[0, 1, 0\]"),
    (lambda c: c["metadata"]["experts"][0].update(name="clinic"), r"expert names repeat: \['clinic', 'clinic'\]"),
    (lambda c: c["metadata"]["experts"][0].update(version=0), r"experts\.0\.version: .*greater than or equal to 1"),
    (lambda c: c["metadata"].update(next_expert_id=1), "next_expert_id is 1, but expert 1 exists"),
    (lambda c: c["metadata"].update(aliases={"head": "nothing"}), "alias 'head' of 'nothing' does not fit"),
    (lambda c: c["metadata"]["digests"].popitem(), "digests and weight_map name different files"),
    (lambda c: c["metadata"].update(gate_version=2), r"'gate\.1\.safetensors' is not a file of this bundle"),
    (lambda c: c["metadata"].update(experts=[]), r"fused tensors but no experts: \['up'\]"),
    (lambda c: c["metadata"].update(colour="red"), "colour: Extra inputs are not permitted"),
    (lambda c: c["metadata"].update(format_version=2), "has format 2; this ragmoe reads format 1"),
    (lambda c: c["metadata"].pop("format_version"), "plain sharded checkpoint, not to a bundle"),
    (lambda c: c.pop("weight_map"), "is damaged: 'weight_map'"),
]


@pytest.mark.parametrize(("change", "message"), EDITS)
def test_a_map_that_contradicts_itself(bundle: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(bundle, change)
    refused(bundle, message)
