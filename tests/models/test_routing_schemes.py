"""Gates, selections, scores and capacity in a whole reader: padding, checkpointing, saving, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LABELS, Make, some_neighbours, tokens

from ragmoe import ModelError
from ragmoe.models import load
from ragmoe.models.exchange import exchange_gate

SCHEMES: list[dict[str, Any]] = [
    {"gate": "mlp"},
    {"gate": "task"},
    {"gate": "softmax", "top_k": 4},
    {"gate": "hierarchical", "expert_groups": 2, "top_k": 1},
    {"gate": "modality", "expert_types": [0, 0, 1, -1]},
    {"gate": "retrieval", "selection": "noisy_top_k"},
    {"gate": "retrieval", "selection": "expert_choice"},
    {"gate": "token", "scores": "sigmoid", "weight_scale": 2.0, "gate_jitter": 0.1},
    {"gate": "token", "capacity_factor": 0.5, "overflow": "next", "overflow_priority": "probability"},
    {"gate": "token", "capacity_factor": 0.5, "overflow": "shared", "overflow_priority": "random"},
    {"gate": "token", "capacity_factor": 0.5, "overflow": "drop", "expert_kind": "ffn"},
    {"gate": "pooled", "selection": "expert_choice", "expert_kind": "ffn"},
    {"gate": "retrieval", "moe_attention": True},
    {"gate": "token", "moe_attention": True, "expert_kind": "ffn", "capacity_factor": 0.5, "expert_rank": 8},
]


@pytest.fixture(params=SCHEMES, ids=lambda scheme: "-".join(str(v) for v in scheme.values()))
def scheme(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"experts": 4, **request.param}


def step(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step with fixed noise."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**inputs, **LABELS).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_changes_nothing(make: Make, scheme: dict[str, Any]) -> None:
    """Noise, lots and limits are the same when a layer is computed again."""
    model, inputs = make(**scheme), tokens() | some_neighbours(2).tensors()
    loss, gradients = step(model, inputs)
    model.activation_checkpointing_enable()
    again, again_gradients = step(model, inputs)
    assert torch.equal(loss, again) and gradients.keys() == again_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, again_gradients[name], atol=1e-7), name


def test_padding_changes_nothing(make: Make, scheme: dict[str, Any]) -> None:
    model, inputs = make(**scheme).eval(), tokens()
    wider = {name: torch.nn.functional.pad(x, (0, 5)) for name, x in inputs.items()}
    context_mask = inputs["attention_mask"] * inputs["token_type_ids"]
    inputs |= {"context_mask": context_mask}
    wider |= {"context_mask": torch.nn.functional.pad(context_mask, (0, 5))}
    with torch.no_grad():
        a, b = model(**inputs), model(**wider)
    assert torch.allclose(a.start_logits, b.start_logits[:, :16], atol=1e-5)
    assert torch.allclose(a.balance_loss, b.balance_loss, atol=1e-5)


def test_a_reader_is_the_same_after_saving(make: Make, scheme: dict[str, Any], tmp_path: Path) -> None:
    model = make(**scheme)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    again, inputs = load(tmp_path), tokens() | some_neighbours(2).tensors()
    for one, two in ((model.eval(), again.eval()), (model.train(), again.train())):
        torch.manual_seed(5)
        want = one(**inputs).start_logits
        torch.manual_seed(5)
        assert torch.equal(two(**inputs).start_logits, want)


def test_a_selection_is_exchanged_like_a_gate(make: Make) -> None:
    model = make(gate="token", experts=4)
    noisy = exchange_gate(model, selection="noisy_top_k", scores="sigmoid")
    assert torch.equal(noisy.moe_layers[0].gate.token.weight, model.moe_layers[0].gate.token.weight)
    assert noisy.config.selection == "noisy_top_k" and noisy.config.scores == "sigmoid"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "token", "expert_groups": 2}, "expert_groups is 2, but the gate 'token' knows no groups"),
        ({"gate": "token", "expert_types": [0] * 4}, "but the gate 'token' knows no types of tokens"),
        ({"overflow": "next"}, "overflow is 'next', but capacity_factor is not set"),
        ({"overflow_priority": "random"}, "overflow_priority is 'random', but capacity_factor is not set"),
        (
            {"expert_kind": "ffn", "capacity_factor": 1.0, "overflow": "shared"},
            "overflow is 'shared', but no dense network stands beside 'ffn' experts",
        ),
        (
            {"expert_kind": "ffn", "shared_expert": True, "capacity_factor": 1.0},
            "overflow is 'drop', but the shared expert answers every token",
        ),
    ],
)
def test_settings_that_contradict_each_other(make: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make(**{"experts": 4, **settings})
