"""Single experts are renamed, pruned and merged by their bundle's next map; nothing else changes, and locks hold."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import save_tiny_bert
from torch import Tensor

from ragmoe import BundleError, load
from ragmoe.bundle import (
    MAP_NAME,
    BundleMap,
    _files,
    list_experts,
    lock_experts,
    merge_experts,
    prune_experts,
    read_bundle,
    read_map,
    rename_expert,
    show_expert,
    write_bundle,
)
from ragmoe.bundle.write import write_map
from ragmoe.experts import LoraExperts
from ragmoe.models import RagmoeBertForQuestionAnswering

LOAD = {"0": [0.2, 0.3], "1": [0.3, 0.1], "2": [0.5, 0.6]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reader with three experts of each kind, nothing in it zero."""
    folder = tmp_path_factory.mktemp("made")
    dense = save_tiny_bert(folder / "dense")
    made = {}
    for kind in ("lora", "ffn"):
        torch.manual_seed(3)
        rank = {"expert_rank": 8} if kind == "lora" else {}
        model = RagmoeBertForQuestionAnswering.from_dense(
            dense, experts=3, expert_kind=kind, neighbour_width=16, gate_width=8, **rank
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.config.expert_names = ["bank", "clinic", "archive"]
        made[kind] = folder / kind
        model.save_pretrained(made[kind], extra={"load": LOAD})
    return made


@pytest.fixture
def bundle(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["lora"], tmp_path / "bundle"))


@pytest.fixture
def full(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["ffn"], tmp_path / "full"))


def state_of(bundle: Path, **arguments: Any) -> dict[str, Tensor]:
    return read_bundle(bundle, verify=True, **arguments)[0]


def logits(bundle: Path, **arguments: Any) -> Tensor:
    torch.manual_seed(5)
    ids = torch.randint(5, 90, (2, 10))
    with torch.no_grad():
        return load(bundle, **arguments)(input_ids=ids).start_logits


def test_listing_and_showing(bundle: Path) -> None:
    experts = list_experts(bundle)
    assert [(e.id, e.name, e.version, e.locked) for e in experts] == [
        (0, "bank", 1, False),
        (1, "clinic", 1, False),
        (2, "archive", 1, False),
    ]
    state, map_ = read_bundle(bundle)
    one = show_expert(bundle, "clinic")
    assert one == experts[1] == show_expert(bundle, 1) == show_expert(bundle, "1")
    assert one.parameters == sum(state[name][1].numel() for name in map_.fused)
    assert (one.load, one.mean_load) == ([0.3, 0.1], 0.2)
    assert (bundle / one.file).stat().st_size == one.bytes
    assert json.loads(json.dumps(one.as_dict()))["digest"] == map_.digests[one.file]
    assert [step["changed"] for step in one.history] == [map_.lineage[0].changed]
    with pytest.raises(BundleError, match=r"no expert 'bnak'; there are: 0 \(bank\), 1 \(clinic\), 2 \(archive\)"):
        show_expert(bundle, "bnak")


def test_a_name_wins_over_an_id_that_is_written_the_same(bundle: Path) -> None:
    """No command gives such a name now, but a model may be saved with one."""
    map_ = read_map(bundle)
    named = [e.model_copy(update={"name": "2"}) if e.id == 0 else e for e in map_.experts]
    write_map(bundle, map_, map_.model_copy(update={"experts": named}), "name one like an id")
    assert show_expert(bundle, "2").id == 0


def test_renaming_touches_no_tensor(bundle: Path) -> None:
    before = state_of(bundle)
    map_ = rename_expert(bundle, "clinic", "health")
    assert (map_.version, map_.expert_names, map_.expert_ids) == (2, ["bank", "health", "archive"], [0, 1, 2])
    assert map_.digests == read_map(bundle, version=1).digests
    assert map_.lineage[-1].changed == ["expert 1: renamed from clinic to health"]
    assert map_.extra["load"] == LOAD
    assert all(torch.equal(x, before[name]) for name, x in state_of(bundle).items())
    assert load(bundle).expert_names == ["bank", "health", "archive"]
    assert load(bundle, version=1).expert_names == ["bank", "clinic", "archive"]
    assert json.loads((bundle / "config.json").read_text())["expert_names"] == map_.expert_names
    assert [e.history[-1]["message"] for e in list_experts(bundle)][1] == "rename clinic to health"


def test_pruning_leaves_what_the_others_answer_and_the_old_version(bundle: Path) -> None:
    whole, without = logits(bundle), logits(bundle, experts=["bank", "archive"])
    map_ = prune_experts(bundle, ["clinic"])
    assert (map_.expert_ids, map_.next_expert_id) == ([0, 2], 3)
    assert map_.extra["load"] == {"0": LOAD["0"], "2": LOAD["2"]} and map_.extra["config"]["experts"] == 2
    assert map_.lineage[-1].message == "prune clinic"
    assert torch.equal(logits(bundle), without) and not torch.equal(whole, without)
    assert torch.equal(logits(bundle, version=1), whole)
    assert (bundle / "expert.1.1.safetensors").is_file()


