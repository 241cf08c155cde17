"""Experts for keys and values: nothing at step 0, right afterwards, and part of the expert's own file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import LABELS, Make, some_neighbours, tokens

from ragmoe import ConfigError, ModelError
from ragmoe.bundle import merge_experts, prune_experts
from ragmoe.models import RagmoeBertForQuestionAnswering, load


@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_at_step_0_it_is_the_dense_attention(make: Make, kind: str) -> None:
    settings = {"gate": "token", "expert_kind": kind, "trained": False}
    plain, routed = make(**settings), make(**settings, moe_attention=True)
    for name, x in plain.state_dict().items():
        if ".gate." in name or "outputs" in name:
            routed.get_parameter(name).data.copy_(x) if name in dict(routed.named_parameters()) else None
    inputs = tokens()
    # The gate sees the layer's input and not what attention makes of it, so full experts, all alike, tell nothing.
    assert torch.allclose(routed(**inputs).start_logits, plain(**inputs).start_logits, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keys_and_values_against_one_token_at_a_time(make: Make, implementation: str) -> None:
    model = make(gate="token", moe_attention=True)
    model.set_attn_implementation(implementation)
    layer = model.bert.encoder.layer[model.sparse_layers[0]]
    x_QTD = torch.randn(2, 5, model.config.hidden_size)
    routing, added = layer.moe.route(x_QTD), layer.moe.experts.key_value
    want = torch.stack(
        [
            sum(w * (x_D @ added.a[e] @ added.b[e]) for e, w in zip(experts, weights, strict=True))
            for x_D, experts, weights in zip(
                x_QTD.view(10, -1), routing.experts_SK.tolist(), routing.weights_SK, strict=True
            )
        ]
    ).view(2, 5, -1)
    attention = layer.attention.self
    assert torch.allclose(layer.moe.key_values(x_QTD, routing), want, atol=1e-5)
    got, _ = attention(x_QTD, None, key_values=want)
    D, H = x_QTD.shape[-1], attention.num_attention_heads
    q, k, v = attention.query(x_QTD), attention.key(x_QTD) + want[..., :D], attention.value(x_QTD) + want[..., D:]
    for h in range(H):
        own = slice(h * D // H, (h + 1) * D // H)
        scores = q[..., own] @ k[..., own].transpose(1, 2) / (D // H) ** 0.5
        assert torch.allclose(got[..., own], scores.softmax(dim=-1) @ v[..., own], atol=1e-5)


def test_gradients_reach_the_experts_of_attention(make: Make) -> None:
    model = make(gate="retrieval", moe_attention=True).train()
    model(**tokens(), **some_neighbours(2).tensors(), **LABELS).loss.backward()
    for layer in model.moe_layers:
        assert layer.experts.key_value.a.grad.abs().sum() > 0 and layer.experts.key_value.b.grad.abs().sum() > 0


def test_they_belong_to_the_experts_file(make: Make, tmp_path: Path) -> None:
    model: RagmoeBertForQuestionAnswering = make(
        gate="token", moe_attention=True, expert_names=["a", "b", "c", "d"], top_k=1
    )
    model.save_pretrained(tmp_path)
    assert any(name.endswith("moe.experts.key_value.b") for name in model.expert_tensors())
    a, b = (layer.experts.key_value.a[1] @ layer.experts.key_value.b[1] for layer in model.moe_layers[:2])
    prune_experts(tmp_path, ["a"])
    pruned = load(tmp_path)
    for layer, want in zip(pruned.moe_layers, (a, b), strict=False):
        assert torch.equal(layer.experts.key_value.a[0] @ layer.experts.key_value.b[0], want)
    merge_experts(tmp_path, "b", "c", name="bc")
    merged = load(tmp_path).moe_layers[0].experts.key_value
    products = [layer.a[i] @ layer.b[i] for layer in [pruned.moe_layers[0].experts.key_value] for i in (0, 1)]
    u, s, v = torch.linalg.svd((products[0] + products[1]) / 2)
    rank = merged.a.shape[-1]
    assert torch.allclose(merged.a[0] @ merged.b[0], u[:, :rank] * s[:rank] @ v[:rank], atol=1e-4)


def test_gated_experts_cannot_start_from_bert(make: Make) -> None:
    with pytest.raises(ConfigError, match="expert_kind is 'glu', but the base's feed-forward networks have no gate"):
        make(expert_kind="glu")


def test_they_cannot_be_brought_in_on_demand(make: Make, tmp_path: Path) -> None:
    make(gate="token", moe_attention=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"add to keys and values of attention \(moe_attention\)"):
        load(tmp_path, resident_experts=2)


def test_the_context_loss_judges_the_states_that_are_routed(make: Make) -> None:
    """The gate sees the layer's input, before attention; what it would choose is compared on the same."""
    model = make(gate="retrieval", moe_attention=True, losses={"context": 0.1}, token_dropout=0.0).train()
    output = model(**tokens(), **some_neighbours(2).tensors(), **LABELS)
    for routing in output.routings:
        own_SE = routing.probe.swapped.own_SE
        assert torch.allclose(own_SE, routing.logits_SE, atol=1e-5)
