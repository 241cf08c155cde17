"""Gates that start from clusters of neighbours: what they prefer, what they leave, and whom it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_decoder import byte_tokenizer, tiny_llama
from torch.nn import functional as F

from ragmoe import ConfigError, DataError, Neighbours
from ragmoe.gates import Gate, GateSettings, gate_class
from ragmoe.training import load_config, prepare, train
from ragmoe.training.clusters import place_clusters, start_from_clusters, start_gates

E, R, N, OF_EACH = 4, 24, 3, 6
SETTINGS = GateSettings(width=16, experts=E, top_k=2, neighbour_width=R, attention_width=8)


def model_of(name: str, **changes: Any) -> Any:
    gates = [gate_class(name)(replace(SETTINGS, layer=layer, **changes)) for layer in range(2)]
    return SimpleNamespace(gates=gates, config=SimpleNamespace(experts=E, gate=name))


@pytest.fixture
def neighbours() -> Neighbours:
    """Of E kinds of examples one after the other, and of one example that has none."""
    kinds = torch.linalg.qr(torch.randn(R, E)).Q.T
    common = F.normalize(torch.randn(R), dim=0)
    rows_QNR = (kinds + common).repeat_interleave(OF_EACH, dim=0).unsqueeze(1) + 0.05 * torch.randn(E * OF_EACH, N, R)
    mask_QN = torch.rand(E * OF_EACH, N) < 0.7
    mask_QN[:, 0] = True
    embeddings_QNR = F.normalize(rows_QNR, dim=-1) * mask_QN.unsqueeze(-1)
    votes = torch.rand(E * OF_EACH, N, 2, E) * mask_QN[..., None, None]
    found = Neighbours(embeddings_QNR, torch.rand(E * OF_EACH, N) * mask_QN, mask_QN, votes_BNLE=votes)
    return Neighbours.stack([found, replace(Neighbours.empty(1, R, N), votes_BNLE=torch.zeros(1, N, 2, E))])


@pytest.mark.parametrize("name", ["pooled", "retrieval", "retrieval+memory"])
def test_each_kind_of_neighbours_has_an_expert_of_its_own(name: str, neighbours: Neighbours) -> None:
    model = model_of(name)
    token = [gate.token.weight.clone() for gate in model.gates]
    shares = start_from_clusters(model, neighbours, 3.0)
    assert shares == pytest.approx([1 / E] * E)
    for gate, weight in zip(model.gates, token, strict=True):
        assert torch.equal(gate.token.weight, weight)
        logits_QE = gate.foresee(neighbours)[:-1]
        best = logits_QE.argmax(dim=1).view(E, OF_EACH)
        assert (best == best[:, :1]).all() and len(best[:, 0].unique()) == E
        lead = (logits_QE.amax(dim=1) - logits_QE.mean(dim=1)).mean()
        assert lead.item() == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("name", ["pooled", "retrieval"])
def test_without_neighbours_it_stays_the_token_gate(name: str, neighbours: Neighbours) -> None:
    model, x_SD = model_of(name), torch.randn(5, 16)
    start_from_clusters(model, neighbours, 3.0)
    for gate in model.gates:
        assert torch.equal(gate(x_SD, Neighbours.empty(5, R)).logits_SE, gate.token(x_SD))


def test_a_narrow_attention_says_what_it_can(neighbours: Neighbours) -> None:
    model = model_of("retrieval", attention_width=2)
    start_from_clusters(model, neighbours, 3.0)
    logits_QE = model.gates[0].foresee(neighbours)[:-1]
    # Two numbers still tell most kinds apart.
    best = logits_QE.argmax(dim=1).view(E, OF_EACH)
    assert (best == best.mode(dim=1, keepdim=True).values).float().mean() > 0.9 and len(best.unique()) > 2
    assert (logits_QE.amax(dim=1) - logits_QE.mean(dim=1)).mean().item() == pytest.approx(3.0, rel=1e-4)


def test_the_seed_alone_decides(neighbours: Neighbours) -> None:
    def context() -> torch.Tensor:
        torch.manual_seed(0)
        model = model_of("pooled")
        start_from_clusters(model, neighbours, 1.0, seed=3)
        return model.gates[0].context.weight

    assert torch.equal(context(), context())


def test_too_few_examples_have_neighbours(neighbours: Neighbours) -> None:
    with pytest.raises(DataError, match="3 examples to learn from have neighbours: expected at least 4"):
        start_from_clusters(model_of("pooled"), neighbours.rows([0, 7, 14, -1]), 1.0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "decoder"
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


Config = Callable[..., dict[str, Any]]


def lead_of(gates: list[Gate], dataset: Any) -> float:
    found = Neighbours.stack([dataset[at].neighbours for at in range(len(dataset))])
    found = found.rows(found.mask_BN.any(dim=1).nonzero().flatten().tolist())
    logits_QE = gates[0].foresee(found)
    assert logits_QE is not None
    return (logits_QE.amax(dim=1) - logits_QE.mean(dim=1)).mean().item()


def test_a_reader_starts_from_clusters_and_keeps_what_it_learns(config: Config, tmp_path: Path) -> None:
    given = config(**{"train.context_start": 2.0, "train.steps": 6})
    run = prepare(load_config(given))
    assert lead_of(run.model.gates, run.dataset) == pytest.approx(2.0, rel=1e-4)
    train(given, out=tmp_path / "out")
    again = config(**{"base": str(tmp_path / "out"), "model": {}, "train.context_start": 2.0})
    with pytest.raises(ConfigError, match="learned from neighbours already: it would undo that"):
        prepare(load_config(again))


def test_a_language_model_starts_from_clusters(config: Config, world: Path, base: Path) -> None:
    lines: list[str] = []
    show = SimpleNamespace(stage=lambda *_: None, line=lines.append)
    given = {
        "base": str(base), "data.questions": [], "data.documents": [str(world / "corpus.jsonl")],
        "language": {"chunk_tokens": 24, "context_tokens": 8, "neighbours": 4}, "raft": {}, "train.steps": 12,
        "train.context_start": 4.0, "data.calibration_share": 0.0,
    }  # fmt: skip
    sparse = {"gate": "retrieval", "experts": 2, "top_k": 1, "expert_kind": "lora", "expert_rank": 8, "gate_width": 8}
    run = prepare(load_config(config(**given, model=sparse)), show=show)
    assert lead_of(run.model.gates, run.dataset) == pytest.approx(4.0, rel=1e-4)
    assert any(line.startswith("the gates start from 2 clusters of neighbours, which hold") for line in lines)
    for model, what in (
        ({**sparse, "gate": "token"}, "the gate 'token' does not learn from"),
        ({}, "the model is dense"),
    ):
        with pytest.raises(ConfigError, match=what):
            prepare(load_config(config(**given, model=model)), show=SimpleNamespace(stage=None, line=None))


def test_a_cluster_gates_clusters_are_those_of_the_index(config: Config, tmp_path: Path) -> None:
    """Every passage votes for one expert, alike in all layers; the clusters are saved, and stay what they are."""
    lines: list[str] = []
    show = SimpleNamespace(stage=lambda *_: None, line=lines.append)
    given = config(**{"model.gate": "clusters", "model.vote_start": 2.0, "model.losses": {"votes": 0.1}})
    run = prepare(load_config(given), show=show)
    gates, index = run.model.gates, run.index
    assert len(gates) == 2 and torch.equal(gates[0].centroids, gates[1].centroids)
    told = [line for line in lines if line.startswith("the gates go by 4 clusters of passages, ")]
    assert told and told[0].endswith(" of them each")
    passages = torch.from_numpy(index.embeddings.astype("float32"))
    found = Neighbours(passages.unsqueeze(0), torch.zeros(1, len(index)), torch.ones(1, len(index)).bool())
    votes_PE = gates[0].votes(found)[0]
    assert votes_PE.sum(dim=1).eq(1).all() and votes_PE.any(dim=0).all()
    # Each centroid is the direction of what votes for it.
    for votes_P, centroid_R in zip(votes_PE.T.bool(), gates[0].centroids, strict=True):
        own_R = F.normalize(passages[votes_P].mean(dim=0), dim=0)
        assert torch.allclose(own_R, centroid_R, atol=1e-3)
    result = train(given, out=tmp_path / "out", show=show)
    assert result is not None
    again = prepare(load_config(config(base=str(tmp_path / "out"), model={}, seed=5)), show=show)
    assert torch.equal(again.model.gates[1].centroids, gates[1].centroids)


def test_an_index_of_fewer_passages_than_experts_has_no_clusters(config: Config) -> None:
    few: Any = type("Few", (), {"folder": "few", "__len__": lambda self: 3})()
    with pytest.raises(DataError, match="few has 3 passages: expected at least 4, the number of experts"):
        place_clusters(model_of("clusters"), few)
    assert place_clusters(model_of("token"), None) == []


def test_an_expert_that_joins_finds_no_clusters_and_is_told_so() -> None:
    lines: list[str] = []
    show: Any = SimpleNamespace(stage=None, line=lines.append)
    joins: Any = SimpleNamespace(new_expert={}, seed=0, train=SimpleNamespace(context_start=None))
    model, ready = model_of("clusters"), model_of("clusters")
    for gate in ready.gates:
        gate.centroids.normal_()
    for one in (model, ready, model_of("token")):
        start_gates(one, None, [], joins, show)
    assert len(lines) == 1 and lines[0].startswith("its gates have no clusters, so no neighbour votes")
    assert not any(gate.is_ready for gate in model.gates)
