"""The further routing losses of a reader: added with their weights, computed only while learning and when asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import LABELS, Make, some_neighbours, tokens
from torch import Tensor

from ragmoe import ConfigError, ModelError
from ragmoe.models import RagmoeBertForQuestionAnswering
from ragmoe.moe import StepTotals, routing_loss
from ragmoe.moe.losses import loss_inputs

ALL = {"gshard": 0.5, "importance": 0.25, "uniform": 2, "domain": 0.125, "diversity": 0.75, "context": 1.5}
NAMES = ["river", "market", "harbour", "mill"]


def batch() -> dict[str, Tensor]:
    return {**tokens(), **LABELS, **some_neighbours(2).tensors(), "question_domain": torch.tensor([1, 3])}


def gradients(model: RagmoeBertForQuestionAnswering, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: x for name, x in zip(names, found, strict=True) if x is not None}


def test_they_are_means_over_layers_and_add_up(make: Make) -> None:
    model, inputs = make(losses=ALL, expert_names=NAMES).train(), batch()
    output = model(**inputs)
    mask_S = inputs["attention_mask"].flatten().bool()
    of_layers = loss_inputs(output.routings, mask_S, inputs["question_domain"])
    assert len(of_layers) == 2 and of_layers[0].domain_S.tolist() == [1] * 24 + [3] * 24
    assert sorted(output.further_losses) == sorted(ALL)
    total = output.answer_loss + 0.01 * output.balance_loss + 0.001 * output.z_loss
    for name, weight in ALL.items():
        want = torch.stack([routing_loss(name)(x) for x in of_layers]).mean()
        assert want > 0 and torch.equal(output.further_losses[name], want)
        total = total + weight * want
    torch.testing.assert_close(output.loss, total)
    assert any(
        x.any() for name, x in gradients(model, output.further_losses["context"]).items() if ".moe.gate." in name
    )


def test_without_them_nothing_changes(make: Make) -> None:
    torch.manual_seed(3)
    plain = make().train()
    torch.manual_seed(3)
    zero = make(losses=dict.fromkeys(ALL, 0.0), expert_names=NAMES).train()
    inputs = batch()
    a, b = plain(**inputs), zero(**inputs)
    assert a.further_losses is None and len(b.further_losses) == len(ALL)
    assert torch.equal(a.loss, b.loss)
    found = gradients(zero, b.loss)
    for name, x in gradients(plain, a.loss).items():
        assert torch.equal(x, found[name]), name


def counted(model: RagmoeBertForQuestionAnswering, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """How often gates gave logits and experts answered in one forward pass."""
    calls = {"gates": 0, "experts": 0}

    def count(key: str, call: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[key] += 1
            return call(*args, **kwargs)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        for layer in model.moe_layers:
            patch.setattr(layer.gate, "logits", count("gates", layer.gate.logits))
            patch.setattr(layer.experts, "forward", count("experts", layer.experts.forward))
        model(**inputs)
    return calls["gates"], calls["experts"]


def test_nothing_is_computed_that_no_loss_asks_for(make: Make) -> None:
    inputs = batch()
    unlabelled = {name: x for name, x in inputs.items() if name not in LABELS}
    for losses, want in (({"gshard": 1.0}, (2, 2)), ({"context": 1.0}, (6, 2)), ({"diversity": 0}, (2, 4))):
        model = make(losses=losses).train()
        assert counted(model, inputs) == want
        assert counted(model, unlabelled) == (2, 2)
        output = model.eval()(**inputs)
        assert counted(model, inputs) == (2, 2) and output.further_losses is None
        torch.testing.assert_close(output.loss, output.answer_loss + 0.01 * output.balance_loss + 0.001 * output.z_loss)


def test_recomputation_changes_nothing(make: Make) -> None:
    model, inputs = make(losses=ALL, expert_names=NAMES).train(), batch()
    want = gradients(model, model(**inputs).loss)
    model.activation_checkpointing_enable()
    got = gradients(model, model(**inputs).loss)
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, atol=1e-6, rtol=1e-4, msg=name)


def test_the_totals_of_a_step_reach_every_layer(make: Make) -> None:
    """Two micro-batches that are told of each other are half of the whole each, gradients included."""
    model, whole = make(losses={"gshard": 1.0, "domain": 1.0}, expert_names=NAMES, balance_loss=1.0).train(), batch()
    want = model(**whole)
    halves = [{name: x.chunk(2)[at] if len(x) in (2, 4) else x for name, x in whole.items()} for at in range(2)]
    names = ("load_balance", "gshard", "domain")
    mask_S = whole["attention_mask"].flatten().bool()
    of_layers = loss_inputs(want.routings, mask_S, whole["question_domain"])
    sums = {name: torch.stack([routing_loss(name).sums(x) for x in of_layers]).detach() for name in names}
    totals = StepTotals(mask_S.sum().float(), 2, sums)
    # One question a half: its answer loss has another mean over sequences, so it is left out.
    got = [model(**half, step_totals=totals) for half in halves]

    def routed(output: Any) -> Tensor:
        return output.balance_loss + output.z_loss + sum(output.further_losses.values())

    torch.testing.assert_close(sum(map(routed, got)) / 2, routed(want))
    expected = gradients(model, routed(want))
    for name, x in gradients(model, sum(map(routed, got)) / 2).items():
        torch.testing.assert_close(x, expected[name], atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"losses": {"switch": 1.0}},
            "there is no routing loss 'switch'; there are: context, diversity, domain, gshard",
        ),
        ({"losses": {"load_balance": 1.0}}, "losses has 'load_balance', whose weight is balance_loss"),
        ({"losses": {"z": 1.0}}, "losses has 'z', whose weight is z_loss"),
        ({"losses": {"gshard": -1.0}}, "the weight of the loss 'gshard' is -1.0: expected 0 or more"),
        ({"losses": {"gshard": float("nan")}}, "the weight of the loss 'gshard' is nan"),
        ({"losses": {"gshard": 1.0}, "sparse_layers": []}, "the model has no sparse layer"),
        ({"losses": {"domain": 1.0}}, "name the experts after the domains: model.expert_names"),
        ({"losses": {"diversity": 1.0}, "top_k": 1}, "top_k is 1: expected 2 or more"),
        ({"losses": {"context": 1.0}, "gate": "token"}, "the gate 'token' sees none"),
        ({"losses": {"load": 1.0}}, "the selection 'top_k' has no noise of its own"),
    ],
)
def test_what_cannot_work_is_refused(make: Make, settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ModelError, ConfigError)) as caught:
        make(**settings)
    assert said in str(caught.value)


def test_a_batch_that_lacks_what_a_loss_needs_is_refused(make: Make) -> None:
    inputs = batch()
    missing = {
        "domain": (("question_domain",), "the batch has no question_domain"),
        "context": (tuple(name for name in inputs if name.startswith("neighbour_")), "compares two questions' neighb"),
    }
    for name, (left_out, said) in missing.items():
        model = make(losses={name: 1.0}, expert_names=NAMES).train()
        with pytest.raises(ModelError, match=said):
            model(**{key: x for key, x in inputs.items() if key not in left_out})


def test_weights_are_kept_in_a_bundle(make: Make, tmp_path: Any) -> None:
    make(losses={"gshard": 0.5, "uniform": 2}).save_pretrained(tmp_path / "bundle")
    loaded = RagmoeBertForQuestionAnswering.from_pretrained(tmp_path / "bundle")
    assert loaded.config.losses == {"gshard": 0.5, "uniform": 2}
    assert loaded.config.loss_weights == {"load_balance": 0.01, "z": 0.001, "gshard": 0.5, "uniform": 2}


def test_the_gates_of_all_layers_learn_by_each_loss(make: Make) -> None:
    inputs = batch()
    for name in (*ALL, "load"):
        selection = "noisy_top_k" if name == "load" else "top_k"
        model = make(losses={name: 1.0}, expert_names=NAMES, selection=selection).train()
        found = gradients(model, model(**inputs).further_losses[name])
        parts = "experts" if name == "diversity" else "gate"
        for layer in (1, 3):
            assert any(x.any() for key, x in found.items() if f"layer.{layer}.moe.{parts}" in key), (name, layer)
