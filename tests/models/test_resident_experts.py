"""A reader whose experts stay in their files: the same answers, in a bounded memory."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LABELS, Make, some_neighbours, tokens
from torch.nn import functional as F

from ragmoe import BundleError, ModelError, Neighbours, OutputCache, Passage, load
from ragmoe.bundle import read_map
from ragmoe.evaluation.run import model_digest
from ragmoe.models import RagmoeBertForQuestionAnswering, RagmoeBertModel
from ragmoe.models.digest import weights_digest

E, L = 6, 2
NAMES = ["law", "bank", "clinic", "archive", "city", "river"]


@pytest.fixture(scope="module", params=["ffn", "lora"])
def bundle(make: Make, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp(request.param)
    model = make(experts=E, expert_kind=request.param, gate="memory", expert_names=NAMES, top_k=2)
    model.moe_layers[1].gate.balance_bias.copy_(torch.randn(E) * 0.01)
    model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def voting(*experts: int) -> Neighbours:
    """A question for each of these experts, whose neighbours vote for it in all layers."""
    votes_BNLE = F.one_hot(torch.tensor(experts), E).float().view(len(experts), 1, 1, E).expand(-1, 3, L, -1)
    found = some_neighbours(len(experts))
    return Neighbours(found.embeddings_BNR, found.scores_BN, found.mask_BN, [], votes_BNLE.contiguous())


def same(one: Any, two: Any) -> bool:
    return torch.equal(one.start_logits, two.start_logits) and torch.equal(one.end_logits, two.end_logits)


@pytest.mark.parametrize("resident", [1, 2, E])
def test_answers_are_the_same_to_the_last_bit(bundle: Path, resident: int) -> None:
    whole, small = load(bundle), load(bundle, resident_experts=resident)
    for _ in range(3):
        inputs = {**tokens(), **voting(*torch.randint(E, (2,)).tolist()).tensors()}
        assert same(small(**inputs), whole(**inputs))
    asked = ["who is at the clinic?", "what is law?"], [[Passage("a", "the zebra is the river")]] * 2, voting(1, 4)
    assert small.read(*asked) == whole.read(*asked)
    assert small.expert_store.summary()["resident"] == resident


def test_memory_is_that_of_the_slots(bundle: Path) -> None:
    whole, small = load(bundle), load(bundle, resident_experts=2)
    own = [sum(p.nbytes for layer in model.moe_layers for p in layer.experts.parameters()) for model in (whole, small)]
    rest = [sum(p.nbytes for p in model.parameters()) - mine for model, mine in zip((whole, small), own, strict=True)]
    assert own[1] * E == own[0] * 2 and rest[0] == rest[1]
    assert small.expert_store.summary()["slot_bytes"] == own[1]
    for _ in range(4):
        small(**tokens(), **voting(0, 5).tensors())
    assert sum(p.nbytes for layer in small.moe_layers for p in layer.experts.parameters()) == own[1]
    assert all(len(layer.experts.resident) <= 2 for layer in small.moe_layers)
    assert small.parameter_counts() == whole.parameter_counts()


def test_votes_bring_experts_in_before_the_first_layer(bundle: Path) -> None:
    model = load(bundle, resident_experts=2)
    for layer in model.moe_layers:
        layer.gate.vote_scale.fill_(5.0)
        layer.gate.token.weight.zero_()
        layer.gate.balance_bias.zero_()
    first = model.moe_layers[0].experts
    seen = []

    def look(*_: Any) -> None:
        first.settle()
        seen.append(first.resident)

    store = model.expert_store
    store.prefetching = True
    handle = model.bert.encoder.layer[0].register_forward_pre_hook(look)
    for expert in (3, 0, 5):
        model(**tokens(1), **voting(expert).tensors())
    handle.remove()
    assert [expert in there for expert, there in zip((3, 0, 5), seen, strict=True)] == [True] * 3
    assert store.counters().prefetched >= 3 * L and store.counters().prefetched_used >= 3 * L
    store.reset_counters()
    store.prefetching = False
    model(**tokens(1), **voting(1).tensors())
    assert store.counters().prefetched == 0 and store.counters().misses > 0


def test_without_neighbours_nothing_is_foreseen(bundle: Path) -> None:
    model = load(bundle, resident_experts=3)
    model.expert_store.prefetching = True
    model(**tokens())
    assert model.expert_store.counters().prefetched == 0


def test_the_digest_is_that_of_the_whole_model(bundle: Path) -> None:
    whole, small = load(bundle), load(bundle, resident_experts=2)
    assert weights_digest(small) == weights_digest(whole)
    assert model_digest(small) == model_digest(whole)
    with torch.no_grad():
        next(whole.moe_layers[1].experts.parameters())[5] += 1
    assert weights_digest(small) != weights_digest(whole)


def test_some_of_the_experts_and_an_earlier_version(make: Make, tmp_path: Path) -> None:
    model = make(experts=4, expert_names=NAMES[:4])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.moe_layers[0].experts.up_b[2] += 1.0
    model.save_pretrained(tmp_path)
    inputs = {**tokens(), **some_neighbours(2).tensors()}
    for settings in ({"version": 1}, {"version": 2}, {"experts": ["clinic", "law"]}):
        whole, small = load(tmp_path, **settings), load(tmp_path, resident_experts=1, **settings)
        assert same(small(**inputs), whole(**inputs))
        assert small.config.to_dict() == whole.config.to_dict()
    assert not same(load(tmp_path, version=1)(**inputs), load(tmp_path, resident_experts=1)(**inputs))


def test_a_publisher_does_not_disturb(make: Make, tmp_path: Path) -> None:
    model = make(experts=4)
    model.save_pretrained(tmp_path)
    small, inputs = load(tmp_path, resident_experts=1), {**tokens(), **some_neighbours(2).tensors()}
    want = model(**inputs)
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.experts.up_b += 1.0
    model.save_pretrained(tmp_path)
    assert read_map(tmp_path).version == 2
    assert same(small(**inputs), want)


def test_kernels_precision_and_the_encoder_alone(make: Make, tmp_path: Path) -> None:
    make(expert_kind="ffn").save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16, "experts_implementation": "eager"}
    opened = [
        RagmoeBertForQuestionAnswering.from_pretrained(tmp_path, resident_experts=n, **options).eval()
        for n in (None, 1)
    ]
    inputs = tokens()
    assert same(*(model(**inputs) for model in opened))
    for model in opened:
        model.set_experts_implementation("grouped_mm")
    assert same(*(model(**inputs) for model in opened))
    assert opened[1].moe_layers[0].experts.slots.fused.up_proj.dtype == torch.bfloat16
    whole, small = (RagmoeBertModel.from_pretrained(tmp_path, resident_experts=n).eval() for n in (None, 1))
    told = {**inputs, **some_neighbours(2).tensors()}
    assert torch.equal(small(**told)[0][-1], whole(**told)[0][-1])


def test_it_only_answers(bundle: Path, tmp_path: Path) -> None:
    model = load(bundle, resident_experts=2)
    what = "the model has 2 of its 6 experts in memory and brings in the others as they are needed: it cannot be "
    with pytest.raises(ModelError, match=what + "trained\nload it without resident_experts"):
        model.train()
    assert not model.training and not model.bert.embeddings.training
    with pytest.raises(ModelError, match=what + "saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=what + "loaded into"):
        model.load_bundle(bundle)
    assert not any(p.requires_grad for p in model.parameters())
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(ModelError, match="experts on demand have no gradient"):
        model(**tokens(), **LABELS)


def test_wrong_numbers(make: Make, bundle: Path, tmp_path: Path, dense_folder: Path) -> None:
    with pytest.raises(ModelError, match="resident_experts is 0: expected at least 1"):
        load(bundle, resident_experts=0)
    assert load(bundle, resident_experts=99).expert_store.resident == E
    make(sparse_layers=[]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no experts, so there are none to bring in on demand"):
        load(tmp_path, resident_experts=2)
    with pytest.raises(ModelError, match="resident_experts needs a bundle, where each expert is a file"):
        RagmoeBertForQuestionAnswering.from_pretrained(dense_folder, resident_experts=2)


def damage(path: Path, how: str) -> None:
    if how == "absent":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        os.truncate(path, 0)


@pytest.mark.parametrize("how", ["absent", "cut short", "empty"])
def test_a_file_that_is_lost_or_damaged(make: Make, tmp_path: Path, how: str) -> None:
    make(experts=4, top_k=4, expert_kind="ffn").save_pretrained(tmp_path)
    model = load(tmp_path, resident_experts=1)
    damage(tmp_path / "expert.2.1.safetensors", how)
    with pytest.raises(BundleError, match=r"expert\.2\.1\.safetensors is " + ("miss" if how == "absent" else "dam")):
        model(**tokens())
    # One that is held back is not asked for.
    model.set_available_experts([0, 1, 3])
    assert model(**tokens()).start_logits.isfinite().all()
    with pytest.raises(BundleError, match="lacks expert" if how == "absent" else "is damaged"):
        load(tmp_path, resident_experts=1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_slots_of_its_own(bundle: Path, copied: Any) -> None:
    model = load(bundle, resident_experts=1)
    model.output_cache, model.expert_store.prefetching = OutputCache(), True
    asked = (["what is open?"], [[Passage("a", "the river is open")]], voting(2))
    want = model.read(*asked)
    model.expert_store.reset_counters()
    again = copied(model)
    assert (again.output_cache is model.output_cache) == (copied is copy.deepcopy)
    assert again.read(*asked) == want and again.output_cache.hits == 1
    again.output_cache = None
    # Where in memory a weight lies can move the last digits.
    assert [(found.text, found.start) for found in again.read(*asked)] == [(found.text, found.start) for found in want]
    assert again.expert_store.counters().hits and model.expert_store.counters().hits == 0
    assert again.expert_store.layers[0] in [*again.modules()]
