"""One optimiser step of a tiny reader or decoder, looked at closely; as a program, one rank's part in such a step.

RANK=0 WORLD_SIZE=2 ... python one_step.py CONFIG.json OUT.pt
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_encoder import StubEncoder
from torch import Tensor, nn
from transformers import TrainerCallback

from ragmoe.moe import StepTotals, routing_loss
from ragmoe.moe.losses import loss_inputs
from ragmoe.training import RagmoeTrainer, load_config, prepare
from ragmoe.training import run as run_module
from ragmoe.training.generator import GeneratorRun, GeneratorTrainer
from ragmoe.training.run import Run

NAMES = ["river", "market", "harbour", "mill"]
CHANGES = {
    "model.expert_names": NAMES,
    "model.losses": {"domain": 1.0},
    "raft.gold_probability": 0.5,
    "train.steps": 1,
    "train.clip": 1e6,
}
# Weights under which a routing loss is most of the gradient.
BATCH = {"load_balance": 5.0, "gshard": 20.0, "importance": 5.0, "uniform": 20.0, "domain": 5.0}
TOKENS = {"z": 5.0, "diversity": 5.0}
READER = {**BATCH, **TOKENS}
# A decoder's prompts have no domain, and of its experts' outputs nothing is kept.
DECODER = {name: weight for name, weight in READER.items() if name not in ("domain", "diversity")}


def ready(content: dict[str, Any]) -> Any:
    """A run that is ready to train; its gates heed the neighbours already, and its experts differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragmoe.index.folder.load_encoder", lambda name: StubEncoder())
        run = prepare(load_config(content))
    torch.manual_seed(11)
    with torch.no_grad():
        for layer in run.model.moe_layers:
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return run


def disturb(model: Any) -> None:
    """Let everything be drawn that can be: noise and token dropout of the gates, dropout."""
    for layer in model.moe_layers:
        layer.gate.settings = replace(layer.gate.settings, noise=2.0, token_dropout=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2


class Recording(RagmoeTrainer):
    """Notes what the model is told of the step, and the sums of each micro-batch as it is learned from."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        loss, output = super().compute_loss(model, inputs, return_outputs=True)
        step: Step = self.step
        step.told.append(self._step_totals)
        mask_S = inputs["attention_mask"].reshape(-1).bool()
        step.tokens += int(mask_S.sum())
        of_layers = loss_inputs(output["routings"], mask_S, inputs.get("question_domain"))
        names = [name for name in BATCH if name in step.weights]
        step.sums.append({name: torch.stack([routing_loss(name).sums(x) for x in of_layers]) for name in names})
        if "labels" in inputs:
            step.learned += int((inputs["labels"][:, 1:] != -100).sum())
        return (loss, output) if return_outputs else loss

    step: Any = None


class RecordingGenerator(Recording, GeneratorTrainer):
    """The same of a decoder."""


class Step(TrainerCallback):
    """One optimiser step on the same four questions: its gradients, its losses, and what was told of it.

    Attributes:
        tokens: how many this rank has routed.
        learned: of a decoder, how many tokens of answers this rank has learned from.
    """

    def __init__(
        self,
        made: Run | GeneratorRun,
        out: Path,
        batch_size: int,
        accumulation: int,
        weights: dict[str, float],
        *,
        noisy: bool = False,
        **train: Any,
    ) -> None:
        model = copy.deepcopy(made.model)
        model.config.balance_loss, model.config.z_loss = weights.get("load_balance", 0.0), weights.get("z", 0.0)
        model.config.losses = {name: x for name, x in weights.items() if name not in ("load_balance", "z")}
        if noisy:
            disturb(model)
        sizes = {"batch_size": batch_size, "accumulation": accumulation, **train}
        settings = made.config.model_copy(update={"train": made.config.train.model_copy(update=sizes)})
        self.gradients: dict[str, Tensor] = {}
        self.told: list[StepTotals | None] = []
        self.sums: list[dict[str, Tensor]] = []
        self.weights = weights
        self.tokens = self.learned = 0
        recording = RecordingGenerator if isinstance(made, GeneratorRun) else Recording
        trainer = recording(
            model=model,
            args=run_module._arguments(settings, out, bf16=settings.train.precision == "bf16"),
            train_dataset=[made.dataset[at] for at in range(4)],
            data_collator=made.collator,
            callbacks=[self],
            optimiser=settings.train,
        )
        trainer.step = self
        trainer.train()
        self.log = trainer.drain()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def assert_equals(self, other: Step, *losses: str) -> None:
        assert self.gradients.keys() == other.gradients.keys()
        for name, gradient in self.gradients.items():
            torch.testing.assert_close(other.gradients[name], gradient, atol=5e-6, rtol=1e-3, msg=name)
        for name in losses:
            assert other.log[f"{name}_loss"] == pytest.approx(self.log[f"{name}_loss"], rel=1e-4), name


def two_ranks(content: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The same step with two questions on each of two processes: what either has found."""
    (folder / "config.json").write_text(json.dumps(content))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in ("0", "1"):
        (folder / rank).mkdir()
        paths = os.pathsep.join([str(here.parents[1]), *sys.path])
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(here), str(folder / "config.json"), str(folder / rank / "step.pt")],
                env={**os.environ, **world, "PYTHONPATH": paths, "RANK": rank, "LOCAL_RANK": rank},
            )
        )
    assert [rank.wait(timeout=900) for rank in ranks] == [0, 0]
    return [torch.load(folder / rank / "step.pt") for rank in ("0", "1")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    config, out = Path(sys.argv[1]), Path(sys.argv[2])
    made = ready(json.loads(config.read_text()))
    weights = DECODER if isinstance(made, GeneratorRun) else READER
    step = Step(made, out.parent, 2, 1, weights, loss_scope="global")
    found = {"gradients": step.gradients, "parts": step.told[0].parts, "tokens": step.told[0].tokens}
    torch.save({**found, "learned": step.learned}, out)
