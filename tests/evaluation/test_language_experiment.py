"""An experiment with language models, from training to its result: resumed, compared, and shown other neighbours."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stub_encoder import StubEncoder
from tiny_decoder import byte_tokenizer, tiny_llama

from ragmoe import ConfigError, DataError, Index
from ragmoe.bundle import read_bundle, read_map
from ragmoe.evaluation.experiment import LanguageExperiment, load_experiment
from ragmoe.evaluation.experiment_run import run_experiment
from ragmoe.evaluation.language_experiment import run_language_experiment
from ragmoe.evaluation.language_report import report_language_experiment
from ragmoe.evaluation.language_results import FILE, LanguageResults
from ragmoe.evaluation.result import Result
from ragmoe.index import BuildOptions, build_index
from ragmoe.models.initialising import init

WORDS = {"river": "ferry quay tide barge mast rope", "market": "bread cheese apple honey scale coin"}
SPARSE = {"experts": 2, "top_k": 1, "expert_kind": "lora", "expert_rank": 8, "gate_width": 8}


def documents(split: int) -> str:
    draw, rows = random.Random(split), []
    for domain, words in WORDS.items():
        for at in range(3):
            text = " ".join(draw.choice(words.split()) for _ in range(30))
            rows.append({"id": f"{domain}-{split}-{at}", "text": text, "domain": domain})
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents to learn from and others to predict, an index of the former, a base, and the experiment."""
    folder = tmp_path_factory.mktemp("language")
    for split, name in enumerate(("train", "valid")):
        (folder / f"{name}.jsonl").write_text(documents(split))
    source = (str(folder / "train.jsonl"),)
    build_index(
        BuildOptions(source, folder / "index", encoder=StubEncoder(), chunk_words=10, chunk_overlap=0, rechunk=True)
    )
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    names = ["river", "market"]
    spec: dict[str, Any] = {
        "name": "small",
        "index": "index",
        "documents": ["valid.jsonl"],
        "perturbations": [None, "shuffled"],
        "train": {
            "base": "base",
            "model": SPARSE,
            "data": {"documents": ["train.jsonl"]},
            "language": {"chunk_tokens": 48, "context_tokens": 8, "neighbours": 3},
            "train": {"steps": 3, "batch_size": 4, "learning_rate": 5e-3, "precision": "fp32"},
            "checkpoint_every": 0,
            "log_every": 1,
        },
        "arms": {
            "dense": {"model.gate": "token", "model.experts": 1},
            "retrieval": {"model.gate": "retrieval"},
            "oracle": {"model.gate": "oracle", "model.expert_names": names},
        },
        "untrained": {"untrained": "retrieval"},
        "comparisons": [["retrieval", "dense"], ["dense", "untrained"]],
        "notes": {"dense": "one expert"},
        "result": "result.json",
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return folder


@pytest.fixture(autouse=True)
def _stub_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ragmoe.index.folder.load_encoder", lambda name: name if not isinstance(name, str) else StubEncoder()
    )


def load(folder: Path) -> LanguageExperiment:
    found = load_experiment(folder / "experiment.yaml")
    assert isinstance(found, LanguageExperiment)
    return found


