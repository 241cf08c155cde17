"""What a model adds to neighbours, and what it adds of them to its states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import LABELS, Make, some_neighbours, tokens

from ragmoe import ModelError, Neighbours
from ragmoe.models import load


@pytest.fixture
def index(tmp_path: Path) -> Any:
    """As much of an index as expert memory asks for: ids, rows and domains."""
    ids, domains = ["p0", "p1", "p2"], ["river", "market", "river"]

    class Some(SimpleNamespace):
        def __len__(self) -> int:
            return len(ids)

    def rows(names: Sequence[str]) -> list[int]:
        return [ids.index(name) for name in names]

    return Some(digest="index", folder=tmp_path, domains=domains, rows=rows, passage_ids=ids)


def named(questions: int) -> Neighbours:
    return replace(some_neighbours(questions), passage_ids=[["p0", "p1", "p2"]] * questions)


@pytest.mark.parametrize("gate", ["memory", "retrieval+memory"])
def test_votes_reach_the_gate_through_forward_by_name(make: Make, index: Any, gate: str) -> None:
    model = make(gate=gate, expert_names=["river", "market", "a", "b"])
    found = model.recall(named(2), index)
    assert found.votes_BNLE[:, :, :, 0].tolist() == [[[1, 1], [0, 0], [1, 1]]] * 2
    inputs = tokens()
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.gate.vote_scale.fill_(3.0)
    given = model(**inputs, **found.tensors())
    none = model(**inputs, **replace(found, votes_BNLE=torch.zeros_like(found.votes_BNLE)).tensors())
    moved = given.routings[0].logits_SE - none.routings[0].logits_SE
    assert (moved[:, :2] > 0).all() and not moved[:, 2:].any()


def test_other_gates_leave_neighbours_as_they_are(make: Make, index: Any) -> None:
    found = named(1)
    for gate in ("token", "retrieval", "pooled"):
        assert make(gate=gate).recall(found, index) is found
    assert make(gate="memory", sparse_layers=[]).recall(found, index) is found


def test_the_oracle_is_told_the_domain(make: Make, index: Any) -> None:
    model = make(gate="oracle", expert_names=["market", "river", "a", "common"], common_experts=1)
    found = model.recall(named(2), index, ["river", "moor"])
    assert found.domain_B.tolist() == [1, -1]
    output = model(**tokens(), **found.tensors())
    chosen_QTK = output.routings[1].experts_SK.view(4, 12, 2)
    assert set(chosen_QTK[:2].flatten().tolist()) == {1, 3}
    with pytest.raises(ModelError, match="only an evaluation knows"):
        model.recall(named(2), index)


def test_a_saved_model_knows_the_versions_of_its_bundle(make: Make, tmp_path: Path) -> None:
    model = make(gate="memory")
    assert not model.bundle_digests
    model.save_pretrained(tmp_path)
    first = list(model.bundle_digests)
    assert len(first) == 1 and load(tmp_path).bundle_digests == first
    with torch.no_grad():
        model.qa_outputs.bias.add_(1.0)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).bundle_digests == model.bundle_digests == [model.bundle_digests[0], first[0]]
    assert model.bundle_digests[0] != first[0]


def test_a_summary_adds_nothing_at_step_0_and_without_neighbours(make: Make) -> None:
    plain, told = make(trained=False, gate="token"), make(trained=False, gate="token", neighbour_summary=True)
    told.load_state_dict(plain.state_dict(), strict=False)
    inputs, found = tokens(), some_neighbours(2)
    assert told.gate_sees_neighbours and not plain.gate_sees_neighbours
    want = plain(**inputs).start_logits
    assert torch.equal(told(**inputs, **found.tensors()).start_logits, want)
    with torch.no_grad():
        for layer in told.bert.encoder.layer:
            if layer.summary is not None:
                layer.summary.project.normal_()
    assert torch.equal(told(**inputs).start_logits, want)
    assert torch.equal(told(**inputs, **Neighbours.empty(2, 16).tensors()).start_logits, want)
    assert (told(**inputs, **found.tensors()).start_logits - want)[:, :4].abs().max() > 0.01


def test_a_summary_learns_and_is_saved(make: Make, tmp_path: Path) -> None:
    model = make(gate="token", neighbour_summary=True, experts=1, top_k=1)
    model(**tokens(), **LABELS, **some_neighbours(2).tensors()).loss.backward()
    grown = [p for name, p in model.named_parameters() if ".summary." in name]
    assert len(grown) == 2 * 6 and all(p.grad is not None and p.grad.any() for p in grown)
    model.save_pretrained(tmp_path)
    back, inputs, found = load(tmp_path), tokens(), some_neighbours(2).tensors()
    assert torch.equal(back(**inputs, **found).start_logits, model(**inputs, **found).start_logits)


def test_sequences_of_one_question_share_its_summary(make: Make) -> None:
    model, inputs, found = make(gate="token", neighbour_summary=True), tokens(), some_neighbours(2)
    together = model(**inputs, **found.tensors()).start_logits
    apart = model(**inputs, **found.rows([0, 0, 1, 1]).tensors()).start_logits
    assert torch.allclose(together, apart, atol=1e-5)