def test_neither_reads_what_stays(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def watched(path: Path, **how: Any) -> Any:
        opened.append(Path(path).name)
        return safe_open(path, **how)

    monkeypatch.setattr(_files, "safe_open", watched)
    rename_expert(bundle, "clinic", "health")
    assert opened == []
    (bundle / "expert.0.1.safetensors").write_bytes(b"damaged")
    map_ = prune_experts(bundle, ["bank"])
    # One, for the size of those that went.
    assert opened == ["expert.1.1.safetensors"]
    assert map_.total_size == sum(x.nbytes for x in state_of(bundle).values())


def test_experts_can_be_opened_alone_and_in_any_order(bundle: Path) -> None:
    model = load(bundle, experts=[2, "bank"])
    assert (model.config.experts, model.expert_names, model.config.expert_ids) == (2, ["archive", "bank"], [2, 0])
    assert model.bundle_digests == load(bundle).bundle_digests
    torch.testing.assert_close(logits(bundle, experts=[2, 0]), logits(bundle, experts=[0, 2]))
    (bundle / "expert.1.1.safetensors").unlink()
    load(bundle, experts=[2, 0])
    with pytest.raises(BundleError, match=r"lacks expert\.1\.1\.safetensors"):
        load(bundle)
    with pytest.raises(BundleError, match="no expert was asked for"):
        read_bundle(bundle, experts=[])


def test_merged_full_experts_are_their_weighted_mean(full: Path) -> None:
    before = state_of(full)
    merged = merge_experts(full, "bank", 2, "town")
    w = (0.2 + 0.3) / (0.2 + 0.3 + 0.5 + 0.6)
    assert merged.weights == pytest.approx((w, 1 - w)) and merged.kept == pytest.approx(1.0)
    assert (merged.map.expert_ids, merged.map.expert_names) == ([3, 1], ["town", "clinic"])
    assert (merged.expert.id, merged.map.next_expert_id) == (3, 4)
    assert merged.map.extra["load"] == {"1": LOAD["1"], "3": pytest.approx([0.7, 0.9])}
    after = state_of(full)
    for name in merged.map.fused:
        assert torch.equal(after[name][1], before[name][1])
        want = w * before[name][0] + (1 - w) * before[name][2]
        if name.endswith("balance_bias"):
            want = want - w * math.log(w) - (1 - w) * math.log(1 - w)
        torch.testing.assert_close(after[name][0], want)
    assert load(full).expert_names == ["town", "clinic"]
    assert load(full, version=1).expert_names == ["bank", "clinic", "archive"]


def test_merged_lora_experts_are_the_best_of_their_rank(bundle: Path) -> None:
    """Against the singular value decomposition of the whole mean product."""
    before = state_of(bundle)
    merged = merge_experts(bundle, 0, 1, "both")
    after = state_of(bundle)
    norms = kept = 0.0
    for name in merged.map.fused:
        if not name.endswith("_a"):
            continue
        other = name[:-1] + "b"
        want = sum(w * before[name][at] @ before[other][at] for at, w in enumerate(merged.weights))
        u, s, v = torch.linalg.svd(want)
        best = u[:, :8] * s[:8] @ v[:8]
        torch.testing.assert_close(after[name][0] @ after[other][0], best, atol=1e-4, rtol=1e-3)
        norms, kept = norms + float(s.square().sum()), kept + float(s[:8].square().sum())
    assert 0.5 < merged.kept < 1.0 and merged.kept == pytest.approx(math.sqrt(kept / norms), rel=1e-4)


def test_merging_equals_changes_nothing_and_keeps_all() -> None:
    torch.manual_seed(0)
    one = {"up_a": torch.randn(12, 8), "up_b": torch.randn(8, 16), "down_a": torch.randn(16, 8)}
    one["down_b"] = torch.randn(8, 12)
    merged = LoraExperts.merge([one, one], [0.3, 0.7])
    assert merged.kept == pytest.approx(merged.norm)
    torch.testing.assert_close(merged.tensors["up_a"] @ merged.tensors["up_b"], one["up_a"] @ one["up_b"])
    untrained = {name: torch.zeros_like(x) if name.endswith("_b") else x for name, x in one.items()}
    merged = LoraExperts.merge([untrained, untrained], [0.5, 0.5])
    assert merged.norm == 0.0 and merged.tensors["up_a"].any() and not merged.tensors["up_b"].any()


def test_the_merged_bias_is_the_bound_of_the_logits(full: Path) -> None:
    """Sum of w l plus the entropy is at most log-sum-exp, and equal where w is the softmax of the logits."""
    logits_2 = torch.tensor([0.4, -1.3])
    w_2 = logits_2.softmax(dim=0)
    bound = (w_2 * logits_2).sum() - (w_2 * w_2.log()).sum()
    torch.testing.assert_close(bound, logits_2.logsumexp(dim=0))
    without_load = read_map(full).model_copy(update={"extra": {"config": read_map(full).extra["config"]}})
    (full / MAP_NAME).write_text(without_load.to_json())
    merged = merge_experts(full, 0, 1, "both")
    assert merged.weights == (0.5, 0.5)
    bias = next(x for name, x in state_of(full).items() if name.endswith("balance_bias"))
    torch.testing.assert_close(bias, torch.tensor([math.log(2), 0.0]))


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda b: prune_experts(b, ["bank", "clinic"]), "1 of 3 experts would be left, but each token chooses 2"),
        (lambda b: prune_experts(b, ["mint"]), "there is no expert 'mint'"),
        (lambda b: rename_expert(b, 0, "clinic"), "there is an expert 'clinic' already"),
        (lambda b: rename_expert(b, 0, " "), "the name of an expert is empty"),
        # It would win over the id that is written so.
        (lambda b: rename_expert(b, 0, "2"), "'2' is no name for an expert: commands take numbers for ids"),
        (lambda b: rename_expert(b, 0, "a\nb"), r"'a\\nb' is no name for an expert"),
        (lambda b: merge_experts(b, 0, 1, "7"), "'7' is no name for an expert"),
        (lambda b: merge_experts(b, 0, "bank", "x"), r"are the same expert, 0 \(bank\); expected two"),
        (lambda b: merge_experts(b, 0, 1, "archive"), "there is an expert 'archive' already"),
    ],
)
def test_what_is_refused_changes_nothing(bundle: Path, act: Any, said: str) -> None:
    before = sorted(path.name for path in bundle.rglob("*"))
    with pytest.raises(BundleError, match=said):
        act(bundle)
    assert read_map(bundle).version == 1
    assert sorted(path.name for path in bundle.rglob("*")) == before


