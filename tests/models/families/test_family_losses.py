"""The loss of a decoder: what it holds, and that it does not change with how a step is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_decoders import NATIVE, PAD, E, make, prompts, some_neighbours
from torch import Tensor
from torch.nn import functional as F

from ragmoe.moe import StepTotals, load_balance_loss, routing_loss, z_loss
from ragmoe.moe.losses import loss_inputs

HEAVY = {"balance_loss": 0.5, "z_loss": 0.2}


def batch(rows: int = 6, length: int = 8) -> dict[str, Tensor]:
    """Sequences of different length, padded on the right, with their neighbours."""
    x = prompts(rows, length)
    mask = torch.ones_like(x)
    for row in range(rows):
        mask[row, length - row :] = 0
    x = x.masked_fill(mask == 0, PAD)
    return {
        "input_ids": x,
        "attention_mask": mask,
        "labels": x.masked_fill(mask == 0, -100),
        **some_neighbours(rows).tensors(),
    }


def cut(of: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    pieces = {name: x.split(sizes) for name, x in of.items()}
    return [{name: parts[i] for name, parts in pieces.items()} for i in range(len(sizes))]


def items(of: dict[str, Tensor]) -> Tensor:
    return (of["labels"][:, 1:] != -100).sum()


def gradients(model: Any, losses: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    total = torch.stack(losses).sum()
    total.backward()
    return total.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(one: Any, two: Any) -> bool:
    (a, left), (b, right) = one, two
    same = left.keys() == right.keys() and all(torch.allclose(left[n], right[n], atol=1e-6) for n in left)
    return same and torch.allclose(a, b, atol=1e-6)


def test_the_votes_teach_the_token_gate() -> None:
    model, inputs = make("mixtral", gate="memory", losses={"votes": 0.5}, balance_loss=0.0, z_loss=0.0), batch()
    votes = torch.zeros(6, 4, 2, E)
    votes[:3, :, :, 1], votes[3:, :, :, 2] = 1.0, 1.0
    inputs["neighbour_votes"] = votes
    out = model.train()(**inputs)
    mask_S = inputs["attention_mask"].flatten().bool()
    missed = torch.stack([routing.missed_S[mask_S].mean() for routing in out.routings]).mean()
    assert missed > 0 and torch.allclose(out.loss, out.language_loss + 0.5 * missed, atol=1e-6)
    out.loss.backward()
    for layer in model.moe_layers:
        assert layer.gate.inner.token.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("family", NATIVE)
def test_the_parts_of_the_loss(family: str) -> None:
    model, inputs = make(family, losses={"importance": 0.3}, **HEAVY).train(), batch()
    out = model(**inputs)
    logits, labels = out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    assert torch.allclose(out.language_loss, F.cross_entropy(logits, labels), atol=1e-6)
    parts = loss_inputs(out.routings, inputs["attention_mask"], None)
    mask_S = inputs["attention_mask"].flatten().bool()
    balance = torch.stack([load_balance_loss(r, mask_S) for r in out.routings]).mean()
    z = torch.stack([z_loss(r, mask_S) for r in out.routings]).mean()
    importance = torch.stack([routing_loss("importance")(p) for p in parts]).mean()
    assert torch.allclose(out.aux_loss, balance) and torch.allclose(out.further_losses["z"], z)
    whole = out.language_loss + 0.5 * balance + 0.2 * z + 0.3 * importance
    assert torch.allclose(out.loss, whole, atol=1e-6)
    # Perplexity is of the language alone.
    shown = model.eval()(**inputs)
    assert shown.aux_loss is shown.language_loss is shown.routings is None
    assert torch.allclose(shown.loss, out.language_loss, atol=1e-6)


def test_a_single_expert_has_nothing_to_balance() -> None:
    model, inputs = make("mixtral", num_local_experts=1, num_experts_per_tok=1, **HEAVY).train(), batch()
    out = model(**inputs)
    assert out.aux_loss is None and torch.isfinite(out.loss)


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("copies", [1, 3])
def test_the_loss_does_not_grow_with_the_number_of_micro_batches(family: str, copies: int) -> None:
    """Trainer sums up micro-batches that were given the step's number of labels; transformers' own loss grows by it."""
    model, inputs = make(family, **HEAVY).train(), batch()
    want = gradients(model, [model(**inputs).loss])
    step = [model(**inputs, num_items_in_batch=copies * items(inputs)).loss for _ in range(copies)]
    assert close(gradients(model, step), want)


@pytest.mark.parametrize("counted", [True, False])
def test_told_of_the_step_it_is_exactly_that_of_the_whole_batch(counted: bool) -> None:
    """However unequal the parts: with the sums of the step every routing loss is that of the batch that was not cut."""
    model, inputs = make("qwen3_moe", **HEAVY).train(), batch()
    whole = model(**inputs)
    parts = cut(inputs, [1, 3, 2])
    with torch.no_grad():
        seen = [loss_inputs(model(**part).routings, part["attention_mask"], None) for part in parts]
        balance = routing_loss("load_balance")
        sums = [torch.stack([balance.sums(layers[at]) for layers in seen]).sum(dim=0) for at in range(2)]
    step = StepTotals(inputs["attention_mask"].sum().float(), len(parts), {"load_balance": torch.stack(sums)})
    if counted:
        got = [model(**part, num_items_in_batch=items(inputs), step_totals=step).loss for part in parts]
        # Each shows the balance of the whole step; the sum over parts is what is learned from.
        want = gradients(model, [whole.loss])
        (_, left), (_, right) = gradients(model, got), want
        assert all(torch.allclose(left[n], right[n], atol=1e-6) for n in right)
    else:
        shown = [model(**part, step_totals=step).aux_loss for part in parts]
        assert all(torch.allclose(value, whole.aux_loss, atol=1e-6) for value in shown)


def test_padding_counts_nowhere() -> None:
    model, inputs = make("olmoe", **HEAVY).train(), batch()
    wider = {
        name: F.pad(x, (0, 3), value={"labels": -100}.get(name, PAD)) if x.shape[1:] == (8,) else x
        for name, x in inputs.items()
    }
    assert wider["input_ids"].shape == (6, 11)
    assert torch.allclose(model(**inputs).loss, model(**wider).loss, atol=1e-6)


def test_noise_and_dropout_are_for_training_alone() -> None:
    model, inputs = make("mixtral", gate_noise=1.0, token_dropout=0.5, gate_jitter=0.1).eval(), batch()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    one, two = model(**inputs).routings[0], model(**inputs).routings[0]
    assert one.logits_SE.shape[1] == E and not torch.equal(one.logits_SE, two.logits_SE)
