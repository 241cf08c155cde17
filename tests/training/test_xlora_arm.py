"""X-LoRA as an arm of an experiment: trained over the experts of another arm, gone on with, opened and evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ragmoe import ConfigError, load
from ragmoe.evaluation.experiment import load_experiment
from ragmoe.evaluation.experiment_run import run_experiment
from ragmoe.models.xlora import XLoraReader
from ragmoe.training import calibration, load_config, prepare, train
from ragmoe.training import run as run_module
from ragmoe.training.trainer import part_of

Config = Callable[..., dict[str, Any]]

BRANCHES = {
    "model.gate": "oracle",
    "model.experts": 2,
    "model.top_k": 1,
    "model.expert_names": ["river", "market"],
    "train.what": "gate+experts",
    "train.experts_learning_rate": 0.05,
}
XLORA = {"model.experts": 2, "model.top_k": 1, "train.what": "xlora", "train.gate_learning_rate": 0.05}


def test_the_arm_runs_from_training_to_the_result(
    config: Config, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "ENOUGH", 2)
    base = str(tmp_path / "out" / "branches" / "seed-{seed}" / "bundle")
    content = {
        "name": "small",
        "index": str(world / "index"),
        "train": config(),
        "arms": {"branches": BRANCHES, "xlora": {"base": base, **XLORA}},
        "tasks": [{"name": "small", "questions": [str(world / "questions.jsonl")], "perturbations": ["shuffled"]}],
        "comparisons": [["xlora", "branches"]],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    first = run_experiment(load_experiment(tmp_path / "small.yaml"), out=tmp_path / "out")
    bundle = tmp_path / "out" / "xlora" / "seed-0" / "bundle"
    trained, branches = XLoraReader.from_pretrained(bundle), load(base.format(seed=0))

    before, after = XLoraReader(branches, seed=0).state_dict(), trained.state_dict()
    moved = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"gate", "head"}
    assert trained.expert_names == ["river", "market"]
    assert trained.config.encoder == branches.config.encoder and trained.config.no_answer_threshold != 0.0
    history = [json.loads(line) for line in (bundle / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in history] == [1, 2, 3, 4] and all(r["answer_loss"] > 0 for r in history)

    arm = first.result.arms["xlora"]
    assert first.missing == [] and [c.a for c in first.result.comparisons] == ["xlora"]
    assert arm.macro_f1 is not None and arm.max_load is not None and arm.normalised_mi is not None
    assert arm.active_params == arm.total_params == sum(p.numel() for p in trained.parameters())
    # It has no gate that could be shown other neighbours.
    assert first.runs["xlora"]["small"][0].conditions["shuffled"] is None

    monkeypatch.setattr("ragmoe.training.train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(XLoraReader, "read", lambda *a, **k: pytest.fail("read again"))
    assert run_experiment(load_experiment(tmp_path / "small.yaml"), out=tmp_path / "out").result == first.result


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_reader(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = train(config(**BRANCHES, **{"train.steps": 1}), out=tmp_path / "branches").bundle
    content = config(base=str(base), **XLORA, **{"checkpoint_every": 2, "train.dropout": 0.1})
    whole = train(content, out=tmp_path / "whole")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(content, out=tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "checkpoint-4")
    resumed = train(content, out=tmp_path / "killed", resume=True)
    a, b = (XLoraReader.from_pretrained(done.bundle).state_dict() for done in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    parameters = sum(x.numel() for x in a.values())
    assert whole.parameters == {"total": parameters, "active": parameters, "trained": 33 * 2 * 2 * 2 + 33 * (2 + 4)}


def test_it_needs_experts_that_were_trained(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"is no bundle: expected one with trained LoRA experts"):
        prepare(load_config(config(**XLORA)))
