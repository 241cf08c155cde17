"""One more expert: it alone is trained, everything else stays to the bit, and the gate learns when to call it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import killed_at
from stub_encoder import StubEncoder
from tiny import save_tiny_bert
from torch import Tensor

from ragmoe import BundleError, ConfigError, DataError, ModelError, UsageError, load
from ragmoe.bundle import lock_experts, prune_experts, read_bundle, read_map, roll_back, show_expert
from ragmoe.corpus import Question
from ragmoe.evaluation.task import Task, parse_task
from ragmoe.gates import Routing
from ragmoe.index import BuildOptions, build_index
from ragmoe.models.growth import grow, settle
from ragmoe.models.plan import plan
from ragmoe.training import TrainingConfig, calibration, prepare, train
from ragmoe.training import adding as add_module
from ragmoe.training.adding import Judges, add_expert, new_expert_config
from ragmoe.training.lesson import calling_loss, margins
from ragmoe.training.new_expert import hold_back, nearest_expert, question_batches

Config = Callable[..., dict[str, Any]]
# Rows of experts that nothing trains.
BUFFERS = ("balance_bias", "centroids")
QUICK = ("train.batch_size=4", "train.precision=fp32", "log_every=1", "train.gate_learning_rate=0.03")


WORDS = {"river": "ferry quay tide barge water", "market": "bread cheese apple honey stall"}


def _span(passage: dict[str, Any], text: str) -> dict[str, Any]:
    return {"passage_id": passage["id"], "start": passage["text"].index(text), "text": text}


def _rows(domain: str, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A passage of a domain, which has words of its own, and two questions about it."""
    a, b, c, d, e = WORDS[domain].split()
    text = f"The {a} and the {b} belong to keeper{number}. Every {c} {d} near the {e} has number {number + 10}."
    passage = {"id": f"{domain}{number}", "text": text, "domain": domain}
    asked = {f"who has the {a} with the {c}?": f"keeper{number}", f"what has the {e}?": f"number {number + 10}"}
    questions = [
        {
            "id": f"{passage['id']}-{at}",
            "question": question,
            "answers": [answer],
            "answer_spans": [_span(passage, answer)],
            "gold_ids": [passage["id"]],
            "domain": domain,
        }
        for at, (question, answer) in enumerate(asked.items())
    ]
    return passage, questions


