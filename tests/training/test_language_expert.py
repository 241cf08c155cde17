"""One more expert for a language model: it alone is trained, all else stays to the bit, and a certificate says so."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_encoder import StubEncoder
from tiny_decoder import byte_tokenizer, tiny_llama
from torch.nn import functional as F

from ragmoe import BundleError, ConfigError, DataError, load_decoder
from ragmoe.bundle import prune_experts, read_bundle, read_map
from ragmoe.corpus import read_passages
from ragmoe.index import BuildOptions, Index, build_index
from ragmoe.models.initialising import init
from ragmoe.training import TrainingConfig, load_config, prepare, train
from ragmoe.training.adding import Judges, add_expert, new_expert_config
from ragmoe.training.language import learned_documents
from ragmoe.training.language_expert import cut_excerpts, indexed_documents

WORDS = {
    "river": "ferry quay tide barge mast rope",
    "hill": "stone path sheep heath pine fog",
    "market": "bread bread bread bread bread cheese",
}
# Rows of experts that nothing trains.
BUFFERS = ("balance_bias", "centroids")
QUICK = (
    "train.batch_size=4", "train.precision=fp32", "log_every=1", "language.chunk_tokens=40",
    "language.context_tokens=8", "language.neighbours=3", "train.gate_learning_rate=0.3",
    "train.experts_learning_rate=0.02",
)  # fmt: skip


def _documents(domain: str, split: int, count: int) -> str:
    draw = random.Random(f"{domain}/{split}")
    texts = [" ".join(draw.choice(WORDS[domain].split()) for _ in range(24)) for _ in range(count)]
    rows = [{"id": f"{domain}-{split}-{at}", "text": text, "domain": domain} for at, text in enumerate(texts)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def land(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of three domains to learn from and to judge by, an index of the former, and a dense base."""
    folder = tmp_path_factory.mktemp("land")
    for domain in WORDS:
        for split, name in enumerate(("train", "valid")):
            (folder / f"{domain}_{name}.jsonl").write_text(_documents(domain, split, 4 - split))
    sources = tuple(str(folder / f"{domain}_train.jsonl") for domain in WORDS)
    build_index(
        BuildOptions(sources, folder / "index", encoder=StubEncoder(), chunk_words=8, chunk_overlap=0, rechunk=True)
    )
    tiny_llama(num_hidden_layers=2, tie_word_embeddings=True).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    return folder


@pytest.fixture
def bundle(land: Path, tmp_path: Path) -> Callable[..., Path]:
    """``bundle(kind, gate)``: a decoder that nobody has trained."""

    def make(kind: str = "lora", gate: str = "retrieval", *, half: bool = False, **settings: Any) -> Path:
        given = {"experts": 3, "top_k": 1, "gate_width": 8, "neighbour_width": 64, "expert_kind": kind, "gate": gate}
        given |= {"expert_rank": 8} if kind == "lora" else {"init": "noise", "amount": 0.2}
        made = init(
            land / "base", out=tmp_path / "bundle", expert_names=["river", "hill", "spare"], **given, **settings
        )
        if half:
            shutil.rmtree(tmp_path / "bundle")
            made.model.bfloat16().save_pretrained(tmp_path / "bundle")
            byte_tokenizer().save_pretrained(tmp_path / "bundle")
        return tmp_path / "bundle"

    return make


@pytest.fixture
def market(land: Path) -> Callable[..., TrainingConfig]:
    """The configuration that adds an expert for the market."""

    def make(bundle: Path, *overrides: str, steps: int = 3, **settings: Any) -> TrainingConfig:
        given = {"index": land / "index", "corpus": [str(land / "market_train.jsonl")], "judges": judges(land)}
        return new_expert_config(bundle, "market", steps=steps, overrides=[*QUICK, *overrides], **{**given, **settings})

    return make


def judges(land: Path) -> Judges:
    known = [land / f"{domain}_valid.jsonl" for domain in ("river", "hill")]
    return Judges(dev=[land / "market_valid.jsonl"], known=known)


