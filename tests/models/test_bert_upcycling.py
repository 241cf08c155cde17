"""Upcycling: at step 0 the sparse model is the dense one; what cannot be built says why."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_bert
from tiny_models import LABELS, Make, some_neighbours, tokens
from transformers import BertModel, DistilBertConfig

from ragmoe import ConfigError, ModelError, Neighbours
from ragmoe.gates import Gate, register_gate
from ragmoe.gates.base import _GATES
from ragmoe.models import RagmoeBertForQuestionAnswering
from ragmoe.models.upcycling import base_path


def states(model: RagmoeBertForQuestionAnswering, inputs: dict, neighbours: Neighbours | None = None) -> torch.Tensor:
    named = neighbours.tensors() if neighbours is not None else {}
    return model(**inputs, **named, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("gate", ["token", "retrieval", "pooled"])
@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({"expert_kind": "lora"}, True),
        ({"expert_kind": "lora", "top_k": 1}, True),
        ({"expert_kind": "ffn"}, False),
        ({"expert_kind": "ffn", "top_k": 1}, False),
        ({"expert_kind": "ffn", "shared_expert": True}, True),
        ({"sparse_layers": []}, True),
        ({"sparse_layers": [0, 3]}, True),
    ],
)
def test_equals_the_dense_model(make: Make, dense_folder: Path, gate: str, settings: dict, exact: bool) -> None:
    inputs = tokens()
    dense = BertModel.from_pretrained(dense_folder, add_pooling_layer=False).eval()
    want = dense(**inputs, output_hidden_states=True).hidden_states
    model = make(trained=False, gate=gate, **settings)
    found = model(**inputs, **some_neighbours(2).tensors(), output_hidden_states=True).hidden_states
    assert len(found) == len(want) == 5
    for got, reference in zip(found, want, strict=True):
        assert torch.equal(got, reference) if exact else torch.allclose(got, reference, atol=1e-5)


def test_the_gate_of_a_single_full_expert_learns(make: Make) -> None:
    """What is chosen counts whole, so that the upcycled model is the dense one; the gradient is that of log p."""
    model = make(trained=False, expert_kind="ffn", top_k=1, expert_noise=0.1, balance_loss=0.0, z_loss=0.0)
    output = model(**tokens(), **LABELS)
    for routing in output.routings:
        assert torch.equal(routing.weights_SK, torch.ones_like(routing.weights_SK))
    output.loss.backward()
    for layer in model.moe_layers:
        assert layer.gate.token.weight.grad.abs().max() > 1e-6


def test_a_null_setting_counts_as_not_given(make: Make) -> None:
    model = make(trained=False, expert_kind="ffn", expert_rank=None, sparse_layers=None)
    assert model.config.expert_rank == 16 and model.sparse_layers == [1, 3]


def test_which_layers_are_sparse(make: Make) -> None:
    model = make(trained=False)
    assert model.sparse_layers == [1, 3] and len(model.moe_layers) == 2
    assert make(trained=False, sparse_layers=[2, 0, 2]).sparse_layers == [0, 2]
    dense = make(trained=False, sparse_layers=[])
    assert dense.moe_layers == [] and not dense.gate_sees_neighbours
    output = dense(**tokens(), **some_neighbours(2).tensors())
    assert output.routings == () and output.balance_loss is None


def test_full_experts_take_the_place_of_the_dense_network(make: Make) -> None:
    names = set(make(trained=False, expert_kind="ffn").state_dict())
    assert "bert.encoder.layer.1.moe.experts.fused.up_proj" in names
    assert "bert.encoder.layer.1.intermediate.dense.weight" not in names
    assert "bert.encoder.layer.0.intermediate.dense.weight" in names
    shared = set(make(trained=False, expert_kind="ffn", shared_expert=True).state_dict())
    assert "bert.encoder.layer.1.intermediate.dense.weight" in shared


def test_experts_run_through_the_chosen_kernel(make: Make) -> None:
    model, inputs = make(expert_kind="ffn"), tokens()
    assert model.config._experts_implementation == "auto"
    want = states(model, inputs)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert model.moe_layers[0].experts.fused.config._experts_implementation == implementation
        assert torch.allclose(states(model, inputs), want, atol=1e-5)


def test_noise_deviates_and_is_reported(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ragmoe"):
        noisy, clean = (make(trained=False, expert_kind="ffn", expert_noise=noise) for noise in (0.05, 0.0))
    assert [record.getMessage().split(" by up to ")[0] for record in caplog.records] == [
        "expert copies differ from the dense weights"
    ]
    deviation = (noisy.moe_layers[0].experts.fused.up_proj - clean.moe_layers[0].experts.fused.up_proj).abs().max()
    assert 0 < deviation.item() <= float(caplog.records[0].getMessage().split(" by up to ")[1]) * 1.01
    assert not torch.allclose(states(noisy, inputs := tokens()), states(clean, inputs), atol=1e-4)


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_one_alone(dense_folder: Path) -> None:
    def build(seed: int) -> dict[str, torch.Tensor]:
        return RagmoeBertForQuestionAnswering.from_dense(dense_folder, seed=seed, experts=4).state_dict()

    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    first = build(1)
    assert torch.equal(torch.rand(1), want)
    second, other = build(1), build(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    gate = "bert.encoder.layer.1.moe.gate.token.weight"
    assert not torch.equal(first[gate], other[gate])


def test_from_a_dense_reader_its_head_stays(make: Make) -> None:
    dense, inputs = make(sparse_layers=[]), tokens()
    model = RagmoeBertForQuestionAnswering.from_dense(dense, experts=4, gate="retrieval").eval()
    assert model.sparse_layers == [1, 3]
    got, want = model(**inputs), dense(**inputs)
    assert torch.equal(got.start_logits, want.start_logits) and torch.equal(got.end_logits, want.end_logits)
    with pytest.raises(ModelError, match=r"layers \[1, 3\] of the base are sparse already"):
        RagmoeBertForQuestionAnswering.from_dense(model)


def test_active_parameters(make: Make) -> None:
    model = make(trained=False, expert_kind="lora", top_k=1)
    counts = model.parameter_counts()
    experts = 2 * 4 * 8 * (32 + 64) * 2
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["total"] - counts["active"] == experts * 3 // 4


def test_a_gate_of_ones_own_works_by_name(make: Make) -> None:
    @register_gate("alternating")
    class AlternatingGate(Gate):
        def logits(self, x_SD: torch.Tensor, neighbours: Neighbours | None) -> torch.Tensor:
            E = self.settings.experts
            return torch.eye(E).repeat(x_SD.shape[0] // E + 1, 1)[: x_SD.shape[0]].to(x_SD)

    try:
        routing = make(gate="alternating", top_k=1)(**tokens()).routings[0]
    finally:
        del _GATES["alternating"]
    assert routing.experts_SK[:8, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_held_back_experts_get_nothing(make: Make) -> None:
    model, inputs = make(), tokens()
    model.set_available_experts([0, 2])
    output = model(**inputs, **some_neighbours(2).tensors())
    for routing in output.routings:
        assert set(routing.experts_SK.flatten().tolist()) == {0, 2}
    model.set_available_experts(None)
    assert len({e for r in model(**inputs).routings for e in r.experts_SK.flatten().tolist()}) > 2
    with pytest.raises(ModelError, match=r"no experts \[4\]; the experts are 0 to 3"):
        model.set_available_experts([1, 4])


def test_without_any_expert_the_reader_is_the_dense_one(make: Make, dense_folder: Path) -> None:
    model, inputs = make(trained=False).train(), tokens()
    with torch.no_grad():
        for layer in model.moe_layers:
            for parameter in layer.parameters():
                parameter.copy_(torch.randn_like(parameter))
    model.set_available_experts([])
    dense = BertModel.from_pretrained(dense_folder, add_pooling_layer=False)
    assert torch.equal(states(model, inputs), dense(**inputs).last_hidden_state)
    labels = {"start_positions": torch.zeros(2, 2).long(), "end_positions": torch.zeros(2, 2).long()}
    loss = model(**inputs, **labels, **some_neighbours(2).tensors()).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_cannot_be_built(make: Make, dense_folder: Path, tmp_path: Path) -> None:
    DistilBertConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="is a 'distilbert' model; expected a model of type 'bert'"):
        RagmoeBertForQuestionAnswering.from_dense(tmp_path / "other")
    with pytest.raises(ModelError, match=r"nowhere is not a checkpoint"):
        RagmoeBertForQuestionAnswering.from_dense(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"unknown model settings expertz; there are: .*expert_kind, expert_names"):
        make(expertz=4)
    with pytest.raises(ModelError, match=r"sparse_layers has \[7\], but the layers are 0 to 3"):
        make(sparse_layers=[1, 7])
    with pytest.raises(ModelError, match=r"expert_names is \['law'\]: expected 4 different names"):
        make(expert_names=["law"])
    with pytest.raises(ConfigError, match=r"no gate 'tokn'; there are: .*pooled, .*token"):
        make(gate="tokn")
    with pytest.raises(ConfigError, match="no expert kind 'full'"):
        make(expert_kind="full")
    with pytest.raises(ModelError, match="shared_expert is true, but 'lora' experts always stand beside") as error:
        make(expert_kind="lora", shared_expert=True)
    assert "set expert_kind: ffn" in str(error.value)
    with pytest.raises(ModelError, match="expert_rank is 8, but 'ffn' experts have no rank") as error:
        make(expert_kind="ffn", expert_rank=8)
    assert "model.expert_rank: null" in str(error.value)
    with pytest.raises(ModelError, match=r"vote_start is 2\.0, but the gate 'retrieval' counts no votes"):
        make(gate="retrieval", vote_start=2.0)
    with pytest.raises(ModelError, match="common_experts is 1, but the gate 'token' knows no domains"):
        make(gate="token", common_experts=1)
    with pytest.raises(ConfigError, match="top_k is 5: expected 1 to 4"):
        make(top_k=5)


def test_a_checkpoint_that_lacks_weights(dense_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(dense_folder / "model.safetensors")
    del tensors["encoder.layer.2.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((dense_folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"lacks 1 weights of its encoder: \['encoder.layer.2.output.dense.weight'\]"):
        RagmoeBertForQuestionAnswering.from_dense(tmp_path)


@pytest.mark.parametrize("base", ["runs/lama", "./lama", "runs/more/lama", "~/lama", "{}/runs/lama"])
def test_a_folder_that_is_not_there_is_not_asked_for_elsewhere(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_bert(tmp_path / "runs" / "llama")
    monkeypatch.chdir(tmp_path)
    base = base.format(tmp_path)
    with pytest.raises(ModelError, match=f"there is no folder {base}") as told:
        base_path(base)
    assert ("checkpoints in" in told.value.hint and "llama" in told.value.hint) == ("runs" in base)
    assert base_path("runs/llama") == "runs/llama" and base_path("owner/llama") == "owner/llama"