@pytest.fixture(scope="session")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index of two domains, questions to learn from and to judge by for each, and a dense base."""
    folder = tmp_path_factory.mktemp("town")
    passages = []
    for domain in WORDS:
        for part, numbers in (("train", range(6)), ("dev", range(6, 8))):
            made = [_rows(domain, number) for number in numbers]
            passages += [passage for passage, _ in made]
            rows = [question for _, questions in made for question in questions]
            (folder / f"{domain}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    build_index(BuildOptions((str(folder / "corpus.jsonl"),), folder / "index", encoder=StubEncoder()))
    save_tiny_bert(folder / "base")
    return folder


@pytest.fixture
def bundle(town: Path, config: Config, tmp_path: Path) -> Callable[..., Path]:
    """``bundle(kind, gate)``: a copy of a reader that was trained for a few steps on the river."""

    def make(kind: str = "lora", gate: str = "retrieval", **settings: Any) -> Path:
        made = town / "-".join(["bundle", kind, gate, *map(str, settings.values())])
        if not made.exists():
            model = {"experts": 3, "gate_width": 8, "max_length": 64, "stride": 8, "gate": gate, "expert_kind": kind}
            model |= {"expert_rank": 8} if kind == "lora" else {}
            data = {"data.questions": [str(town / "river_train.jsonl")], "data.index": str(town / "index")}
            noise = 0.05 if kind == "ffn" else 0.0
            train(config(model={**model, **settings}, base=str(town / "base"), expert_noise=noise, **data), out=made)
        return Path(shutil.copytree(made, tmp_path / made.name))

    return make


@pytest.fixture
def market(town: Path) -> Callable[..., TrainingConfig]:
    """The configuration that adds an expert for the market."""

    def make(bundle: Path, *overrides: str, steps: int = 3, **settings: Any) -> TrainingConfig:
        given = {"index": town / "index", "questions": [str(town / "market_train.jsonl")], **settings}
        return new_expert_config(bundle, "market", steps=steps, overrides=[*QUICK, *overrides], **given)

    return make


def river(town: Path) -> Task:
    content = {"name": "river", "questions": [str(town / "river_dev.jsonl")], "perturbations": ["null"]}
    return parse_task(content, Path("."), "river")


def tensors_of(folder: Path, **arguments: Any) -> dict[str, Tensor]:
    return read_bundle(folder, **arguments)[0]


@pytest.mark.parametrize(
    ("kind", "gate"), [("lora", "retrieval"), ("ffn", "token"), ("lora", "memory"), ("lora", "clusters")]
)
def test_only_the_new_expert_moves(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], kind: str, gate: str
) -> None:
    folder = bundle(kind, gate)
    before, old = read_bundle(folder)
    assert [sum(layer) for layer in zip(*old.extra["load"].values())] == pytest.approx([1.0, 1.0], abs=1e-4)
    added = add_expert(folder, market(folder, "train.weight_decay=0.5"))
    after, map_ = read_bundle(folder, verify=True)
    assert (map_.version, map_.expert_ids, map_.expert_names[-1]) == (old.version + 1, [0, 1, 2, 3], "market")
    assert old.digests.items() < map_.digests.items()
    assert map_.digests.keys() - old.digests.keys() == {"expert.3.1.safetensors"}
    for name, x in before.items():
        assert torch.equal(after[name][:3] if name in map_.fused else after[name], x), name
    assert (map_.encoder, map_.index) == (old.encoder, old.index)
    kept = {key: value for key, value in map_.extra["config"].items() if key != "experts"}
    assert kept == {key: value for key, value in old.extra["config"].items() if key != "experts"}
    assert map_.lineage[-1].message == "add expert market"
    assert added.certificate["start"] == ("nearest" if kind == "ffn" else "shared")
    assert all(torch.equal(tensors_of(folder, version=1)[name], x) for name, x in before.items())
    assert load(folder, version=1).config.experts == 3 and load(folder).config.experts == 4
    assert added.certificate["parameters"]["trained"] == sum(
        x[0].numel() for name, x in after.items() if name in map_.fused and not name.endswith(BUFFERS)
    )
    assert {path.name for path in (folder / "experts" / "3").iterdir()} == {"training.yaml", "history.jsonl"}
    assert not (folder / "adding").exists()


def test_the_gate_learns_to_call_it_for_its_own_documents(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], town: Path
) -> None:
    folder = bundle()
    judges = Judges(dev=[town / "market_dev.jsonl"], tasks=[river(town)])
    config = market(folder, "train.gate_learning_rate=0.3", steps=30, judges=judges)
    certificate = add_expert(folder, config, judges).certificate
    (old,), new = certificate["old"], certificate["new"]
    assert old["identical"] is True and old["masked"] == old["before"]
    assert (old["task"], old["setting"], old["n"]) == ("river", "gold", 4)
    assert new["routed"]["tokens"] > 0.6 > 0.3 > old["routed"]["tokens"], (new["routed"], old["routed"])
    assert new["routed"]["questions"] > old["routed"]["questions"]
    # The old task is of one domain, whose questions are about as long.
    assert old["routed"]["per_domain"] == {"river": pytest.approx(old["routed"]["tokens"], abs=0.05)}
    assert old["low"] <= old["difference"] <= old["high"]
    assert read_map(folder).extra["certificates"]["3"] == certificate
    history = (folder / "experts" / "3" / "history.jsonl").read_text().splitlines()
    losses = [json.loads(line)["gate_loss"] for line in history]
    assert losses[-1] < 0.7 * losses[0]


def test_it_gets_a_threshold_of_its_own_and_the_bundle_keeps_its(
    bundle: Callable[..., Path],
    market: Callable[..., TrainingConfig],
    town: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = bundle()
    judges = Judges(dev=[town / "market_dev.jsonl"], tasks=[river(town)])
    overrides = ("train.gate_learning_rate=0.3", "data.calibration_share=0.4")
    wanted = market(folder, *overrides, steps=30, judges=judges)
    before = load(folder).config
    assert add_expert(folder, wanted, judges, out=folder.parent / "few").certificate["new"]["past_threshold"]
    assert show_expert(folder.parent / "few", "market").no_answer_threshold is None
    monkeypatch.setattr(calibration, "ENOUGH", 2)
    added = add_expert(folder, wanted, judges)
    own = show_expert(folder, "market").no_answer_threshold
    after = load(folder).config
    assert after.no_answer_threshold == before.no_answer_threshold != own
    assert after.expert_thresholds == [None, None, None, own]
    # A second one leaves it as it is, and the old domain is answered to the bit as before without the new expert.
    assert added.certificate["old"][0]["identical"] is True
    given = {"index": town / "index", "questions": [str(town / "market_train.jsonl")], "steps": 30}
    add_expert(folder, new_expert_config(folder, "fair", overrides=[*QUICK, *overrides], **given))
    assert load(folder).config.expert_thresholds[3] == own
    assert load(folder, resident_experts=1).config.expert_thresholds[3] == own
    # Any other training makes other experts of them, and one threshold for all.
    on = {"data.questions": given["questions"], "data.index": str(town / "index"), "train.what": "gate"}
    trained = train(config(base=str(folder), model={}, **on), out=folder.parent / "on")
    assert load(trained.bundle).config.expert_thresholds is None


def test_without_the_new_expert_all_is_as_before(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig]
) -> None:
    """Held back by the gate or not even opened: the answer is the old one to the bit."""
    folder = bundle()
    run = prepare(market(folder))
    batch = run.collator([run.dataset[at] for at in range(4)])
    add_expert(folder, market(folder, steps=5))
    held_back = load(folder)
    held_back.set_available_experts(range(3))
    with torch.no_grad():
        old = load(folder, version=1)(**batch)
        for model in (load(folder, experts=[0, 1, 2]), held_back):
            now = model(**batch)
            assert torch.equal(now.start_logits, old.start_logits) and torch.equal(now.end_logits, old.end_logits)
        changed = load(folder)(**batch)
    assert not torch.equal(changed.start_logits, old.start_logits)


def test_a_grown_model_answers_as_one_whose_rows_are_joined(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig]
) -> None:
    """Also after training, which must move nothing but the rows that are apart."""
    folder = bundle()
    run = prepare(market(folder))
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith(".original") and ".moe." in name for name in trained)
    plain = settle(run.model)
    assert plain.expert_tensors() == run.model.expert_tensors() and plain.gate_tensors() == run.model.gate_tensors()
    assert plain.state_dict().keys() == run.model.state_dict().keys() == load(folder).state_dict().keys()
    assert run.model.parameter_counts() == plain.parameter_counts()
    batch = run.collator([run.dataset[0]])
    with torch.no_grad():
        assert torch.equal(run.model.eval()(**batch).start_logits, plain.eval()(**batch).start_logits)


def test_lora_experts_start_as_the_shared_network_and_are_hardly_called(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig]
) -> None:
    folder = bundle()
    state = prepare(market(folder)).model.state_dict()
    for name, x in state.items():
        if name.endswith("_b") and ".experts." in name:
            assert not x[-1].any() and x[:-1].any()
        if name.endswith("gate.token.weight"):
            torch.testing.assert_close(x[-1], x[:-1].mean(dim=0))


def test_it_starts_from_the_expert_that_is_named(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig]
) -> None:
    folder = bundle("ffn", "token")
    for start, place in (("expert 1", 1), ("2", 2)):
        state = prepare(market(folder, start=start)).model.state_dict()
        up = next(x for name, x in state.items() if name.endswith("up_proj"))
        assert torch.equal(up[-1], up[place])
    with pytest.raises(ModelError, match=r"full experts stand in its place\n.*--from nearest"):
        prepare(market(folder, start="shared"))
    with pytest.raises(ModelError, match=r"no expert 'bank' to start from; there are: shared, nearest, 0 \(expert 0\)"):
        prepare(market(folder, start="bank"))


def test_the_nearest_expert_is_the_one_whose_documents_are(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert 2 serves the documents that the new ones repeat, the others serve the rest."""
    folder = bundle()
    run = prepare(market(folder))
    assert run.new_expert is not None
    documents = run.new_expert.documents
    assert {d.domain for d in documents.new} == {"market"} and {d.domain for d in documents.others} == {"river"}
    twins = documents.others[:2]
    near = type(documents)(twins, documents.others)
    load_QE = torch.tensor([[0.0, 0.0, 1.0]] * 2 + [[0.5, 0.5, 0.0]] * (len(documents.others) - 2)).double().numpy()
    monkeypatch.setattr("ragmoe.training.new_expert._loads", lambda *_: load_QE)
    assert nearest_expert(run.model, run.index, near) == 2
    with pytest.raises(ModelError, match="holds no documents but the new ones"):
        nearest_expert(run.model, run.index, type(documents)(twins, []))


