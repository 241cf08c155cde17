"""What is seen and kept of a run: a line of history now and then, and progress on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ragmoe.training.trainer import RagmoeTrainer


class HistoryCallback(TrainerCallback):
    """Writes ``history.jsonl``, shows progress, and moves balance biases once an optimiser step."""

    def __init__(self, path: Path, *, steps: int, show: bool) -> None:
        self.path = path
        self.steps = steps
        self.show = show
        self.trainer: RagmoeTrainer | None = None
        self._progress: Any = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._forget_after(state.global_step)
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=False,
                disable=not sys.stderr.isatty(),
            )
            self._task = self._progress.add_task("training", total=self.steps, completed=state.global_step, note="")
            self._progress.start()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer is not None:
            self.trainer.update_balance_bias()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs or self.trainer is None:
            return
        record = {"step": state.global_step, **logs, **self.trainer.drain()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _short(value) for key, value in record.items()}) + "\n")
        self._tell(record)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _tell(self, record: dict[str, Any]) -> None:
        note = f"loss {record['loss']:.3f}"
        if record["load"]:
            largest = ", ".join(f"{max(load):.2f}" for load in record["load"])
            entropy = ", ".join(f"{value:.2f}" for value in record["gate_entropy"])
            note += f"  balance {record.get('balance_loss', 0.0):.3f}  largest load {largest}  gate entropy {entropy}"
        if self._progress is not None:
            self._progress.update(self._task, note=note)
            if self._progress.disable:
                print(f"step {record['step']}/{self.steps}  {note}", file=sys.stderr, flush=True)

    def _forget_after(self, step: int) -> None:
        """A resumed run repeats the steps after its checkpoint; drop what was written of them."""
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) <= step] if step else []
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


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
