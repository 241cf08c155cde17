"""Decoders under transformers' own Trainer and under accelerate, as users run them who use nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_decoders import NATIVE, make, prompts, some_neighbours
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

CASES = [*NATIVE, "mixtral-lora"]
Row = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps the precision of a process's first run; and Trainer sweeps all memory after each file."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def case(name: str, **settings: Any) -> Any:
    family, _, kind = name.partition("-")
    return make(family, **({"expert_kind": kind} if kind else {}), **settings).train()


def questions(n: int = 8) -> list[Row]:
    """Rows of one sequence each with its own neighbours."""
    x, neighbours = prompts(n), some_neighbours(n)
    shown = [neighbours.rows([i]).tensors().items() for i in range(n)]
    return [{"input_ids": x[i], "labels": x[i], **{k: v[0] for k, v in shown[i]}} for i in range(n)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    usual = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**usual, **changes})


def weights(model: Any) -> Row:
    return {name: x.clone() for name, x in model.state_dict().items()}


def equal(one: Row, two: Row) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Watch(TrainerCallback):
    """Notes what a step begins and ends with, and stops the training after a step where one is given."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.gradients: list[dict[str, Tensor | None]] = []
        self.after: list[Row] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.after.append(weights(model))
        control.should_training_stop |= state.global_step == self.stop


@pytest.mark.parametrize("name", CASES)
def test_two_steps_in_bf16(name: str, tmp_path: Path) -> None:
    """Under autocast: weights and gradients stay in single precision, and nothing is left out."""
    model, watch = case(name), Watch()
    before, seen = weights(model), set()
    model.lm_head.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    Trainer(model, arguments(tmp_path, bf16=True), train_dataset=questions(), callbacks=[watch]).train()
    assert len(watch.gradients) == 2 and seen == {torch.bfloat16}
    for found in watch.gradients:
        assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n]) or p.dtype != torch.float32]


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_stopped_goes_on_to_the_same_end(name: str, tmp_path: Path) -> None:
    """Bit for bit, with noise in the gates, and with experts that are not numbered as they stand."""
    settings = {"gate_noise": 0.5, "expert_ids": [4, 0, 2, 7]}
    start, rows = case(name, **settings), questions()

    def run(folder: str, stop: int | None = None, **how: Any) -> tuple[Row, Watch]:
        model, watch = case(name, **settings), Watch(stop)
        model.load_state_dict(start.state_dict())
        how |= {"train_dataset": rows, "callbacks": [watch]}
        resume = how.pop("resume", None)
        trainer = Trainer(model, arguments(tmp_path / folder, save_strategy="steps", save_steps=1), **how)
        trainer.train(resume_from_checkpoint=resume)
        return weights(model), watch

    want, whole = run("whole")
    run("stopped", stop=1)
    assert (tmp_path / "stopped" / "checkpoint-1").is_dir() and not (tmp_path / "stopped" / "checkpoint-2").exists()
    got, rest = run("stopped", resume=True)
    assert len(whole.after) == 2 and len(rest.after) == 1
    assert equal(got, want) and not equal(got, whole.after[0])


@pytest.mark.parametrize("name", ["mixtral", "glm4_moe", "mixtral-lora"])
def test_the_best_checkpoints_weights_are_loaded_at_the_end(name: str, tmp_path: Path) -> None:
    class FirstIsBest(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {**super().evaluate(*args, **kwargs), "eval_score": -float(self.state.global_step)}

    model, watch, rows = case(name, expert_ids=[4, 0, 2, 7]), Watch(), questions()
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = FirstIsBest(
        model, arguments(tmp_path, **steps, **best), train_dataset=rows, eval_dataset=rows, callbacks=[watch]
    )
    trainer.train()
    assert len(watch.after) == 2 and equal(weights(model), watch.after[0])
    assert not any(torch.equal(watch.after[0][n], watch.after[1][n]) for n, _ in model.named_parameters())


@pytest.mark.parametrize("name", CASES)
def test_a_loop_with_accelerate_is_the_plain_loop(name: str) -> None:
    start, rows = case(name), questions()

    def loop(prepare: Callable[..., Any], backward: Callable[[Tensor], Any]) -> Row:
        model = case(name)
        model.load_state_dict(start.state_dict())
        parts = model, torch.optim.AdamW(model.parameters(), lr=0.05), DataLoader(rows, batch_size=4)
        wrapped, optimiser, batches = prepare(*parts)
        for batch in batches:
            backward(wrapped(**batch).loss)
            optimiser.step()
            optimiser.zero_grad()
        return weights(model)

    accelerator = Accelerator(cpu=True)
    got = loop(accelerator.prepare, accelerator.backward)
    assert equal(got, loop(lambda *parts: parts, lambda loss: loss.backward()))
    assert not any(torch.equal(got[n], p) for n, p in start.named_parameters())
