"""Routing losses under gradient accumulation: which steps are the same however they are cut, and what it takes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_encoder import StubEncoder
from torch import Tensor, nn
from transformers import TrainerCallback

from ragmoe import ConfigError, ModelError
from ragmoe.moe import StepTotals, routing_loss
from ragmoe.moe.losses import loss_inputs
from ragmoe.training import RagmoeTrainer, load_config, prepare, train
from ragmoe.training import run as run_module
from ragmoe.training.run import Run
from ragmoe.training.totals import step_sums

Config = Callable[..., dict[str, Any]]
NAMES = ["river", "market", "harbour", "mill"]
# Weights under which a routing loss is most of the gradient.
BATCH = {"load_balance": 5.0, "gshard": 20.0, "importance": 5.0, "uniform": 20.0, "domain": 5.0}
TOKENS = {"z": 5.0, "diversity": 5.0}
CUTS = [(2, 2), (1, 4)]


@pytest.fixture(scope="module")
def made(config: Config) -> Iterator[Run]:
    """A run that is ready to train; its gates heed the neighbours already, and its experts differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragmoe.index.folder.load_encoder", lambda name: StubEncoder())
        changes = {"model.expert_names": NAMES, "model.losses": {"domain": 1.0}, "raft.gold_probability": 0.5}
        run = prepare(load_config(config(**changes, **{"train.steps": 1, "train.clip": 1e6})))
        torch.manual_seed(11)
        with torch.no_grad():
            for layer in run.model.moe_layers:
                for parameter in layer.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        yield run


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
            for layer in model.moe_layers:
                layer.gate.settings = replace(layer.gate.settings, noise=2.0, token_dropout=0.5)
            for module in model.modules():
                module.p = 0.2 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
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


def test_with_the_scope_global_a_step_is_the_same_however_it_is_cut(made: Run, tmp_path: Path) -> None:
    whole = Step(made, tmp_path, 4, 1, BATCH, loss_scope="global")
    # A batch that is a whole step costs no other pass.
    assert whole.told == [None]
    for cut in CUTS:
        step = Step(made, tmp_path, *cut, BATCH, loss_scope="global")
        whole.assert_equals(step, "balance", "gshard", "importance", "uniform", "domain")
        assert len(step.told) == cut[1] and len({id(told) for told in step.told}) == 1
        assert step.told[0].tokens.item() == step.tokens == whole.tokens


def test_with_the_scope_micro_each_part_is_judged_by_itself(made: Run, tmp_path: Path) -> None:
    whole, cut = (Step(made, tmp_path, *sizes, BATCH) for sizes in ((4, 1), (1, 4)))
    with pytest.raises(AssertionError):
        whole.assert_equals(cut)
    # What is balanced in each part is balanced as a whole, but not the other way about.
    for name in ("balance_loss", "importance_loss", "uniform_loss", "domain_loss"):
        assert cut.log[name] > whole.log[name] * 1.005, name
    assert cut.told[0].sums == {}
    assert cut.log["answer_loss"] == pytest.approx(whole.log["answer_loss"], rel=1e-5)


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_means_over_tokens_are_exact_with_either_scope(made: Run, tmp_path: Path, scope: str) -> None:
    whole = Step(made, tmp_path, 4, 1, TOKENS, loss_scope=scope)
    for cut in CUTS:
        step = Step(made, tmp_path, *cut, TOKENS, loss_scope=scope)
        whole.assert_equals(step, "z", "diversity")
        # No loss asks for sums: there was no other pass.
        assert step.told[0].sums == {}


def test_both_passes_draw_the_same(made: Run, tmp_path: Path) -> None:
    """Noise of the gates and dropout: what the losses are told of the step is what they then see of it."""
    step = Step(made, tmp_path, 2, 2, BATCH, loss_scope="global", noisy=True)
    told = step.told[0].sums
    assert sorted(told) == sorted(BATCH)
    for name, sums in told.items():
        torch.testing.assert_close(sum(of_part[name] for of_part in step.sums), sums)


def test_in_bf16_the_pass_before_takes_no_gradient_away(made: Run, tmp_path: Path) -> None:
    plain, told = (Step(made, tmp_path, 2, 2, BATCH, loss_scope=s, precision="bf16") for s in ("micro", "global"))
    assert told.gradients.keys() == plain.gradients.keys()
    assert all(x.isfinite().all() for x in told.gradients.values())
    assert [name for name, x in plain.gradients.items() if x.any() and not told.gradients[name].any()] == []


def test_a_pass_leaves_the_random_numbers_as_they_were(made: Run) -> None:
    model = copy.deepcopy(made.model).train()
    batch = made.collator([made.dataset[0], made.dataset[1]])
    before = torch.get_rng_state()
    sums = step_sums(model, model.config, [batch, batch], torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(sums) == ["domain", "load_balance"]
    assert sums["domain"].shape == (2, 4, 4) and not any(x.requires_grad for x in sums.values())
    once = step_sums(model, model.config, [batch], torch.device("cpu"))
    torch.testing.assert_close(sums["domain"], 2 * once["domain"])


def test_further_losses_are_learned_by_and_written_down(config: Config, tmp_path: Path) -> None:
    losses = {"context": 1.0, "diversity": 0.1, "domain": 1.0, "uniform": 0.0}
    changes = {"model.losses": losses, "model.expert_names": NAMES, "train.accumulation": 2, "train.batch_size": 2}
    changes["train.steps"] = 2
    result = train(config(**changes, **{"train.loss_scope": "global"}), out=tmp_path / "run")
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert len(history) == result.steps == 2
    for record in history:
        assert {"answer_loss", "balance_loss", "z_loss"} | {f"{name}_loss" for name in losses} <= record.keys()
    # At first the gate ignores the neighbours: ln 2 for each token whose question has some.
    assert 0 < history[0]["context_loss"] <= 0.6932
    assert history[0]["domain_loss"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"model.losses": {"domain": 1.0}, "model.expert_names": ["a", "b", "c", "d"]},
            ModelError,
            "none of the questions belongs to one that an expert is named after; the experts are a, b, c, d",
        ),
        (
            {"model.losses": {"context": 1.0}, "train.batch_size": 1},
            ConfigError,
            "train.batch_size is 1, but the loss 'context' compares two questions",
        ),
        ({"model.losses": {"switch": 1.0}}, ConfigError, "there is no routing loss 'switch'; there are: "),
        ({"train.loss_scope": "all"}, ConfigError, "train.loss_scope: Input should be 'micro' or 'global'"),
    ],
)
def test_what_would_teach_nothing_is_refused(
    config: Config, tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as caught:
        train(config(**changes), out=tmp_path / "run")
    assert said in str(caught.value) and not (tmp_path / "run").exists()
