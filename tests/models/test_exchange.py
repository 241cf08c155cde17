"""A gate is exchanged, the experts stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Make, some_neighbours, tokens

from ragmoe import ConfigError, ModelError, load
from ragmoe.models.exchange import exchange_gate
from ragmoe.models.growth import grow, settle
from ragmoe.training.trainer import part_of


def test_a_retrieval_gate_in_a_token_gates_place_is_that_gate_at_first(make: Make) -> None:
    model = make(gate="token")
    exchanged = exchange_gate(model, gate="retrieval")
    inputs = tokens()
    before, after = model(**inputs), exchanged(**inputs, **some_neighbours(2).tensors())
    assert torch.equal(before.start_logits, after.start_logits)
    assert torch.equal(before.end_logits, after.end_logits)
    assert (model.config.gate, exchanged.config.gate) == ("token", "retrieval")
    assert exchanged.tokenizer is model.tokenizer


def test_a_reader_without_a_tokenizer_is_changed_all_the_same(make: Make) -> None:
    model = make(gate="token", expert_names=["law", "bank", "city", "all"])
    model.tokenizer = None
    model.hold_back(["bank"])
    rows = {name: model.state_dict()[name][0] for name in model.expert_tensors()}
    for changed in (exchange_gate(model, gate="retrieval"), settle(grow(model, rows, id=4, name="port"))):
        assert changed.held_back == [1]
        with pytest.raises(ModelError, match="the model has no tokenizer"):
            assert changed.tokenizer


@pytest.mark.parametrize(
    "settings",
    [{}, {"capacity_factor": 1.0}, {"capacity_factor": 1.0, "overflow": "next"}, {"selection": "expert_choice"}],
)
def test_an_expert_that_is_held_back_takes_no_share(make: Make, settings: dict[str, Any]) -> None:
    model = make(gate="token", expert_names=["law", "bank", "city", "all"], **settings)
    rows = {name: model.state_dict()[name][0] for name in model.expert_tensors()}
    # Experts that choose take no new one; here it is only grown so that it can be held back.
    selection, model.config.selection = model.config.selection, "top_k"
    grown = grow(model, rows, id=4, name="port")
    grown.config.selection = selection
    grown = settle(grown)
    grown.hold_back(["port"])
    inputs = tokens()
    before, after = model(**inputs), grown(**inputs)
    assert torch.equal(before.start_logits, after.start_logits)
    # It is there, for all that.
    grown.hold_back([])
    assert not torch.equal(before.start_logits, grown(**inputs).start_logits)


def test_experts_that_choose_take_no_new_one(make: Make) -> None:
    with pytest.raises(ModelError, match=r"experts choose their tokens \(expert_choice\): a new one would take its"):
        grow(make(gate="token", selection="expert_choice"), {}, id=4, name="port")


def test_everything_but_the_gate_is_kept(make: Make) -> None:
    model = make(gate="oracle", top_k=1)
    kept, state = exchange_gate(model, gate="token", top_k=2).state_dict(), model.state_dict()
    own = [name for name in kept if part_of(name) != "gate"]
    assert own == [name for name in state if part_of(name) != "gate"]
    assert all(torch.equal(kept[name], state[name]) for name in own)
    assert [name for name in kept if name.endswith("gate.token.weight")]


def test_what_is_new_depends_on_the_seed_alone(make: Make) -> None:
    model = make(gate="token")
    first, again, other = (exchange_gate(model, gate="retrieval", seed=seed).state_dict() for seed in (0, 0, 1))
    drawn = [name for name in first if name not in model.state_dict() and first[name].any()]
    assert drawn
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in drawn)


def test_votes_begin_again_where_that_is_asked(make: Make) -> None:
    model = make(gate="memory")
    scales = [layer.gate.vote_scale.item() for layer in model.moe_layers]
    assert [layer.gate.vote_scale.item() for layer in exchange_gate(model, top_k=1).moe_layers] == scales
    begun = exchange_gate(model, vote_start=4.0)
    assert [layer.gate.vote_scale.item() for layer in begun.moe_layers] == [pytest.approx(0.4)] * len(scales)


def test_what_is_no_setting_of_a_gate_is_refused(make: Make) -> None:
    with pytest.raises(ModelError, match="'experts' is not the gate's alone; an exchange may set common_"):
        exchange_gate(make(gate="token"), experts=8)
    with pytest.raises(ConfigError, match="no gate 'tokn'"):
        exchange_gate(make(gate="token"), gate="tokn")
    with pytest.raises(ModelError, match="dense: it has no gate to exchange"):
        exchange_gate(make(sparse_layers=[]), gate="token")


def test_experts_that_are_not_in_memory_are_no_ground_to_build_on(make: Make, tmp_path: Path) -> None:
    model = make(gate="token", experts=4)
    model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be given another gate"):
        exchange_gate(load(tmp_path, resident_experts=2), gate="retrieval")


def test_experts_that_are_held_back_stay_so(make: Make) -> None:
    model = make(gate="token", experts=4)
    model.set_available_experts([0, 1, 3])
    assert exchange_gate(model, gate="retrieval").held_back == [2]
