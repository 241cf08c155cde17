"""One optimiser step of a tiny reader, looked at closely; as a program, the part of one rank in such a step.

RANK=0 WORLD_SIZE=2 ... python one_step.py CONFIG.json OUT.pt
"""

from __future__ import annotations

import copy
import json
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


def ready(content: dict[str, Any]) -> Run:
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
        of_layers = loss_inputs(output["routings"], mask_S, inputs["question_domain"])
        step.sums.append({name: torch.stack([routing_loss(name).sums(x) for x in of_layers]) for name in BATCH})
        return (loss, output) if return_outputs else loss

    step: Any = None


class Step(TrainerCallback):
    """One optimiser step on the same four questions: its gradients, its losses, and what was told of it."""

    def __init__(
        self,
        made: Run,
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
        self.tokens = 0
        trainer = Recording(
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
        for name in ("answer", *losses):
            assert other.log[f"{name}_loss"] == pytest.approx(self.log[f"{name}_loss"], rel=1e-4), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    config, out = Path(sys.argv[1]), Path(sys.argv[2])
    step = Step(ready(json.loads(config.read_text())), out.parent, 2, 1, {**BATCH, **TOKENS}, loss_scope="global")
    totals = step.told[0]
    torch.save({"gradients": step.gradients, "parts": totals.parts, "tokens": totals.tokens}, out)