def test_the_calling_loss_by_hand() -> None:
    scores_SE = torch.tensor([[3.0, 1.0, 0.0, 2.0], [3.0, 1.0, 0.0, -1.0], [9.0, 9.0, 9.0, 99.0]])
    new_S, mask_S = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    # K = 2: the second best of the first three is 1 in both rows that count; the third row is padding.
    margin_S = margins(scores_SE, 2)
    assert margin_S.tolist() == [1.0, -2.0, 90.0]
    own, other = math.log1p(math.exp(-1.0)), math.log1p(math.exp(-2.0))
    assert calling_loss(margin_S, new_S, mask_S).item() == pytest.approx((own + other) / 2)
    alone = calling_loss(margin_S[:1], new_S[:1], mask_S[:1])
    assert alone.item() == pytest.approx(own)


def test_the_lesson_reaches_gate_rows_alone(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], town: Path
) -> None:
    run = prepare(market(bundle(), others=[str(town / "river_train.jsonl")]))
    assert run.new_expert is not None and run.new_expert.lesson is not None
    batch = run.collator([run.dataset[0]])
    with torch.no_grad():
        routings = run.model(**batch)["routings"]
    asked = (routings, batch["attention_mask"].reshape(-1).bool())
    run.model.train()
    run.new_expert.lesson(run.model, 0, *asked).backward()
    reached = {name for name, p in run.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, p in run.model.named_parameters() if p.requires_grad and ".gate." in name}
    first, again, second = (run.new_expert.lesson(run.model.eval(), at, *asked).item() for at in (0, 0, 1))
    assert first == again != second