@pytest.mark.parametrize(
    "act",
    [
        lambda b: prune_experts(b, [1]),
        lambda b: rename_expert(b, 1, "health"),
        lambda b: merge_experts(b, 0, 1, "both"),
        lambda b: write_over(b, names=["bank", "health", "archive"]),
        lambda b: write_over(b, experts=[0, 2]),
    ],
)
def test_a_locked_expert_stays(bundle: Path, act: Any) -> None:
    lock_experts(bundle, [1])
    with pytest.raises(BundleError, match=r"expert 1 \(clinic\) is locked and cannot"):
        act(bundle)
    assert read_map(bundle).version == 2
    assert prune_experts(bundle, [0]).experts[0].locked


def write_over(bundle: Path, *, experts: list[int] | None = None, names: list[str] | None = None) -> BundleMap:
    state, map_ = read_bundle(bundle, experts=experts)
    return write_bundle(
        bundle,
        state,
        expert_tensors=set(map_.fused),
        gate_tensors=map_.gate_tensors,
        expert_ids=map_.expert_ids,
        expert_names=names or map_.expert_names,
        extra=map_.extra,
    )


def test_a_next_version_refuses_what_is_not_its_parents(bundle: Path) -> None:
    state, parent = read_bundle(bundle)

    def write(changed: str | None = None) -> BundleMap:
        tensors = {name: x + 1 if name == changed else x for name, x in state.items()}
        return write_bundle(
            bundle,
            tensors,
            expert_tensors=set(parent.fused),
            gate_tensors=parent.gate_tensors,
            expert_names=parent.expert_names,
            extra={"note": 1},
            parent=parent,
        )

    before = sorted(path.name for path in bundle.iterdir())
    cases = {"base": "qa_outputs.bias", "gate": min(parent.gate_tensors), "expert": parent.fused[0]}
    for label, changed in cases.items():
        with pytest.raises(BundleError, match=f"{label}.* must stay as it is, but the tensors to be saved differ"):
            write(changed)
    assert sorted(path.name for path in bundle.iterdir()) == before
    assert write().version == 2
    with pytest.raises(BundleError, match="changed by somebody else meanwhile: it has version 2, expected 1"):
        write()


