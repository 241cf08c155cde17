"""Experts that were added to copies of one bundle come together in one; what was in each copy answers as it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_bert
from torch import Tensor

from ragmoe import BundleError, load
from ragmoe.bundle import (
    THRESHOLDS,
    BundleMap,
    ExpertInfo,
    lock_experts,
    prune_experts,
    read_bundle,
    read_map,
    rename_expert,
    show_expert,
    take_experts,
    verify_bundle,
)
from ragmoe.bundle.experts import CERTIFICATES, publish
from ragmoe.models import RagmoeBertForQuestionAnswering

OLD = ["bank", "archive"]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make(gate)``: a reader with two experts, nothing in it zero."""
    folder = tmp_path_factory.mktemp("taken")
    dense = save_tiny_bert(folder / "dense")

    def made(**settings: Any) -> Path:
        out = folder / "-".join(["made", *map(str, settings.values())])
        if not out.exists():
            torch.manual_seed(3)
            given = {"experts": 2, "top_k": 1, "neighbour_width": 16, "gate_width": 8, "expert_rank": 8, **settings}
            model = RagmoeBertForQuestionAnswering.from_dense(dense, expert_kind="lora", **given)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.config.expert_names = OLD
            model.config.encoder = {"id": "some/encoder", "digest": "d" * 64}
            model.save_pretrained(out)
        return out

    return made


