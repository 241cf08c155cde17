"""X-LoRA over a reader's experts: the adapters are those experts, and only the classifier and the head can learn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import LABELS, Make, some_neighbours, tokens
from torch import Tensor

from ragmoe import BundleError, ModelError, load
from ragmoe.corpus.types import Passage
from ragmoe.models import RagmoeBertForQuestionAnswering
from ragmoe.models.xlora import XLoraReader, dense_reader, export_adapters
from ragmoe.moe import RoutingStatistics
from ragmoe.training.trainer import freeze, part_of

NAMES = ["river", "city", "bank"]


@pytest.fixture
def branches(make: Make) -> RagmoeBertForQuestionAnswering:
    """Three experts of one domain each."""
    return make(gate="oracle", experts=3, top_k=1, expert_names=NAMES)


@pytest.fixture
def reader(branches: RagmoeBertForQuestionAnswering) -> XLoraReader:
    return XLoraReader(branches, seed=3)


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model.eval()(**inputs)
    return torch.cat([output.start_logits, output.end_logits])


def classifier(reader: XLoraReader) -> torch.nn.Linear:
    return reader.xlora.base_model.internal_xlora_classifier.layers[-1]


def always(reader: XLoraReader, scores: Tensor) -> None:
    """Let the classifier say the same of every token: scores (2 L, E) before the softmax."""
    last = classifier(reader)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(scores.flatten())


@pytest.mark.parametrize("expert", range(3))
def test_an_expert_is_exactly_its_adapter(
    branches: RagmoeBertForQuestionAnswering, expert: int, tmp_path: Path
) -> None:
    inputs = tokens()
    dense = dense_reader(branches)
    without = logits(dense, inputs)
    adapted = peft.PeftModel.from_pretrained(dense, str(export_adapters(branches, tmp_path)[expert]))
    branches.set_available_experts([expert])
    found, wanted = logits(adapted, inputs), logits(branches, inputs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found - without).abs().max() > 0.01


def test_the_dense_reader_is_what_answers_without_experts(branches: RagmoeBertForQuestionAnswering) -> None:
    inputs = tokens()
    branches.set_available_experts([])
    assert torch.equal(logits(dense_reader(branches), inputs), logits(branches, inputs))


@pytest.mark.parametrize("expert", range(3))
def test_with_one_scaling_alone_it_is_that_expert(
    branches: RagmoeBertForQuestionAnswering, reader: XLoraReader, expert: int
) -> None:
    inputs = tokens()
    always(reader, torch.eye(3)[expert].repeat(4, 1) * 1e4)
    branches.set_available_experts([expert])
    torch.testing.assert_close(logits(reader, inputs), logits(branches, inputs), atol=1e-5, rtol=1e-5)


def test_the_adapters_are_weighed_by_what_the_classifier_sees_without_them(
    branches: RagmoeBertForQuestionAnswering, reader: XLoraReader
) -> None:
    """Against a second pass written out: adapters merged into the matrices, token by token."""
    inputs = {name: x[:1, :5] for name, x in tokens().items()}
    found = reader.eval()(**inputs)
    with torch.no_grad():
        states = dense_reader(branches).bert(**inputs).hidden_states
        scalings_TME = classifier(reader)(states[-1]).view(5, 4, 3).softmax(dim=-1)
    torch.testing.assert_close(reader.xlora.base_model.get_latest_scalings()[0], scalings_TME)

    dense = dense_reader(branches)
    for at, layer in enumerate(branches.sparse_layers):
        experts, block = branches.moe_layers[at].experts, dense.bert.encoder.layer[layer]
        for side, linear in enumerate((block.intermediate.dense, block.output.dense)):
            a, b = (getattr(experts, f"{('up', 'down')[side]}_{half}").detach() for half in "ab")

            def scaled(
                x: Tensor, a: Tensor = a, b: Tensor = b, m: int = 2 * at + side, linear: torch.nn.Linear = linear
            ) -> Tensor:
                delta = torch.einsum("te,btd,edr,erh->bth", scalings_TME[:, m], x, a, b)
                return torch.nn.functional.linear(x, linear.weight, linear.bias) + delta

            linear.forward = scaled  # type: ignore[method-assign]
    torch.testing.assert_close(found.start_logits, dense(**inputs).start_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_reach_the_classifier_and_the_head_alone(reader: XLoraReader, bf16: bool) -> None:
    freeze(reader.train(), "xlora")
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = reader(**tokens(), **LABELS, **some_neighbours(2).tensors()).loss
        loss.backward()
    moved = {name: part_of(name) for name, p in reader.named_parameters() if p.grad is not None and p.grad.any()}
    assert sorted(moved.values()) == ["gate"] * 2 + ["head"] * 4
    assert all("internal_xlora_classifier" in name for name, part in moved.items() if part == "gate")
    assert {part_of(name) for name, p in reader.named_parameters() if p.requires_grad} == {"gate", "head"}
    assert not any(p.requires_grad for name, p in reader.named_parameters() if ".lora_A." in name or ".lora_B." in name)


def test_saved_and_opened_it_is_the_same_bit_for_bit(reader: XLoraReader, tmp_path: Path) -> None:
    inputs = tokens()
    reader.config.no_answer_threshold, reader.config.encoder = 0.25, {"id": "stub", "digest": "d"}
    reader.save_pretrained(tmp_path / "saved", extra={"more": 1})
    opened = XLoraReader.from_pretrained(tmp_path / "saved")
    a, b = reader.state_dict(), opened.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(logits(opened, inputs), logits(reader, inputs))
    assert opened.config.no_answer_threshold == 0.25 and opened.config.encoder == {"id": "stub", "digest": "d"}
    assert opened.expert_names == reader.expert_names == NAMES
    assert opened.parameter_counts() == reader.parameter_counts()


def test_it_is_not_opened_as_something_else(
    reader: XLoraReader, branches: RagmoeBertForQuestionAnswering, tmp_path: Path
) -> None:
    reader.save_pretrained(tmp_path / "xlora")
    branches.save_pretrained(tmp_path / "branches")
    with pytest.raises(BundleError, match="does not fit RagmoeBertForQuestionAnswering"):
        load(tmp_path / "xlora")
    with pytest.raises(BundleError, match="holds no X-LoRA reader"):
        XLoraReader.from_pretrained(tmp_path / "branches")


def test_every_adapter_is_active(branches: RagmoeBertForQuestionAnswering, reader: XLoraReader) -> None:
    dense = sum(p.numel() for p in dense_reader(branches).parameters())
    experts = sum(p.numel() for layer in branches.moe_layers for p in layer.experts.parameters())
    total = dense + experts + 32 * 4 * 3 + 4 * 3
    assert reader.parameter_counts() == {"total": total, "active": total}


def test_the_classifier_is_drawn_by_the_seed_alone(branches: RagmoeBertForQuestionAnswering) -> None:
    before = torch.get_rng_state()
    first, again, other = (classifier(XLoraReader(branches, seed=seed)).weight for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_its_routing_is_the_mean_scaling_of_a_layer(reader: XLoraReader) -> None:
    shares_ME = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.2, 0.6, 0.2], [0.4, 0.5, 0.1]])
    always(reader, shares_ME.log())
    assert not reader.train()(**tokens()).routings
    routings = reader.eval()(**tokens()).routings
    assert len(routings) == len(reader.sparse_layers) == 2
    for routing, mean in zip(routings, ([0.4, 0.2, 0.4], [0.3, 0.55, 0.15]), strict=True):
        torch.testing.assert_close(routing.logits_SE.exp(), torch.tensor(mean).expand(48, 3))
    assert routings[1].experts_SK.unique().tolist() == [1]
    torch.testing.assert_close(routings[1].weights_SK, torch.full((48, 1), 0.55))


def test_it_reads_and_counts_as_a_reader_does(reader: XLoraReader) -> None:
    always(reader, torch.tensor([0.0, 5.0, 0.0]).repeat(4, 1))
    assert not reader.gate_sees_neighbours
    counts = RoutingStatistics(reader.sparse_layers, len(reader.expert_names))
    passages = [[Passage("p", "The city bank is open.")], [Passage("q", "A river.")]]
    answers = reader.read(["who is open?", "what river?"], passages, statistics=counts, domains=["a", "b"])
    assert len(answers) == 2 and all(math.isfinite(answer.score) for answer in answers)
    assert sorted(counts.domains) == ["a", "b"]
    assert counts.load_LE.tolist() == [[0.0, 1.0, 0.0]] * 2


def test_what_it_cannot_mix_is_refused(make: Make, reader: XLoraReader) -> None:
    with pytest.raises(ModelError, match="experts of the kind 'ffn'"):
        XLoraReader(make(expert_kind="ffn", gate="token"))
    with pytest.raises(ModelError, match="has no sparse layer"):
        XLoraReader(make(sparse_layers=[]))
    with pytest.raises(ModelError, match="neighbours' summary"):
        XLoraReader(make(gate="token", neighbour_summary=True))
    with pytest.raises(ModelError, match="gradient_checkpointing=false"):
        reader.activation_checkpointing_enable({"use_reentrant": False})


def test_a_threshold_of_one_expert_is_not_that_of_all(branches: RagmoeBertForQuestionAnswering, tmp_path: Path) -> None:
    branches.config.expert_thresholds = [None, 5.0, None]
    reader = XLoraReader(branches, seed=3)
    assert reader.config.expert_thresholds is None and branches.config.expert_thresholds == [None, 5.0, None]
    reader.save_pretrained(tmp_path)
    assert XLoraReader.from_pretrained(tmp_path).config.expert_thresholds is None