def test_gates_that_were_fitted_to_their_experts_keep_them(made: dict[str, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(made["lora"], tmp_path / "fitted"))
    file = bundle / MAP_NAME
    file.write_text(file.read_text().replace('"retrieval"', '"centroid"'))
    for asked in ([0, 1], [2, 0, 1]):
        with pytest.raises(BundleError, match="its gate 'centroid' needs all as they are: it was fitted"):
            load(bundle, experts=asked)
    for act in (lambda: prune_experts(bundle, [0]), lambda: merge_experts(bundle, 0, 1, "both")):
        with pytest.raises(BundleError, match="fitted to the domains"):
            act()
    assert read_map(bundle).version == 1


def test_an_expert_that_carried_nothing_has_no_say(bundle: Path) -> None:
    map_ = read_map(bundle)
    extra = {**map_.extra, "load": {**LOAD, "0": [0.0, 0.0]}}
    (bundle / MAP_NAME).write_text(map_.model_copy(update={"extra": extra}).to_json())
    assert merge_experts(bundle, 0, 1, "both").weights == (0.0, 1.0)


def test_what_was_measured_is_what_is_pruned(bundle: Path) -> None:
    measured = read_map(bundle)
    rename_expert(bundle, 1, "health")
    with pytest.raises(BundleError, match="changed"):
        prune_experts(bundle, [0], parent=measured)
    assert len(read_map(bundle).experts) == 3


def test_experts_that_all_domains_share_stay_as_many_as_a_token_needs(tmp_path: Path) -> None:
    dense, bundle = save_tiny_bert(tmp_path / "dense"), tmp_path / "bundle"
    names = ["bank", "clinic", "all", "both"]
    model = RagmoeBertForQuestionAnswering.from_dense(
        dense, experts=4, top_k=2, gate="oracle", common_experts=2, expert_names=names, neighbour_width=16, gate_width=8
    )
    model.save_pretrained(bundle)
    with pytest.raises(BundleError, match="all: all domains share it; expected two"):
        merge_experts(bundle, "bank", "all", "one")
    prune_experts(bundle, ["all"])
    assert load(bundle).config.common_experts == 1
    before = (bundle / MAP_NAME).read_bytes()
    with pytest.raises(BundleError, match="of which 0 would be left; they are both"):
        prune_experts(bundle, ["both"])
    assert (bundle / MAP_NAME).read_bytes() == before
    assert load(bundle).expert_names == ["bank", "clinic", "both"]


def test_thresholds_go_with_their_experts(bundle: Path) -> None:
    reader = load(bundle)
    reader.config.expert_thresholds = [2.0, None, -1.0]
    reader.save_pretrained(bundle, extra={"load": LOAD})
    assert [e.no_answer_threshold for e in list_experts(bundle)] == [2.0, None, -1.0]
    merge_experts(bundle, "bank", "archive", "town")
    weight = sum(LOAD["0"]) / (sum(LOAD["0"]) + sum(LOAD["2"]))
    assert show_expert(bundle, "town").no_answer_threshold == pytest.approx(3 * weight - 1)
    assert load(bundle).config.expert_thresholds == [pytest.approx(3 * weight - 1), None]
    # The copy for other tools says so too.
    assert json.loads((bundle / "config.json").read_text())["expert_thresholds"][1] is None
    assert len(json.loads((bundle / "config.json").read_text())["expert_thresholds"]) == 2
    assert load(bundle, version=2).config.expert_thresholds == [2.0, None, -1.0]


def test_one_threshold_does_not_speak_for_two(bundle: Path) -> None:
    reader = load(bundle)
    reader.config.expert_thresholds = [2.0, None, None]
    reader.save_pretrained(bundle)
    merge_experts(bundle, "bank", "clinic", "town")
    assert load(bundle).config.expert_thresholds is None


def test_a_model_saved_over_its_bundle_leaves_what_that_records(bundle: Path, tmp_path: Path) -> None:
    map_ = read_map(bundle)
    certified = map_.model_copy(update={"extra": {**map_.extra, "certificates": {"1": {"name": "clinic"}}}})
    (bundle / MAP_NAME).write_text(certified.to_json())
    reader = load(bundle)
    with torch.no_grad():
        reader.moe_layers[0].experts.up_b[2] += 1.0
    reader.save_pretrained(bundle)
    assert read_map(bundle).version == 2
    assert [e.load for e in list_experts(bundle)] == [LOAD["0"], LOAD["1"], LOAD["2"]]
    assert show_expert(bundle, "clinic").certificate == {"name": "clinic"}
    # New figures replace the old ones, and elsewhere they would be another's.
    reader.save_pretrained(bundle, extra={"load": {"0": [1.0, 1.0]}})
    assert [e.load for e in list_experts(bundle)] == [[1.0, 1.0], None, None]
    reader.save_pretrained(tmp_path / "elsewhere")
    assert [e.load for e in list_experts(tmp_path / "elsewhere")] == [None, None, None]
    other = RagmoeBertForQuestionAnswering(reader.config)
    other.save_pretrained(bundle)
    assert [e.load for e in list_experts(bundle)] == [None, None, None]