@pytest.mark.parametrize(
    ("kind", "gate", "start", "half"),
    [
        ("lora", "retrieval", "shared", False),
        ("ffn", "token", "nearest", True),
        ("lora", "memory", "hill", False),
    ],
)
def test_only_the_new_expert_moves(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], land: Path, kind: str, gate: str, start: str,
    half: bool,
) -> None:  # fmt: skip
    folder = bundle(kind, gate, half=half)
    before, old = read_bundle(folder)
    config = market(folder, "train.weight_decay=0.5", "train.gate_learning_rate=1.0", start=start, steps=8)
    added = add_expert(folder, config, judges(land))
    after, map_ = read_bundle(folder, verify=True)
    assert (map_.version, map_.expert_ids, map_.expert_names[-1]) == (old.version + 1, [0, 1, 2, 3], "market")
    assert old.digests.items() < map_.digests.items()
    assert map_.digests.keys() - old.digests.keys() == {"expert.3.1.safetensors"}
    for name, x in before.items():
        assert torch.equal(after[name][:3] if name in map_.fused else after[name], x), name
        assert after[name].dtype == x.dtype
    config_of = {version: load_decoder(folder, version=version).config for version in (1, 2)}
    assert [config.experts for config in config_of.values()] == [3, 4]
    assert config_of[1].balance_loss == config_of[2].balance_loss > 0
    own = json.loads((folder / "config.json").read_text())
    assert own["num_local_experts"] == 4 and own["expert_names"][-1] == "market"
    certificate = added.certificate
    assert certificate["parameters"]["trained"] == sum(
        x[0].numel() for name, x in after.items() if name in map_.fused and not name.endswith(BUFFERS)
    )
    assert (certificate["start"], certificate["documents"], certificate["chunks"]) == (start, 4, 16)
    assert [row["domain"] for row in certificate["old"]] == ["river", "hill", "all"]
    assert all(row["masked"] == row["before"] and row["identical"] for row in certificate["old"])
    assert not (folder / "adding").exists()


def test_the_certificate_says_what_it_costs_and_brings(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], land: Path
) -> None:
    folder = bundle()
    train_more = {
        "base": str(folder), "data": {"documents": [str(land / f"{d}_train.jsonl") for d in ("river", "hill")]},
        "train": {"steps": 10, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32"}, "checkpoint_every": 0,
    }  # fmt: skip
    trained = folder.with_name("trained")
    train({**train_more, "data": {**train_more["data"], "index": str(land / "index")}}, out=trained)
    certificate = add_expert(trained, market(trained, steps=25), judges(land)).certificate
    new, (*domains, mean) = certificate["new"], certificate["old"]
    assert new["tokens"] == sum(len(text.encode()) for text in texts(land / "market_valid.jsonl"))
    assert new["live"] < new["before"] and new["high"] < -2
    assert new["difference"] == pytest.approx(100 * (new["live"] / new["before"] - 1))
    assert new["routed"]["tokens"] > 0.6 > 0.3 > mean["routed"]["tokens"]
    assert abs(mean["difference"]) < 10 and mean["low"] <= mean["difference"] <= mean["high"]
    assert mean["before"] == pytest.approx(math.sqrt(domains[0]["before"] * domains[1]["before"]))
    assert mean["tokens"] == domains[0]["tokens"] + domains[1]["tokens"]
    assert read_map(trained).extra["certificates"]["3"] == certificate
    assert prune_experts(trained, ["market"]).expert_names == ["river", "hill", "spare"]


def texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_votes_lead_to_it_without_its_gate_being_trained(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], land: Path
) -> None:
    folder = bundle(gate="memory", vote_start=8.0)
    config = market(folder, "new_expert.train_gate=false")
    run = prepare(config)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained and all(".mlp.experts." in name for name in trained)
    assert run.new_expert is not None and run.new_expert.lesson is None
    certificate = add_expert(folder, config, judges(land)).certificate
    # But for the first chunk of a document, which has no neighbours that could vote.
    assert certificate["new"]["routed"]["tokens"] > 0.5 > 0.2 > certificate["old"][-1]["routed"]["tokens"]