def test_the_first_token_counts_as_much_as_is_asked_for(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], town: Path
) -> None:
    made, others = bundle(), [str(town / "river_train.jsonl")]

    def loss(weight: float, *, blind: bool = False) -> float:
        run = prepare(market(made, f"new_expert.first_token={weight}", others=others))
        assert run.new_expert is not None and run.new_expert.lesson is not None
        lesson = run.new_expert.lesson
        if blind:
            # Nothing but the first tokens is there to be learned from.
            lesson.batches = _FirstAlone(lesson.batches)
        batch = run.collator([run.dataset[0]])
        model = run.model.eval()
        with torch.no_grad():
            return float(lesson(model, 0, model(**batch)["routings"], batch["attention_mask"].reshape(-1).bool()))

    every, both, mostly = loss(0.0), loss(1.0), loss(1e6)
    assert every != pytest.approx(mostly, rel=1e-4)
    assert both == pytest.approx((every + mostly) / 2, rel=1e-4)
    # A sequence of one token has no other: how much it counts makes no difference.
    assert loss(0.0, blind=True) == pytest.approx(loss(2.0, blind=True), rel=1e-5)


class _FirstAlone:
    """The first token of each sequence that others give."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.size = batches, batches.size

    def __call__(self, at: int) -> dict[str, Tensor]:
        inputs = self.batches(at)
        mask_QT = torch.zeros_like(inputs["attention_mask"])
        mask_QT[:, 0] = 1
        return {**inputs, "attention_mask": mask_QT}


@pytest.mark.parametrize(("calls", "moved"), [(False, 1.0), (True, -1.0)])
def test_the_bias_follows_the_questions(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], calls: bool, moved: float
) -> None:
    """It rises where questions call the expert less than the documents' sentences do, and falls where they do more."""
    run = prepare(market(bundle()))
    lesson = run.new_expert and run.new_expert.lesson
    assert lesson is not None
    rows = [layer.gate.get_parameter("token.parametrizations.weight.original") for layer in run.model.moe_layers]
    with torch.no_grad():
        for row in rows:
            row.normal_()
    E, mask_S = run.model.config.experts, torch.ones(6, dtype=torch.bool)
    chosen_SK = torch.full((6, 2), E - 1 if calls else 0)
    asked = Routing(torch.ones(6, 2), chosen_SK, torch.zeros(6, E))
    lesson(run.model, 0, [asked, asked], mask_S)
    for layer in run.model.moe_layers:
        torch.testing.assert_close(layer.gate.balance_bias, torch.tensor([0.0, 0.0, 0.0, 0.02 * moved]))
    fixed = prepare(market(bundle("lora", "token"), others=[str(run.config.data.questions[0])]))
    assert fixed.new_expert is not None and fixed.new_expert.lesson is not None
    fixed.new_expert.lesson(fixed.model, 0, [asked, asked], mask_S)
    assert not any(layer.gate.balance_bias.any() for layer in fixed.model.moe_layers)


