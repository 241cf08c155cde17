"""The reader's forward pass: losses, padding, neighbours, checkpointing, half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import LABELS, Make, some_neighbours, tokens
from torch import Tensor

from ragmoe import ModelError, Neighbours
from ragmoe.models import QuestionAnsweringOutput, RagmoeBertForQuestionAnswering
from ragmoe.models.loss import answer_loss
from ragmoe.moe import load_balance_loss, z_loss


def test_losses_are_what_their_functions_say(make: Make) -> None:
    model, inputs = make(balance_loss=0.5, z_loss=0.25), tokens()
    output = model(**inputs, **LABELS, **some_neighbours(2).tensors())
    mask_S = inputs["attention_mask"].flatten().bool()
    balance = sum(load_balance_loss(r, mask_S) for r in output.routings) / 2
    z = sum(z_loss(r, mask_S) for r in output.routings) / 2
    answer = answer_loss(output.start_logits, output.end_logits, *LABELS.values())
    assert torch.allclose(output.balance_loss, balance) and torch.allclose(output.z_loss, z)
    assert torch.equal(output.answer_loss, answer)
    assert torch.allclose(output.loss, answer + 0.5 * balance + 0.25 * z)
    assert model(**inputs).loss is None


def test_dense_reader_has_the_answer_loss_alone(make: Make) -> None:
    output = make(sparse_layers=[])(**tokens(), **LABELS)
    assert torch.equal(output.loss, output.answer_loss) and output.z_loss is None


def test_shapes_and_masked_candidates(make: Make) -> None:
    model, inputs = make(), tokens()
    context_mask = torch.zeros(4, 12, dtype=torch.bool)
    context_mask[:, 5:8] = True
    output = model(**inputs, context_mask=context_mask, output_hidden_states=True)
    assert output.start_logits.shape == output.end_logits.shape == (4, 16)
    assert [h.shape for h in output.hidden_states] == [(4, 12, 32)] * 5
    assert model(**inputs).hidden_states is None
    for logits_QC in (output.start_logits, output.end_logits):
        assert torch.equal(logits_QC[:, 4:] > -1e30, context_mask)
        assert (logits_QC[:, :4] > -1e30).all()
    assert torch.equal(output.start_logits[:, :4], output.end_logits[:, :4])
    inferred = model(**inputs).start_logits[:, 4:] > -1e30
    assert torch.equal(inferred, (inputs["token_type_ids"] * inputs["attention_mask"]).bool())


@pytest.mark.parametrize("expert_kind", ["lora", "ffn"])
def test_padding_and_company_change_nothing(make: Make, expert_kind: str) -> None:
    model, inputs, neighbours = make(expert_kind=expert_kind), tokens(), some_neighbours(4)
    together = model(**inputs, **neighbours.tensors())
    for row in range(4):
        length = int(inputs["attention_mask"][row].sum())
        alone = model(**{k: x[row : row + 1, :length] for k, x in inputs.items()}, **neighbours.rows([row]).tensors())
        assert torch.allclose(alone.start_logits[0], together.start_logits[row, : 4 + length], atol=1e-5)
        assert torch.allclose(alone.end_logits[0], together.end_logits[row, : 4 + length], atol=1e-5)


def test_padding_does_not_reach_the_losses(make: Make) -> None:
    model, inputs, neighbours = make(), tokens(), some_neighbours(2)
    want = model(**inputs, **LABELS, **neighbours.tensors())
    longer = {k: torch.cat([x, torch.zeros(4, 7, dtype=torch.long)], dim=1) for k, x in inputs.items()}
    longer["input_ids"][:, 12:] = 77
    got = model(**longer, **LABELS, **neighbours.tensors())
    for name in ("loss", "answer_loss", "balance_loss", "z_loss"):
        assert torch.allclose(got[name], want[name], atol=1e-5), name


def test_sequences_of_one_question_share_its_neighbours(make: Make) -> None:
    model, inputs, neighbours = make(), tokens(), some_neighbours(2)
    shared = model(**inputs, **neighbours.tensors()).start_logits
    each = model(**inputs, **neighbours.rows([0, 0, 1, 1]).tensors()).start_logits
    assert torch.allclose(shared, each, atol=1e-5)
    swapped = model(**inputs, **neighbours.rows([1, 0]).tensors()).start_logits
    assert not torch.allclose(shared, swapped, atol=1e-4)


@pytest.mark.parametrize("gate", ["retrieval", "pooled"])
def test_no_neighbours_are_the_same_as_none_given(make: Make, gate: str) -> None:
    model, inputs = make(gate=gate), tokens()
    want = model(**inputs).start_logits
    assert torch.equal(model(**inputs, **Neighbours.empty(4, 16, 3).tensors()).start_logits, want)


def test_neighbours_that_are_incomplete_or_of_another_width(make: Make) -> None:
    model, inputs = make(), tokens()
    with pytest.raises(ValueError, match="came without neighbour_scores or neighbour_mask"):
        model(**inputs, neighbour_embeddings=torch.zeros(2, 3, 16))
    with pytest.raises(ModelError, match="embeddings are 24 wide, but the gate reads 16"):
        model(**inputs, **some_neighbours(2, width=24).tensors())
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_a_token_gate_takes_no_notice_of_neighbours(make: Make) -> None:
    model, inputs = make(gate="token"), tokens()
    assert not model.gate_sees_neighbours
    got = model(**inputs, **some_neighbours(2, width=99).tensors()).start_logits
    assert torch.equal(got, model(**inputs).start_logits)


def test_embeddings_may_be_given(make: Make) -> None:
    model, inputs = make(), tokens()
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    rest = {k: x for k, x in inputs.items() if k != "input_ids"}
    assert torch.equal(model(inputs_embeds=embedded, **rest).start_logits, model(**inputs).start_logits)


def step(model: RagmoeBertForQuestionAnswering, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    output = model(**kwargs, **LABELS)
    output.loss.backward()
    return output.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("expert_kind", ["lora", "ffn"])
@pytest.mark.parametrize("with_neighbours", [True, False])
def test_gradient_checkpointing_changes_nothing(make: Make, expert_kind: str, with_neighbours: bool) -> None:
    # Large weights, so that a gradient of the routing losses that went missing would show.
    model = make(expert_kind=expert_kind, balance_loss=1.0, z_loss=1.0, sparse_layers=[0, 1, 2, 3]).train()
    inputs = {**tokens(), **(some_neighbours(2).tensors() if with_neighbours else {})}
    want_loss, want = step(model, **inputs)
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    got_loss, got = step(model, **inputs)
    assert torch.equal(got_loss, want_loss) and got.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, atol=1e-6), name
    gate = [name for name in want if ".moe.gate." in name]
    assert len(gate) >= (20 if with_neighbours else 4)


def test_reentrant_checkpointing_is_refused(make: Make) -> None:
    with pytest.raises(ModelError, match="re-entrant checkpointing loses the gradients of the routing losses"):
        make().activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("expert_kind", ["lora", "ffn"])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(make: Make, expert_kind: str, autocast: bool) -> None:
    model, inputs = make(expert_kind=expert_kind).train(), {**tokens(), **some_neighbours(2).tensors()}
    want_loss, want = step(model, **inputs)
    if not autocast:
        model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got_loss, got = step(model, **inputs)
    assert got_loss.dtype == torch.float32 and abs(got_loss - want_loss) < 0.05 * want_loss
    assert got.keys() == want.keys()
    assert all(gradient.isfinite().all() for gradient in got.values())


def test_every_parameter_learns(make: Make) -> None:
    for expert_kind in ("lora", "ffn"):
        model = make(expert_kind=expert_kind, top_k=4).train()
        _, gradients = step(model, **tokens(), **some_neighbours(2).tensors())
        names = {name for name, _ in model.named_parameters()}
        assert names - gradients.keys() == set()
        dead = [name for name, gradient in gradients.items() if not gradient.any()]
        assert all("key.bias" in name for name in dead), dead


def test_output_is_a_model_output(make: Make) -> None:
    output = make()(**tokens(), **LABELS)
    assert isinstance(output, QuestionAnsweringOutput)
    assert output.to_tuple()[0] is output.loss and output["loss"] is output.loss


def test_trainer_divides_the_loss_itself(make: Make) -> None:
    """Trainer takes a forward with **kwargs for one that normalises over accumulated steps, unless told otherwise."""
    assert make().accepts_loss_kwargs is False


def test_it_takes_what_callers_of_transformers_pass(make: Make) -> None:
    model, inputs = make(), tokens()
    plain = model(**inputs)
    nothing = {"output_attentions": False, "output_hidden_states": None, "return_dict": True}
    counted = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
    assert torch.equal(model(**inputs, **nothing, position_ids=counted).start_logits, plain.start_logits)
    assert not torch.equal(model(**inputs, position_ids=counted + 1).start_logits, plain.start_logits)
    shape = plain.start_logits.shape
    start_QC, end_QC = (x for x in model(**inputs, return_dict=False) if getattr(x, "shape", None) == shape)
    assert torch.equal(start_QC, plain.start_logits) and torch.equal(end_QC, plain.end_logits)
    with pytest.raises(ModelError, match="output_attentions is true"):
        model(**inputs, output_attentions=True)


def test_peft_tunes_it_as_a_model_for_question_answering(make: Make) -> None:
    adapted = get_peft_model(make(), LoraConfig(task_type="QUESTION_ANS", target_modules=["query"]))
    adapted(**tokens(), **LABELS).loss.backward()
    assert any(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)