def test_its_cluster_leads_to_it_without_its_gate_being_trained(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], land: Path
) -> None:
    """A new expert's cluster is of its own documents; held back it leaves the old domains to the bit as they were."""
    start, documents = (
        bundle(gate="clusters", vote_start=8.0),
        [str(land / f"{d}_train.jsonl") for d in ("river", "hill")],
    )
    options = BuildOptions(
        tuple(documents), start.with_name("known"), encoder=StubEncoder(), chunk_words=8, chunk_overlap=0, rechunk=True
    )
    build_index(options)
    known = {"documents": documents, "index": str(options.out)}
    few = {"steps": 2, "batch_size": 4, "learning_rate": 1e-5, "precision": "fp32"}
    folder = start.with_name("clustered")
    train({"base": str(start), "data": known, "train": few, "checkpoint_every": 0}, out=folder)
    config = market(folder, "new_expert.train_gate=false")
    run = prepare(config)
    index = Index.open(land / "index")
    own = run.new_expert.own
    want_R = F.normalize(torch.from_numpy(index.encode(own.texts(256)).mean(axis=0)), dim=0)
    assert all(torch.allclose(gate.centroids[-1], want_R, atol=1e-6) for gate in run.model.gates)
    certificate = add_expert(folder, config, judges(land)).certificate
    assert certificate["new"]["routed"]["tokens"] > 0.5 > 0.2 > certificate["old"][-1]["routed"]["tokens"]
    assert all(row["masked"] == row["before"] and row["identical"] for row in certificate["old"])


def test_a_token_gate_needs_no_index_but_something_to_tell_apart(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], land: Path
) -> None:
    folder = bundle(gate="token")
    with pytest.raises(DataError, match=r"nothing says when not to call the expert market\nname some with --others"):
        prepare(market(folder, index=None))
    others = [str(land / "river_train.jsonl")]
    with pytest.raises(ConfigError, match=r"data\.index names no index\nstart from a certain expert"):
        prepare(market(folder, index=None, others=others, start="nearest"))
    certificate = add_expert(folder, market(folder, index=None, others=others)).certificate
    assert certificate["index"] is None and certificate["old"] == []
    assert read_map(folder).expert_names[-1] == "market"


def test_the_lesson_reaches_gate_rows_alone(bundle: Callable[..., Path], market: Callable[..., TrainingConfig]) -> None:
    run = prepare(market(bundle()))
    lesson = run.new_expert and run.new_expert.lesson
    assert lesson is not None
    asked = ([None, None], torch.ones(4, dtype=torch.bool))
    lesson(run.model.train(), 0, *asked).backward()
    reached = {name for name, p in run.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached and reached == {n for n, p in run.model.named_parameters() if p.requires_grad and ".gate." in n}
    own, others = lesson.batches.sides
    assert {own.data.documents[own.data.chunks[place].document].domain for place in own.places} == {"market"}
    assert {others.data.documents[others.data.chunks[place].document].domain for place in others.places} == {
        "river", "hill"
    }  # fmt: skip
    assert all(side.data.chunks[place].number for side in (own, others) for place in side.places)


@pytest.mark.parametrize(("kind", "rate"), [("lora", 4e-3), ("ffn", 5e-5)])
def test_low_rank_experts_take_larger_steps(bundle: Callable[..., Path], land: Path, kind: str, rate: float) -> None:
    corpus = [str(land / "market_train.jsonl")]
    config = new_expert_config(bundle(kind), "market", index=land / "index", corpus=corpus)
    assert config.train.experts_learning_rate == rate


@pytest.mark.parametrize(("override", "left"), [("data.calibration_share=0.49", "03"), ("data.limit=3", "013")])
def test_what_is_kept_aside_is_no_other_document(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], override: str, left: str
) -> None:
    """The index holds it too: read as another's, it would teach the gate not to call the expert for it."""
    run = prepare(market(bundle(), "data.calibration_share=0", override, judges=Judges()))
    assert {document.id for document in run.material} == {f"market-0-{at}" for at in left}
    assert run.new_expert is not None and run.new_expert.lesson is not None
    _, others = run.new_expert.lesson.batches.sides
    assert {document.domain for document in others.data.documents} == {"river", "hill"}


