"""What is seen and kept of a run: a line of history now and then, and how far it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from ragmoe._memory import give_back_freed_memory
from ragmoe.bundle.experts import LOAD
from ragmoe.training.trainer import RagmoeTrainer


class Shows(Protocol):
    """Where progress is shown."""

    def stage(self, name: str, done: int, total: int) -> None:
        """How far something is."""

    def line(self, text: str) -> None:
        """A line that stays."""


class HistoryCallback(TrainerCallback):
    """Writes ``history.jsonl``, tells of progress, and moves balance biases once an optimiser step."""

    def __init__(self, path: Path, *, steps: int, show: Shows | None) -> None:
        self.path = path
        self.steps = steps
        self.show = show
        self.trainer: RagmoeTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._forget_after(state.global_step)
        if self.show and state.global_step:
            self.show.line(f"going on after step {state.global_step}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer is not None:
            self.trainer.update_balance_bias()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The last steps too, where they are fewer than are logged together.
        control.should_log = control.should_log or state.global_step == state.max_steps
        if self.show:
            self.show.stage("training", state.global_step, self.steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs or self.trainer is None:
            return
        give_back_freed_memory()
        record = {"step": state.global_step, **logs, **self.trainer.drain()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _short(value) for key, value in record.items()}) + "\n")
        if self.show:
            self.show.line(_line(record, self.steps, self.trainer.routing.layers))

    def _forget_after(self, step: int) -> None:
        """A resumed run repeats the steps after its checkpoint; drop what was written of them."""
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) <= step] if step else []
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def load_record(path: Path, config: Any) -> dict[str, Any] | None:
    """For a bundle's map: by id, the share of the choices that fell on an expert in each sparse layer, as last written.

    None where nothing was.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    loads = list(map(list, zip(*json.loads(lines[-1])["load"], strict=True))) if lines else []
    return {LOAD: dict(zip(config.expert_ids or range(len(loads)), loads, strict=True))} if loads else None


def _line(record: dict[str, Any], steps: int, layers: Sequence[int]) -> str:
    """One line: losses, then load per expert (per cent), gate entropy (nats) and overflow of each sparse layer."""
    text = f"step {record['step']}/{steps}  loss {record['loss']:.3f}"
    if record["load"] and len(record["load"][0]) > 1:
        # A decoder does not compute a loss whose weight is zero.
        if "balance_loss" in record:
            text += f"  balance {record['balance_loss']:.3f}"
        for at, layer in enumerate(layers):
            shares = " ".join(f"{100 * share:.0f}" for share in record["load"][at])
            text += f"  layer {layer}: load {shares} entropy {record['gate_entropy'][at]:.2f}"
            if "overflow" in record:
                text += f" overflow {record['overflow'][at]:.1%} unserved {record['unserved'][at]:.1%}"
    return text


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        # A line that was torn when the run was killed.
        return float("inf")


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list):
        return [_short(entry) for entry in value]
    return value