@pytest.fixture
def copy_with(make: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``copy_with(name)``: a copy to which an expert was added; it has a threshold and a certificate."""

    def copied(name: str, **settings: Any) -> Path:
        out = Path(shutil.copytree(make(**settings), tmp_path / name))
        state, parent = read_bundle(out)
        torch.manual_seed(sum(map(ord, name)))
        for tensor in parent.fused:
            row = state[tensor].mean(dim=0)
            state[tensor] = torch.cat([state[tensor], (row + torch.randn_like(row) * 0.1).unsqueeze(0)])
        state |= {alias: state[tensor] for alias, tensor in parent.aliases.items()}
        experts = [*((e.id, e.name) for e in parent.experts), (2, name)]
        extra = {CERTIFICATES: {"2": {"name": name, "steps": 3}}, THRESHOLDS: {"2": len(name) / 10}}
        publish(out, parent, state, experts, f"add expert {name}", extra=extra)
        (out / "experts" / "2").mkdir(parents=True)
        (out / "experts" / "2" / "training.yaml").write_text(f"name: {name}\n")
        return out

    return copied


def logits(bundle: Path, **arguments: Any) -> Tensor:
    torch.manual_seed(5)
    ids = torch.randint(5, 90, (2, 10))
    with torch.no_grad():
        return load(bundle, **arguments)(input_ids=ids).start_logits


def kept(before: BundleMap, after: BundleMap) -> bool:
    """Whether every file of a map is one of another, by its content."""
    return before.digests.items() <= after.digests.items()


def test_each_answers_as_it_did_in_its_copy(copy_with: Callable[..., Path]) -> None:
    clinic, court = copy_with("clinic"), copy_with("court")
    alone, other, before = logits(clinic), logits(court), read_map(clinic)
    map_ = take_experts(clinic, court, ["court"])
    assert (map_.expert_ids, map_.expert_names) == ([0, 1, 2, 3], [*OLD, "clinic", "court"])
    assert kept(before, map_) and verify_bundle(clinic) == [] and map_.extra["config"]["experts"] == 4
    assert torch.equal(logits(clinic, experts=[*OLD, "clinic"]), alone)
    assert torch.equal(logits(clinic, experts=[*OLD, "court"]), other)
    assert torch.equal(logits(clinic, version=before.version), alone)
    both = logits(clinic)
    assert not torch.equal(both, alone) and not torch.equal(both, other)


def test_what_is_known_of_an_expert_comes_with_it(copy_with: Callable[..., Path]) -> None:
    clinic, court = copy_with("clinic"), copy_with("court")
    map_ = take_experts(clinic, court, [2])
    found: ExpertInfo = show_expert(clinic, "court")
    assert found.digest != show_expert(court, "court").digest  # its tensors are called by its id
    assert found.parameters == show_expert(court, "court").parameters
    assert found.no_answer_threshold == 0.5 and show_expert(clinic, "clinic").no_answer_threshold == 0.6
    assert found.certificate == {
        "name": "court",
        "steps": 3,
        "taken": {"from": read_map(court).content},
    }
    assert show_expert(clinic, "clinic").certificate == {"name": "clinic", "steps": 3}
    assert map_.lineage[-1].message == "take court from court, version 2"
    assert (clinic / "experts" / "3" / "training.yaml").read_text() == "name: court\n"
    assert json.loads((clinic / "config.json").read_text())["expert_thresholds"] == [None, None, 0.6, 0.5]


def test_a_certificate_remembers_where_it_was_measured(copy_with: Callable[..., Path]) -> None:
    clinic, court, third = copy_with("clinic"), copy_with("court"), copy_with("third")
    measured_in = read_map(court).content
    take_experts(clinic, court, ["court"])
    take_experts(third, clinic, ["court"])
    certificate = show_expert(third, "court").certificate
    assert certificate is not None and certificate["taken"] == {"from": measured_in}


def test_files_that_were_cut_otherwise_hold_the_same_tensors(copy_with: Callable[..., Path], tmp_path: Path) -> None:
    clinic, court = copy_with("clinic"), copy_with("court")
    load(court).save_pretrained(tmp_path / "cut", max_shard_size=20_000)
    assert len(list((tmp_path / "cut").glob("base-*"))) > 1
    alone = logits(court)
    take_experts(clinic, tmp_path / "cut", ["court"])
    assert torch.equal(logits(clinic, experts=[*OLD, "court"]), alone)


def test_one_that_was_pruned_comes_back(copy_with: Callable[..., Path]) -> None:
    clinic = copy_with("clinic")
    whole = logits(clinic)
    prune_experts(clinic, ["bank"])
    lock_experts(clinic, ["archive"])
    map_ = take_experts(clinic, clinic, ["bank"], version=2)
    assert (map_.expert_ids, map_.expert_names) == ([1, 2, 3], ["archive", "clinic", "bank"])
    torch.testing.assert_close(logits(clinic), whole)
    assert map_.expert(1) is not None and map_.expert(1).locked  # type: ignore[union-attr]


def test_several_at_once(copy_with: Callable[..., Path]) -> None:
    clinic, court, bare = copy_with("clinic"), copy_with("court"), copy_with("bare")
    take_experts(clinic, court, ["court"])
    prune_experts(bare, ["bare"])
    map_ = take_experts(bare, clinic, ["court", "clinic"])
    assert map_.expert_names == [*OLD, "court", "clinic"] and map_.expert_ids == [0, 1, 3, 4]
    torch.testing.assert_close(logits(bare), logits(clinic))


def shared_moved(bundle: Path) -> None:
    model = load(bundle)
    with torch.no_grad():
        model.qa_outputs.bias.add_(1.0)
    model.save_pretrained(bundle)


def encoder_changed(bundle: Path) -> None:
    model = load(bundle)
    model.config.encoder = {"id": "another/encoder", "digest": "e" * 64}
    model.save_pretrained(bundle)


def renamed(bundle: Path) -> None:
    rename_expert(bundle, "court", "clinic")


def damaged(bundle: Path) -> None:
    path = bundle / show_expert(bundle, "court").file
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")


@pytest.mark.parametrize(
    ("change", "wanted", "said"),
    [
        (None, ["coort"], r"there is no expert 'coort'; there are: 0 \(bank\)"),
        (None, ["court", 2], "asked for twice"),
        (None, ["bank"], "there is an expert 'bank' already"),
        (renamed, ["clinic"], "there is an expert 'clinic' already"),
        (shared_moved, ["court"], "in 1 tensor that all experts share, for example qa_outputs.bias: an expert"),
        (encoder_changed, ["court"], "embeddings of other encoders: .* of some/encoder, .* of another/encoder"),
        (damaged, ["court"], "was changed: its sha256"),
    ],
)
def test_what_cannot_be_taken_changes_nothing(
    copy_with: Callable[..., Path], change: Callable[[Path], None] | None, wanted: list[Any], said: str
) -> None:
    clinic, court = copy_with("clinic"), copy_with("court")
    if change is not None:
        change(court)
    before = (clinic / "model.safetensors.index.json").read_bytes()
    with pytest.raises(BundleError, match=said):
        take_experts(clinic, court, wanted)
    assert (clinic / "model.safetensors.index.json").read_bytes() == before
    assert not (clinic / "experts" / "3").exists()


def test_another_model_has_no_expert_for_this_one(copy_with: Callable[..., Path]) -> None:
    clinic, court = copy_with("clinic"), copy_with("court", top_k=2)
    with pytest.raises(BundleError, match=r"another model than .*; it differs in top_k \(1, there 2\)\nexperts can be"):
        take_experts(clinic, court, ["court"])


def test_what_training_alone_goes_by_may_differ(copy_with: Callable[..., Path]) -> None:
    clinic, court = copy_with("clinic"), copy_with("court", hidden_dropout_prob=0.3, balance_loss=0.5, gate_noise=0.1)
    assert take_experts(clinic, court, ["court"]).expert_names == [*OLD, "clinic", "court"]


def test_a_gate_that_takes_no_new_expert_takes_none_from_elsewhere(copy_with: Callable[..., Path]) -> None:
    clinic, court = (copy_with(name, gate="oracle") for name in ("clinic", "court"))
    with pytest.raises(BundleError, match="the gate 'oracle' knows its experts by the domains"):
        take_experts(clinic, court, ["court"])