def test_documents_that_are_all_kept_aside_are_said_to_be(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragmoe.training.language.is_held", lambda *_: True)
    with pytest.raises(DataError, match=r"all 4 documents are kept aside .*\ndata\.calibration_share=0"):
        learned_documents(market(bundle(), judges=Judges()))


def test_other_documents_are_put_together_and_cut_to_what_is_read(land: Path) -> None:
    documents = indexed_documents(Index.open(land / "index", encoder=StubEncoder()))
    whole = {p.id: p.text for d in WORDS for p in read_passages([str(land / f"{d}_train.jsonl")])}
    assert {document.id: document.text.split() for document in documents} == {n: t.split() for n, t in whole.items()}
    config = load_config({"base": "b", "data": {"documents": ["d"]}, "language": {"chunk_tokens": 20}}).language
    assert config is not None
    few = cut_excerpts(documents, byte_tokenizer(), config, 3, seed=0)
    assert {excerpt.domain for excerpt in few} == set(WORDS)
    many = cut_excerpts(documents, byte_tokenizer(), config, 24, seed=0)
    assert len(many) == 24 and {e.doc_id for e in many} == set(whole) and len({e.id for e in many}) == 24
    by_id = {document.id: document.text for document in documents}
    assert all(len(e.text) == 40 and e.text in by_id[e.doc_id] for e in many)


def test_a_killed_addition_goes_on(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    killed = bundle()
    whole = Path(shutil.copytree(killed, tmp_path / "whole"))
    add_expert(whole, market(whole, "checkpoint_every=2", steps=4))

    class Stop:
        def stage(self, name: str, done: int, total: int) -> None:
            if name == "training" and done == 3:
                raise KeyboardInterrupt

        def line(self, text: str) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        add_expert(killed, market(killed, "checkpoint_every=2", steps=4), show=Stop())
    assert read_map(killed).version == 1
    add_expert(killed, market(killed, "checkpoint_every=2", steps=4), resume=True)
    a, b = read_bundle(whole)[0], read_bundle(killed)[0]
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("overrides", "settings", "error", "said"),
    [
        ((), {"corpus": []}, ConfigError, "no documents to learn the expert 'market' from\n--corpus FILE"),
        ((), {"questions": ["q.jsonl"]}, ConfigError, "--questions is given, but a causal language model's expert"),
        (("new_expert.corpus=[x.jsonl]",), {}, ConfigError, "a language model learns from data.documents"),
        (("new_expert.name=hill",), {}, BundleError, "there is an expert 'hill' already"),
        (("new_expert.joins=x",), {}, BundleError, "answers otherwise than the one that the expert was begun for"),
        (("train.what=all",), {}, ConfigError, "they go together\nragmoe experts add"),
        (("new_expert.first_token=1.0",), {}, ConfigError, "a language model finds nothing at its first token"),
        (("data.documents=[]", "data.questions=[q]"), {}, ConfigError, "language is given, but no data.documents"),
    ],
)
def test_what_cannot_be_added(
    bundle: Callable[..., Path],
    market: Callable[..., TrainingConfig],
    overrides: tuple[str, ...],
    settings: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        prepare(market(bundle(), *overrides, **settings))


def test_the_same_text_under_another_name_is_no_other_document(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], land: Path, tmp_path: Path
) -> None:
    """Files without ids are named by their place in the folder that was named."""
    draw, folder = random.Random(5), tmp_path / "docs" / "shop"
    folder.mkdir(parents=True)
    names = ["own.md", "unseen.md", "other.md"]
    for name in names:
        (folder / name).write_text(
            " ".join(draw.choice(("bread", "salt", "coin", "cart", "bell", "door")) for _ in range(60))
        )
    build_index(
        BuildOptions(
            (str(tmp_path / "docs"),), tmp_path / "index", encoder=StubEncoder(), chunk_words=30, chunk_overlap=0
        )
    )
    own, unseen = (str(folder / name) for name in names[:2])
    config = market(bundle(), index=tmp_path / "index", corpus=[own], judges=Judges(dev=[Path(unseen)]))
    run = prepare(config)
    assert run.new_expert is not None and run.new_expert.lesson is not None
    _, others = run.new_expert.lesson.batches.sides
    assert {document.doc_id for document in others.data.documents} == {"shop/other.md"}