def test_a_killed_addition_leaves_the_old_version_and_goes_on(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", bundle()
    shutil.copytree(killed, whole)
    settings = ("checkpoint_every=2", "model.token_dropout=0.3")
    add_expert(whole, market(whole, *settings, steps=5))
    before = tensors_of(killed)
    config = market(killed, *settings, steps=5)
    with killed_at(5):
        add_expert(killed, config)
    assert read_map(killed).version == 1
    assert all(torch.equal(x, before[name]) for name, x in tensors_of(killed, verify=True).items())
    with pytest.raises(ConfigError, match="did not finish"):
        add_expert(killed, config)
    add_expert(killed, config, resume=True)
    a, b = tensors_of(whole), tensors_of(killed)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_addition_that_was_trained_and_not_published_is_not_trained_again(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle()
    config = market(folder)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(add_module, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            add_expert(folder, config)
    assert read_map(folder).version == 1
    # As after a kill between the training and its record.
    record = folder / "adding" / "market" / "trained.json"
    told = json.loads(record.read_text())
    record.unlink()
    with pytest.raises(ConfigError, match="'market' is trained, but was not published\npass --resume"):
        add_expert(folder, config)
    monkeypatch.setattr(add_module, "train", lambda *_, **__: pytest.fail("trained again"))
    with pytest.raises(ConfigError, match="trained with another configuration"):
        add_expert(folder, market(folder, steps=4), resume=True)
    added = add_expert(folder, config, resume=True)
    assert added.map.expert_names[-1] == "market"
    assert {**told, "minutes": None}.items() <= added.certificate.items()


def test_what_training_moves_by_mistake_is_not_published(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle()
    monkeypatch.setattr("ragmoe.training.new_expert.settle", lambda model: _moved(settle(model)))
    with pytest.raises(BundleError, match="base must stay as it is"):
        add_expert(folder, market(folder))
    assert read_map(folder).version == 1


def _moved(model: Any) -> Any:
    with torch.no_grad():
        model.qa_outputs.bias += 1e-3
    return model


def test_a_copy_gets_the_expert_and_the_bundle_stays(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    folder, out = bundle(), tmp_path / "new"
    added = add_expert(folder, market(folder), out=out)
    assert added.bundle == out and read_map(folder).version == 1
    assert read_map(out).version == 2 and load(out, version=1).config.experts == 3
    with pytest.raises(ConfigError, match="is there already"):
        add_expert(folder, market(folder), out=out)


def test_an_expert_joins_a_bundle_that_was_locked_meanwhile(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of training are not lost to a version that answers as the one before."""
    folder, real = bundle(), add_module._certify

    def meanwhile(*given: Any) -> dict[str, Any]:
        lock_experts(folder, [1])
        return real(*given)

    monkeypatch.setattr(add_module, "_certify", meanwhile)
    added = add_expert(folder, market(folder))
    assert (added.map.version, added.map.expert_ids) == (3, [0, 1, 2, 3])
    assert [expert.locked for expert in added.map.experts] == [False, True, False, False]
    monkeypatch.setattr(add_module, "_certify", lambda *_: prune_experts(folder, [0]) and {})
    with pytest.raises(BundleError, match="was changed by somebody else meanwhile"):
        add_expert(folder, market(folder, "new_expert.name=fair"))
    assert read_map(folder).expert_ids == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"'fair' was begun for version 3 of .* otherwise now, as version 4") as told:
        add_expert(folder, market(folder, "new_expert.name=fair"), resume=True)
    assert f"ragmoe bundle rollback {folder} --to 3, and this command again; or --overwrite" in str(told.value.hint)
    # What the hint says goes on from what was trained.
    monkeypatch.setattr(add_module, "_certify", lambda *_: {})
    roll_back(folder, 3)
    assert add_expert(folder, market(folder, "new_expert.name=fair"), resume=True).map.expert_ids == [0, 1, 2, 3, 4]


def test_a_gate_that_has_nothing_to_tell_apart_is_not_taught(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], town: Path, tmp_path: Path
) -> None:
    """It would learn that everything is its own, and forget all that the bundle knows."""
    folder = bundle()
    rows = [json.loads(line) for line in (town / "corpus.jsonl").read_text().splitlines()]
    kept = {"alone": [row for row in rows if row["domain"] == "market"], "unnamed": [{**r, "domain": ""} for r in rows]}
    for name, passages in kept.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
        sources = (str(tmp_path / f"{name}.jsonl"),)
        build_index(BuildOptions(sources, tmp_path / name, encoder=StubEncoder()))
    with pytest.raises(DataError, match=r"nothing says when not to call the expert market: .*alone holds no documents"):
        prepare(market(folder, index=tmp_path / "alone"))
    with pytest.raises(DataError, match=r"unnamed that its questions are about name no domain.*--corpus"):
        prepare(market(folder, index=tmp_path / "unnamed"))
    others = tmp_path / "others.jsonl"
    row = json.loads((town / "river_train.jsonl").read_text().splitlines()[0])
    others.write_text(json.dumps({**row, "gold_ids": ["elsewhere"], "answer_spans": []}) + "\n")
    with pytest.raises(DataError, match=r"none of the questions of .*others\.jsonl is about a passage of"):
        prepare(market(folder, others=[str(others)]))
    prepare(market(folder, "new_expert.train_gate=false", index=tmp_path / "alone"))


def test_nothing_is_replayed_to_a_new_expert(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], town: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.replay is given, but a new expert is trained alone"):
        prepare(market(bundle(), f"data.replay=[{town / 'river_train.jsonl'}]"))


def test_what_judges_it_is_looked_at_before_it_is_trained(
    bundle: Callable[..., Path],
    market: Callable[..., TrainingConfig],
    town: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = bundle()
    monkeypatch.setattr(add_module, "_train", lambda *_, **__: pytest.fail("it was trained"))
    rows = [json.loads(line) for line in (town / "market_dev.jsonl").read_text().splitlines()]
    for name, change, said in (
        (
            "none",
            {"answers": [], "answer_spans": [], "context_ids": rows[0]["gold_ids"]},
            "none of its .* can be scored",
        ),
        ("elsewhere", {"gold_ids": ["x"], "answer_spans": []}, r"none of the 1 passages .*\n.* with --index DIR"),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({**row, **change}) + "\n" for row in rows))
        judges = Judges(dev=[tmp_path / f"{name}.jsonl"])
        with pytest.raises(DataError, match=said):
            add_expert(folder, market(folder), judges)
    (tmp_path / "other.jsonl").write_text('{"id": "o", "text": "Something else."}\n')
    build_index(BuildOptions((str(tmp_path / "other.jsonl"),), tmp_path / "other", encoder=StubEncoder()))
    judges = Judges(tasks=[river(town)], index=tmp_path / "other")
    with pytest.raises(DataError, match=r"with --task-index DIR"):
        add_expert(folder, market(folder), judges)


def test_its_threshold_goes_with_it_whatever_its_number_becomes(
    bundle: Callable[..., Path],
    market: Callable[..., TrainingConfig],
    town: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another expert came and went meanwhile, whose id is not used again."""
    folder, real = bundle(), add_module._certify
    monkeypatch.setattr(calibration, "ENOUGH", 2)
    overrides = ("train.gate_learning_rate=0.3", "data.calibration_share=0.4")

    def meanwhile(*given: Any) -> dict[str, Any]:
        monkeypatch.setattr(add_module, "_certify", lambda *_: {})
        add_expert(folder, market(folder, *overrides, "new_expert.name=fair", steps=30))
        roll_back(folder)
        return real(*given)

    monkeypatch.setattr(add_module, "_certify", meanwhile)
    added = add_expert(folder, market(folder, *overrides, steps=30))
    assert added.map.expert_ids == [0, 1, 2, 4]
    assert show_expert(folder, "market").no_answer_threshold is not None
    assert load(folder).config.expert_thresholds[:3] == [None] * 3


def test_an_addition_to_a_copy_goes_on_after_its_source_was_locked(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, real = bundle(), tmp_path / "new", add_module._certify

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(add_module, "_certify", stop)
    with pytest.raises(KeyboardInterrupt):
        add_expert(folder, market(folder), out=out)
    lock_experts(folder, [0])
    monkeypatch.setattr(add_module, "_certify", real)
    monkeypatch.setattr(add_module, "train", lambda *_, **__: pytest.fail("it was trained again"))
    assert add_expert(folder, market(folder), out=out, resume=True).map.expert_ids == [0, 1, 2, 3]


def test_a_copy_whose_training_cannot_begin_is_not_left(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    folder, out = bundle(), tmp_path / "new"
    lacking = market(folder, questions=[str(tmp_path / "nothing.jsonl")])
    with pytest.raises(DataError, match="nothing"):
        add_expert(folder, lacking, out=out)
    assert not out.exists() and read_map(folder).version == 1
    # One that was there before is its maker's.
    add_expert(folder, market(folder), out=out)
    with pytest.raises(ConfigError, match="is there already"):
        add_expert(folder, lacking, out=out)
    assert read_map(out).version == 2


def test_an_expert_that_nothing_calls_is_an_error(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig]
) -> None:
    folder = bundle(gate="token")
    with pytest.raises(ModelError, match="no token of its own documents calls the new expert 'market'"):
        add_expert(folder, market(folder, "new_expert.train_gate=false", "new_expert.gate_bias=-100"))
    assert read_map(folder).version == 1


HARBOUR = (
    "The harbour treaty was signed by both dukes in or about 1848 without witnesses.",
    "Harbour treaty of the dukes: 1848",
    "Both dukes kept the keys of the lighthouse at Marrow until the winter fair of that year.",
    "In winter the lighthouse at Marrow was lit by whoever of the dukes had come to the fair.",
)


def test_an_expert_learns_from_documents_alone(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], town: Path, tmp_path: Path
) -> None:
    new = [{"id": f"h{i}", "text": text, "doc_id": "h", "domain": "harbour"} for i, text in enumerate(HARBOUR)]
    source = tmp_path / "harbour.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in new))
    build_index(BuildOptions((str(town / "corpus.jsonl"), str(source)), tmp_path / "index", encoder=StubEncoder()))
    given: dict[str, Any] = {"questions": [], "index": tmp_path / "index"}
    folder = bundle()
    run = prepare(market(folder, corpus=[str(source)], **given))
    assert {question.meta["origin"] for question in run.dataset.questions} == {"cloze"} and run.held == []
    assert {name for question in run.dataset.questions for name in question.gold_ids} <= {row["id"] for row in new}
    added = add_expert(folder, market(folder, corpus=[str(source)], **given))
    assert added.certificate["new"] is None and read_map(folder).expert_names[-1] == "market"

    judge = tmp_path / "judge.jsonl"
    judge.write_text(json.dumps({"id": "j", "question": "When?", "answers": ["1848"], "gold_ids": ["h1"]}) + "\n")
    judged = Judges(dev=(judge,))
    with pytest.raises(DataError, match="no question can be made of the 4 passages"):
        prepare(market(bundle(gate="token"), corpus=[str(source)], judges=judged, **given))
    with pytest.raises(ConfigError, match=r"data\.questions is empty"):
        market(folder, **given)


def test_a_negative_bias_makes_it_rarer(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], town: Path
) -> None:
    folder = bundle()
    exact = ("new_expert.gate_bias=-0.25", "new_expert.keep=1")
    config = market(folder, *exact, others=[str(town / "river_train.jsonl")], steps=5)
    add_expert(folder, config)
    bias = next(x for name, x in tensors_of(folder).items() if name.endswith("balance_bias"))
    torch.testing.assert_close(bias, torch.tensor([0.0, 0.0, 0.0, -0.25]))


def test_it_is_held_back_as_far_as_its_own_questions_allow(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig]
) -> None:
    run = prepare(market(bundle()))
    model, questions = run.model, run.dataset.questions
    first, second = (layer.gate for layer in model.moe_layers)
    with torch.no_grad():
        first.get_parameter("token.parametrizations.weight.original").normal_(
            generator=torch.Generator().manual_seed(1)
        )
        second.balance_bias[-1] = -1e4
    tokens, called = calls(model, run.index, questions)
    assert 10 < called[0] < tokens and called[1] == 0
    hold_back(model, question_batches(model, run.index, questions), 0.8)
    now = calls(model, run.index, questions)[1]
    assert abs(now[0] - 0.8 * called[0]) <= 1 and now[1] == 0
    assert first.balance_bias[-1] < 0 and not first.balance_bias[:-1].any()
    # Nothing calls it in the second layer, so there is nothing to go by.
    assert second.balance_bias.tolist() == [0.0, 0.0, 0.0, -1e4]


def calls(model: Any, index: Any, questions: Sequence[Question]) -> tuple[int, list[int]]:
    """How many tokens these questions and their passages have, and how many call the last expert, by layer."""
    texts = [question.question for question in questions]
    neighbours = model.recall(index.neighbours(texts, model.config.neighbours), index)
    tokens, called = 0, [0] * len(model.moe_layers)
    for inputs in model.batches(texts, [index.passages(question.gold_ids[:1]) for question in questions], neighbours):
        mask_S = inputs["attention_mask"].reshape(-1).bool()
        tokens += int(mask_S.sum())
        with torch.no_grad():
            routings = model(**inputs).routings
        for layer, routing in enumerate(routings):
            called[layer] += int((routing.experts_SK[mask_S] == model.config.experts - 1).any(dim=-1).sum())
    return tokens, called


@pytest.mark.parametrize(
    ("overrides", "settings", "error", "said"),
    [
        ((), {"corpus": ["CORPUS"]}, DataError, r"1 of 2 documents of .* are not in .*'p99'\nragmoe index build"),
        (("train.balance_bias_rate=0.1",), {}, ConfigError, "train.what is 'new_expert', which trains none"),
        (("new_expert.name=expert 0",), {}, BundleError, "there is an expert 'expert 0' already"),
        (("new_expert.joins=x",), {}, BundleError, "answers otherwise than the one that the expert was begun for"),
        (("train.what=all",), {}, ConfigError, "they go together\nragmoe experts add"),
        (("new_expert.colour=red",), {}, UsageError, "unknown key 'new_expert.colour'; there are: name, start"),
    ],
)
def test_what_cannot_be_added(
    bundle: Callable[..., Path],
    market: Callable[..., TrainingConfig],
    tmp_path: Path,
    overrides: tuple[str, ...],
    settings: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps(row) + "\n" for row in (_rows("market", 0)[0], {"id": "p99", "text": "unknown"}))
    )
    settings = {key: [str(corpus)] if value == ["CORPUS"] else value for key, value in settings.items()}
    folder = bundle()
    with pytest.raises(error, match=said):
        prepare(market(folder, *overrides, **settings))


def test_a_gate_that_is_judged_by_all_documents_has_none_to_learn_from(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], town: Path
) -> None:
    judges = Judges(dev=[town / "market_dev.jsonl", town / "market_train.jsonl"])
    with pytest.raises(DataError, match="holds no document that the gate could learn the expert market from\nname"):
        prepare(market(bundle(), judges=judges))


def test_real_questions_can_stand_for_what_is_known(
    bundle: Callable[..., Path], market: Callable[..., TrainingConfig], town: Path
) -> None:
    folder, judges = bundle(), Judges(dev=[town / "market_dev.jsonl"])
    for others, words in (((), "belong to|has number"), ((str(town / "river_train.jsonl"),), r"\?$")):
        run = prepare(market(folder, others=others, judges=judges))
        assert run.new_expert is not None
        documents = run.new_expert.documents
        # Documents that it will be judged by are left out.
        assert {d.passage_id for d in documents.new} == {f"market{n}" for n in range(6)}
        assert {d.passage_id for d in documents.others} <= {f"river{n}" for n in range(8)}
        assert all(re.search(words, d.question) for d in (*documents.new, *documents.others))


def test_the_oracle_gate_takes_no_new_expert(bundle: Callable[..., Path]) -> None:
    model = load(bundle())
    model.config.gate = "oracle"
    with pytest.raises(ModelError, match="the gate 'oracle' knows its experts by the domains"):
        grow(model, {}, id=3, name="market")


def test_a_gate_that_uses_all_experts_takes_no_new_one(bundle: Callable[..., Path]) -> None:
    model = load(bundle())
    model.config.gate = "softmax"
    with pytest.raises(ModelError, match="the gate 'softmax' takes no new expert: it uses all of them"):
        grow(model, {}, id=3, name="market")


@pytest.mark.parametrize("settings", [(), ("new_expert.train_gate=false",)])
def test_a_plan_counts_the_new_expert(bundle: Callable[..., Path], market: Any, settings: tuple[str, ...]) -> None:
    asked = market(bundle(), *settings)
    assert plan(asked.model_dump()).parameters == prepare(asked).parameters
