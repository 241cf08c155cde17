"""An expert that holds NaN: found, named, and held back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import Make, some_neighbours, tokens

from ragmoe import ModelError, Passage
from ragmoe.models import RagmoeBertForQuestionAnswering, broken_experts, load

NAMES = ["wiki", "legal", "finance", "common"]
PASSAGE = Passage(id="p", text="the river is open")


@pytest.fixture(params=["lora", "ffn"])
def broken(request: pytest.FixtureRequest, make: Make) -> RagmoeBertForQuestionAnswering:
    """Its third expert is broken in the second sparse layer."""
    model = make(experts=4, expert_names=NAMES, expert_kind=request.param, gate="token", top_k=4)
    tensor = next(p for name, p in model.moe_layers[1].experts.named_parameters() if "down" in name and p.dim() == 3)
    with torch.no_grad():
        tensor[2, 0, 0] = float("nan")
    return model


def test_it_is_found_by_its_tensor(broken: RagmoeBertForQuestionAnswering) -> None:
    (found,) = broken_experts(broken)
    assert (found.expert, found.name) == (2, "finance")
    assert len(found.tensors) == 1 and ".moe.experts." in found.tensors[0] and "down" in found.tensors[0]


def test_a_broken_gate_row_is_its_experts(make: Make) -> None:
    model = make(experts=4, expert_names=NAMES)
    with torch.no_grad():
        model.moe_layers[0].gate.balance_bias[1] = float("inf")
        model.moe_layers[1].gate.token.weight[3, 0] = float("nan")
    assert [(found.name, len(found.tensors)) for found in broken_experts(model)] == [("legal", 1), ("common", 1)]
    assert broken_experts(make(experts=4)) == []


def test_reading_names_it_and_goes_on_without_it(broken: RagmoeBertForQuestionAnswering) -> None:
    with pytest.raises(ModelError, match=r"expert finance holds NaN or infinity in .*down") as caught:
        broken.read(["what is open"], [[PASSAGE]])
    assert "--without finance" in caught.value.hint and "hold_back(['finance'])" in caught.value.hint
    with torch.no_grad():
        broken.moe_layers[1].gate.token.weight[2, 0] = float("nan")
    with pytest.raises(ModelError, match=r"expert finance holds NaN"):
        broken.route("what is open", [PASSAGE])
    broken.hold_back(["finance"])
    assert broken.route("what is open", [PASSAGE])[:, [0, 1, 3]].all()
    assert broken.held_back == [2]
    assert broken.read(["what is open"], [[PASSAGE]])[0].score > 0
    broken.hold_back([])
    assert broken.held_back == []


def test_a_dense_model_has_no_expert_to_hold_back(make: Make) -> None:
    dense = make(sparse_layers=[])
    dense.hold_back([])
    with pytest.raises(ModelError, match="has no sparse layer, and so no expert"):
        dense.hold_back(["expert 1"])


@pytest.mark.parametrize("start_or_end", [0, 1])
def test_nan_elsewhere_is_no_experts_fault(make: Make, start_or_end: int) -> None:
    model = make(experts=4)
    with torch.no_grad():
        model.qa_outputs.weight[start_or_end, 0] = float("nan")
    with pytest.raises(ModelError, match="all of its experts hold numbers"):
        model.read(["what is open"], [[PASSAGE]])


def test_held_back_experts_get_no_token(make: Make, tmp_path: Path) -> None:
    make(experts=4, expert_names=NAMES, expert_ids=[0, 3, 4, 7]).save_pretrained(tmp_path)
    inputs = tokens() | some_neighbours(2).tensors()
    for without, places in ((["legal", "7"], [1, 3]), ([0], [0]), (["3"], [1])):
        model = load(tmp_path, without=without)
        assert model.held_back == places
        for routing in model(**inputs).routings:
            assert not torch.isin(routing.experts_SK, torch.tensor(places)).any()
    with pytest.raises(ModelError, match="there is no expert 'sports'; there are: wiki, legal, finance, common"):
        load(tmp_path, without=["sports"])


def test_an_expert_in_its_file_is_named_as_one_in_memory(
    broken: RagmoeBertForQuestionAnswering, tmp_path: Path
) -> None:
    broken.save_pretrained(tmp_path)
    broken.tokenizer.save_pretrained(tmp_path)
    small = load(tmp_path, resident_experts=1)
    assert broken_experts(small) == broken_experts(broken)
    with pytest.raises(ModelError, match="expert finance holds NaN"):
        small.read(["what is open"], [[PASSAGE]])