def test_from_training_to_the_result_and_taken_up_again(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    part = run_language_experiment(load(folder), out=tmp_path, only=["dense"], say=said.append)
    assert part.missing == ["untrained seed 0", "retrieval seed 0", "oracle seed 0"]
    assert part.result.command.endswith(" --only dense")
    assert not (folder / "result.json").exists()
    said.clear()
    shown: list[tuple[str, int, int]] = []
    whole = run_language_experiment(
        load(folder), out=tmp_path, say=said.append, index_progress=lambda *step: shown.append(step)
    )
    assert not whole.missing and "dense, seed 0: trained already" in said
    assert [line for line in said if "predicting" in line] == [
        f"{arm}, seed 0: predicting 6 documents" for arm in ("untrained", "retrieval", "oracle")
    ]
    # Whatever takes long is seen to go on, and to come to its end.
    ended = {name for name, done, total in shown if done == total}
    assert {"retrieving neighbours", "chunks", "null neighbours", "shuffled neighbours"} <= ended
    result = Result.read(folder / "result.json")
    arms = result.arms
    assert arms["dense"].perplexity < arms["untrained"].perplexity
    assert set(arms["dense"].per_domain) == set(WORDS) and arms["dense"].per_domain["river"].f1 is None
    # Each domain has one expert, and the oracle always takes it.
    assert arms["oracle"].normalised_mi == pytest.approx(1.0) and arms["dense"].normalised_mi is None
    assert [c.metric for c in result.comparisons] == ["perplexity_percent", "perplexity"] * 6
    pairs = [(c.a, c.b, c.setting) for c in result.comparisons[::2]]
    assert pairs == [
        ("retrieval", "dense", "valid"),
        ("dense", "untrained", "valid"),
        ("untrained", "untrained", "valid+null"),
        ("untrained", "untrained", "valid+shuffled"),
        ("retrieval", "retrieval", "valid+null"),
        ("retrieval", "retrieval", "valid+shuffled"),
    ]
    drop, points = result.comparisons[2:4]
    assert drop.metric == "perplexity_percent" and drop.high < 0
    assert drop.difference == pytest.approx(
        100 * (arms["dense"].perplexity / arms["untrained"].perplexity - 1), rel=1e-6
    )
    assert points.difference == pytest.approx(arms["dense"].perplexity - arms["untrained"].perplexity)
    text = (folder / "result.md").read_text()
    expected = ("### Perplexity", "### Comparisons", "by domain, %", "- dense: one expert", "valid+shuffled")
    for words in (*expected, "### Perplexity while training, against dense, %"):
        assert words in text


def test_documents_that_are_learned_from_are_told(folder: Path, tmp_path: Path) -> None:
    spec = yaml.safe_load((folder / "experiment.yaml").read_text())
    spec["documents"] = {"both": ["valid.jsonl", "train.jsonl"], "own": ["valid.jsonl"]}
    (folder / "both.yaml").write_text(yaml.safe_dump({**spec, "perturbations": [], "result": None}))
    experiment, said = load_experiment(folder / "both.yaml"), []
    assert isinstance(experiment, LanguageExperiment)
    run_language_experiment(experiment, out=tmp_path, only=["dense"], say=said.append)
    told = [line for line in said if "learned from" in line]
    assert len(told) == 1 and told[0].startswith("6 of the 12 documents to be predicted (both) are learned from")


def test_an_untrained_retrieval_gate_makes_nothing_of_neighbours(folder: Path, tmp_path: Path) -> None:
    experiment = load(folder)
    run_language_experiment(experiment, out=tmp_path, only=["untrained"])
    found = LanguageResults.load(tmp_path / "untrained" / "seed-0")
    assert found is not None
    assert found.losses["real"] == found.losses["null"] == found.losses["shuffled"]
    # All bytes and none twice.
    rows = [json.loads(line) for line in (folder / "valid.jsonl").read_text().splitlines()]
    assert [loss.tokens for loss in found.losses["real"]] == [len(row["text"].encode()) for row in rows]
    (tmp_path / "untrained" / "seed-0" / FILE).write_text("{")
    with pytest.raises(DataError, match="holds nothing of the experiment small"):
        report_language_experiment(experiment, out=tmp_path)


def test_an_untrained_cluster_gate_has_its_clusters(folder: Path, tmp_path: Path) -> None:
    """Before training it is what the arm begins as, whose neighbours vote."""
    spec = yaml.safe_load((folder / "experiment.yaml").read_text())
    del spec["notes"], spec["comparisons"]
    spec |= {
        "index": str(folder / "index"), "documents": [str(folder / "valid.jsonl")], "untrained": {"before": "clusters"},
        "arms": {"clusters": {"model.gate": "clusters", "model.vote_start": 8.0}},
    }  # fmt: skip
    spec["train"]["data"]["documents"], spec["train"]["base"] = [str(folder / "train.jsonl")], str(folder / "base")
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    experiment = load_experiment(tmp_path / "clusters.yaml")
    assert isinstance(experiment, LanguageExperiment)
    run_language_experiment(experiment, out=tmp_path / "out", only=["before"])
    found = LanguageResults.load(tmp_path / "out" / "before" / "seed-0")
    # Two experts that are equally likely have .69.
    assert found is not None and found.routing is not None and found.routing["gate_entropy"] < 0.4


def arriving(folder: Path, tmp_path: Path, known: str = "river") -> dict[str, Any]:
    """An experiment in which an expert for the market arrives, as its file gives it, without arms."""
    given = {**SPARSE, "neighbour_width": 64, "expert_names": [known, "spare"]}
    init(folder / "base", out=tmp_path / "start", gate="memory", vote_start=8.0, **given)
    for name in WORDS:
        kept = [line for line in documents(1).splitlines() if f'"domain": "{name}"' in line]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
    spec = yaml.safe_load((folder / "experiment.yaml").read_text())
    spec["train"] |= {"base": str(tmp_path / "start"), "new_expert": {"name": "market"}}
    spec["train"]["train"] |= {"what": "new_expert", "steps": 2}
    spec["train"]["data"] = {"documents": [str(folder / "train.jsonl")], "without": ["river"], "calibration_share": 0.0}
    del spec["train"]["model"], spec["perturbations"], spec["notes"]
    return spec | {"index": str(folder / "index"), "documents": {"old": ["river.jsonl"], "new": ["market.jsonl"]}}


def test_settings_are_measured_apart_where_an_expert_arrives(folder: Path, tmp_path: Path) -> None:
    """One arm grows by an expert for a domain, one is trained whole; old and new documents are compared apart."""
    spec = arriving(folder, tmp_path)
    spec |= {
        "arms": {"added": {"new_expert.train_gate": False}, "full": {"new_expert": None, "train.what": "all"}},
        "untrained": {"before": "added"},
        "comparisons": [["added", "before"], ["full", "before"]],
    }
    (tmp_path / "late.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    experiment = load_experiment(tmp_path / "late.yaml")
    assert isinstance(experiment, LanguageExperiment)
    outcome = run_language_experiment(experiment, out=tmp_path / "out")
    assert not outcome.missing
    assert [(c.a, c.setting, c.metric) for c in outcome.result.comparisons] == [
        (arm, setting, metric)
        for setting in ("old", "new")
        for arm in ("added", "full")
        for metric in ("perplexity_percent", "perplexity")
    ]
    assert set(outcome.result.arms["before"].per_domain) == {"river"}
    text = (tmp_path / "out" / "result.md").read_text()
    for words in ("### Perplexity, old", "### Perplexity, new", "fall on the last expert", "by domain, %, new"):
        assert words in text
    added = LanguageResults.load(tmp_path / "out" / "added" / "seed-0" / "new")
    assert added is not None and added.routing is not None and added.routing["layers"][0]["load"][-1] > 0.3
    assert {path.parent.name for path in (tmp_path / "out").rglob(FILE)} == {"old", "new"}
    (tmp_path / "out" / "full" / "seed-0" / "new" / FILE).unlink()
    assert report_language_experiment(experiment, out=tmp_path / "out").missing == ["full seed 0"]


def test_arms_may_be_joined_of_others(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts are trained apart; where both are, each is what it was, and made anew where one is trained anew."""
    spec = arriving(folder, tmp_path, known="other")
    kept = {"new_expert.train_gate": False}
    spec |= {
        "arms": {"market": kept, "river": {**kept, "new_expert.name": "river", "data.without": ["market"]}},
        "untrained": {"before": "market"},
        "joined": {"both": ["market", "river"]},
        "comparisons": [["both", "before"]],
    }
    (tmp_path / "late.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    experiment, out, said = load_experiment(tmp_path / "late.yaml"), tmp_path / "out", []
    assert isinstance(experiment, LanguageExperiment)
    outcome = run_language_experiment(experiment, out=out, only=["both"], say=said.append)
    # The others are trained for it, and not measured.
    assert outcome.missing == ["before seed 0", "market seed 0", "river seed 0"]
    bundles = {arm: out / arm / "seed-0" / "bundle" for arm in ("market", "river", "both")}
    assert [read_map(path).expert_names[2:] for path in bundles.values()] == [
        ["market"],
        ["river"],
        ["market", "river"],
    ]
    states = [read_bundle(path)[0] for path in bundles.values()]
    for name in read_map(bundles["both"]).fused:
        market, river, both = (state[name] for state in states)
        assert torch.equal(both, torch.cat([market, river[-1:]]))
    outcome = run_language_experiment(experiment, out=out, say=said.append)
    assert not outcome.missing and "both, seed 0: joined already" in said
    assert list(outcome.result.arms) == ["before", "market", "river", "both"]
    assert said.count("both, seed 0: joining market, river") == 1
    # One of them is trained anew: what was joined of the other is no more. Stopped meanwhile, it is not there at all.
    for part in ("river", "market"):
        shutil.rmtree(out / part)
        spec["arms"][part]["train.steps"] = 3
        (tmp_path / "late.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
        again = load_experiment(tmp_path / "late.yaml")
        assert isinstance(again, LanguageExperiment)
        with monkeypatch.context() as patch:
            patch.setattr("ragmoe.evaluation.experiment_run.shutil.copytree", stopped)
            with pytest.raises(KeyboardInterrupt):
                run_language_experiment(again, out=out, only=["both"])
        said.clear()
        run_language_experiment(again, out=out, only=["both"], say=said.append)
        assert "both, seed 0: joining market, river" in said
        assert "both, seed 0: predicting 3 documents of the setting new" in said
    trained = [read_bundle(bundles[part])[0] for part in ("market", "river", "both")]
    name = read_map(bundles["both"]).fused[0]
    assert torch.equal(trained[2][name], torch.cat([trained[0][name], trained[1][name][-1:]]))


def stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"new_expert": None, "train.what": "all"}, "both is of second: expected an arm that trains a new expert"),
        ({"train.steps": 3}, "several of first, second add an expert 'market'"),
        ({"new_expert.name": "fair", "base": "elsewhere"}, "first, second begin from .*; expected one base"),
    ],
)
def test_what_cannot_be_joined_is_told_before_anything_is_trained(
    folder: Path, tmp_path: Path, second: dict[str, Any], message: str
) -> None:
    spec = arriving(folder, tmp_path)
    shutil.copytree(tmp_path / "start", tmp_path / "elsewhere")
    arms = {"first": {"new_expert.train_gate": False}, "second": second}
    for order in ([*arms], [*reversed(arms)]):
        spec |= {"arms": arms, "joined": {"both": order}, "comparisons": [], "untrained": False}
        (tmp_path / "late.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
        experiment = load_experiment(tmp_path / "late.yaml")
        assert isinstance(experiment, LanguageExperiment)
        with pytest.raises(ConfigError, match=message.replace("first, second", ", ".join(order))):
            run_language_experiment(experiment, out=tmp_path / "out")
    assert not (tmp_path / "out" / "first").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["t.yaml"]}, "tasks"),
        ({"perturbations": ["wrong_domain"]}, "perturbations"),
        ({"documents": []}, "documents"),
        ({"documents": {"old": []}}, "'old': expected a name of letters"),
        ({"documents": {"../old": ["valid.jsonl"]}}, "'../old': expected a name of letters"),
    ],
)
def test_what_it_may_not_say(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    spec = {**yaml.safe_load((folder / "experiment.yaml").read_text()), **changes}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.raises(ConfigError, match=message):
        load_experiment(tmp_path / "experiment.yaml")


def test_the_command_line_knows_it_by_its_documents(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from ragmoe.cli.main import app

    monkeypatch.chdir(tmp_path)
    file = os.path.relpath(folder / "experiment.yaml")
    runner: Callable[..., Any] = CliRunner().invoke
    made = runner(app, ["eval", "experiment", file, "--only", "untrained", "--out", "out"])
    assert made.exit_code == 0 and "Perplexity" in made.output
    again = runner(app, ["eval", "report", file, "--out", "out", "--json"])
    assert again.exit_code == 0 and '"perplexity":' in again.output


def test_an_arm_of_a_plain_model_is_not_trained_twice(folder: Path, tmp_path: Path) -> None:
    spec = yaml.safe_load((folder / "experiment.yaml").read_text())
    del spec["train"]["model"], spec["untrained"], spec["result"]
    spec |= {"name": "plain", "arms": {"dense": {}}, "comparisons": []}
    (folder / "plain.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    experiment = load_experiment(folder / "plain.yaml")
    assert isinstance(experiment, LanguageExperiment)
    run_language_experiment(experiment, out=tmp_path)
    said: list[str] = []
    assert not run_language_experiment(experiment, out=tmp_path, say=said.append).missing
    assert said == ["dense, seed 0: trained already"]


def test_figures_of_another_model_do_not_count(folder: Path, tmp_path: Path) -> None:
    run_language_experiment(load(folder), out=tmp_path, only=["dense"])
    shutil.rmtree(tmp_path / "dense" / "seed-0" / "bundle")
    file = tmp_path / "dense" / "seed-0" / FILE
    before = json.loads(file.read_text())
    file.write_text(json.dumps({**before, "model": "of another"}))
    said: list[str] = []
    run_language_experiment(load(folder), out=tmp_path, only=["dense"], say=said.append)
    assert "dense, seed 0: predicting 6 documents" in said
    assert json.loads(file.read_text()) == before
    # A file from before models were recorded is of the model that is there.
    file.write_text(json.dumps({key: value for key, value in before.items() if key != "model"}))
    said.clear()
    run_language_experiment(load(folder), out=tmp_path, only=["dense"], say=said.append)
    assert said == ["dense, seed 0: trained already"]


def test_an_arm_that_lacks_neighbours_to_be_shown_is_not_finished(folder: Path, tmp_path: Path) -> None:
    run_language_experiment(load(folder), out=tmp_path, only=["dense", "retrieval"])
    file = tmp_path / "retrieval" / "seed-0" / FILE
    whole = json.loads(file.read_text())
    assert {"real", "null", "shuffled"} == set(whole["losses"])
    file.write_text(json.dumps({**whole, "losses": {n: x for n, x in whole["losses"].items() if n != "shuffled"}}))
    report = report_language_experiment(load(folder), out=tmp_path)
    assert "retrieval seed 0" in report.missing and "dense" in report.result.arms
    run_language_experiment(load(folder), out=tmp_path, only=["retrieval"])
    assert json.loads(file.read_text())["losses"] == whole["losses"]
    # Without its model nobody knows whose figures they are.
    shutil.rmtree(tmp_path / "retrieval" / "seed-0" / "bundle")
    assert "retrieval seed 0" in report_language_experiment(load(folder), out=tmp_path).missing


def test_base_and_index_may_lie_elsewhere_and_are_known_by_their_content(folder: Path, tmp_path: Path) -> None:
    run_language_experiment(load(folder), out=tmp_path, only=["dense"])
    training = tmp_path / "dense" / "seed-0" / "bundle" / "training.yaml"
    kept = yaml.safe_load(training.read_text())
    moved = {**kept, "base": "/elsewhere/base", "data": {**kept["data"], "index": "/elsewhere/index"}}
    training.write_text(yaml.safe_dump(moved))
    said: list[str] = []
    run_language_experiment(load(folder), out=tmp_path, only=["dense"], say=said.append)
    assert said == ["dense, seed 0: trained already"]
    note = tmp_path / "dense" / "seed-0" / "arm.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "base": None}))
    with pytest.raises(ConfigError, match=r"it differs in base \('/elsewhere/base', now"):
        run_language_experiment(load(folder), out=tmp_path, only=["dense"])


def test_a_report_of_what_was_trained_otherwise_is_refused(folder: Path, tmp_path: Path) -> None:
    run_language_experiment(load(folder), out=tmp_path, only=["dense"])
    changed = load_experiment(folder / "experiment.yaml", overrides=["train.steps=9"])
    assert isinstance(changed, LanguageExperiment)
    with pytest.raises(ConfigError, match=r"was trained with another configuration; it differs in train\.steps"):
        report_language_experiment(changed, out=tmp_path)


def test_an_experiment_with_tasks_may_train_generators(folder: Path, tmp_path: Path) -> None:
    index = Index.open(folder / "index", encoder=StubEncoder())
    passage = next(iter(index.iterate()))
    row = {"id": "q", "question": "where?", "answers": ["here"], "gold_ids": [passage.id], "domain": passage.domain}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n")
    spec = {
        "name": "asked",
        "index": "index",
        "train": {
            "base": "base",
            "data": {"questions": ["questions.jsonl"], "index": "index", "calibration_share": 0.0},
            "raft": {"max_length": 480, "passages": 1, "neighbours": 3},
            "generate": {"max_answer_tokens": 4},
            "train": {"steps": 1, "batch_size": 1},
            "checkpoint_every": 0,
        },
        "arms": {"plain": {}, "token": {"model.gate": "token", **{f"model.{key}": x for key, x in SPARSE.items()}}},
        "untrained": {"before": "plain"},
        "tasks": [{"name": "here", "setting": "gold", "questions": ["questions.jsonl"]}],
    }
    (folder / "asked.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    outcome = run_experiment(load_experiment(folder / "asked.yaml"), out=tmp_path)
    assert not outcome.missing and outcome.runs.keys() == {"before", "plain", "token"}
    assert {runs["here"][0].samples["real"][0].status for runs in outcome.runs.values()} == {"ok"}
