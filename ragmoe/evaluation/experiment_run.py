"""Running an experiment: train each arm, evaluate it, compare, and write the result.

What an arm leaves, below the output folder::

    ARM/seed-0/bundle/     the trained model with training.yaml
    ARM/seed-0/arm.json    the index it was trained with, and the seconds it took
    ARM/seed-0/TASK/       its evaluation

All of it is taken up again: a trained arm is not trained twice, a question that was read is not read twice.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ragmoe._errors import ConfigError, UsageError
from ragmoe.evaluation.experiment import UNTRAINED, Experiment
from ragmoe.evaluation.machine import commit, machine
from ragmoe.evaluation.opening import index_of_recipe
from ragmoe.evaluation.perturbation import REAL
from ragmoe.evaluation.protocols import Reader
from ragmoe.evaluation.report import comparison_table, report, to_markdown
from ragmoe.evaluation.result import ArmResult, ComparisonResult, DomainResult, Result
from ragmoe.evaluation.results import Results
from ragmoe.evaluation.retrieval import Retrieval
from ragmoe.evaluation.run import Progress, evaluate
from ragmoe.evaluation.samples import write_text
from ragmoe.evaluation.statistics import Comparison, compare
from ragmoe.evaluation.tables import Table
from ragmoe.evaluation.task import Task

if TYPE_CHECKING:
    from ragmoe.index import Index
    from ragmoe.training.callbacks import Shows

IndexProgress = Callable[[str, int, int], None]


@dataclass
class Outcome:
    """What an experiment found so far.

    Attributes:
        runs: results by arm and task name, one a seed.
        seconds: of training, mean over seeds, by arm.
        missing: arms and seeds that were not run; with any, no result is written outside the output folder.
        written: the files written.
    """

    experiment: Experiment
    tasks: list[Task]
    result: Result
    tables: list[Table]
    runs: dict[str, dict[str, list[Results]]]
    seconds: dict[str, float | None]
    missing: list[str]
    written: list[Path] = field(default_factory=list)


def run_experiment(
    experiment: Experiment,
    *,
    out: str | Path | None = None,
    only: Sequence[str] = (),
    command: str | None = None,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    index_progress: IndexProgress | None = None,
    show_training: Shows | None = None,
) -> Outcome:
    """Run an experiment, or go on with one.

    Args:
        out: folder of everything but the result; None for ``runs/NAME``.
        only: run only these arms; those that are finished are reported beside them.
        command: how it was started, for the result; None for the command that would.
        say: called with a line on what happens next.
        show_training: told of training's progress.

    Raises:
        RagmoeError: a file or an index is wrong, all of which is checked before the first arm trains; or an arm in
            ``out`` was trained with another configuration.
    """
    if unknown := [name for name in only if name not in experiment.arm_names]:
        raise UsageError(f"there is no arm {unknown[0]!r}; there are: {', '.join(experiment.arm_names)}")
    run = _Run(experiment, Path(out) if out else Path("runs") / experiment.name, say, progress, show_training)
    tasks = experiment.load_tasks()
    for task in tasks:
        task.load_questions()
    run.open_index(index_progress)
    for seed in experiment.seeds:
        for arm in experiment.arm_names:
            run.check(arm, seed)
    for seed in experiment.seeds:
        for arm in only or experiment.arm_names:
            run.arm(arm, seed, tasks)
    return run.outcome(tasks, command or command_of(experiment, only))


class _Run:
    """The state of a run; see ``run_experiment``."""

    index: Index
    retrieval: Retrieval

    def __init__(
        self,
        experiment: Experiment,
        out: Path,
        say: Callable[[str], None] | None,
        progress: Progress | None,
        show_training: Shows | None,
    ) -> None:
        self.experiment, self.out = experiment, out
        self.say = say or (lambda line: None)
        self.progress, self.show_training = progress, show_training

    def open_index(self, progress: IndexProgress | None) -> None:
        """Open the index, or build it from its recipe."""
        self.index = index_of_recipe(self.experiment.resolve(self.experiment.index), progress=progress)
        self.retrieval = Retrieval(self.index)

    def folder(self, arm: str, seed: int) -> Path:
        """Where an arm's seed lives."""
        return self.out / arm / f"seed-{seed}"

    def config(self, arm: str, seed: int) -> Any:
        """The training configuration of an arm's seed."""
        return self.experiment.training(arm, seed, self.index.folder)

    def check(self, arm: str, seed: int) -> None:
        """Refuse to mix what was trained otherwise into this experiment; nothing is written or removed here."""
        config, folder = self.config(arm, seed), self.folder(arm, seed)
        if arm == UNTRAINED:
            return
        kept, now = _read_yaml(folder / "bundle" / "training.yaml"), config.model_dump(mode="json")
        differing = _differences(kept, now) if kept is not None else []
        note = _read_json(folder / "arm.json")
        if kept is not None and note.get("index", self.index.digest) != self.index.digest:
            differing.append("the index's content")
        if differing:
            raise ConfigError(
                f"{folder} was trained with another configuration; it differs in {', '.join(differing)}",
                hint="give another folder with --out, or remove this one",
            )

    def trained(self, arm: str, seed: int) -> bool:
        """Whether an arm's seed has its bundle."""
        from ragmoe.bundle import is_bundle

        return is_bundle(self.folder(arm, seed) / "bundle")

    def arm(self, arm: str, seed: int, tasks: Sequence[Task]) -> None:
        """Train and evaluate one arm with one seed, or what is left of that."""
        model = self._model(arm, seed)
        for task in tasks:
            self.say(f"{arm}, seed {seed}: evaluating {task.name}")
            evaluate(
                model,
                task,
                self.index,
                out=self.folder(arm, seed) / task.name,
                progress=self.progress,
                retrieval=self.retrieval,
                name=arm,
            )

    def _model(self, arm: str, seed: int) -> Reader:
        from ragmoe.models import load
        from ragmoe.training import train
        from ragmoe.training.build import build_model

        config, folder = self.config(arm, seed), self.folder(arm, seed)
        if arm == UNTRAINED:
            import torch

            return build_model(config, self.index, on_cpu=not torch.cuda.is_available())
        if self.trained(arm, seed):
            self.say(f"{arm}, seed {seed}: trained already")
        else:
            self.say(f"{arm}, seed {seed}: training {config.train.steps} steps")
            write_text(folder / "arm.json", json.dumps({"index": self.index.digest, "seconds": None}) + "\n")
            done = train(config, out=folder / "bundle", resume=True, cache=self.out / "cache", show=self.show_training)
            write_text(folder / "arm.json", json.dumps({"index": self.index.digest, "seconds": done.seconds}) + "\n")
        return load(folder / "bundle")

    def outcome(self, tasks: list[Task], command: str) -> Outcome:
        """Gather what is finished, compare, and write."""
        experiment = self.experiment
        runs: dict[str, dict[str, list[Results]]] = {}
        missing = []
        for arm in experiment.arm_names:
            undone = [s for s in experiment.seeds if not self._finished(arm, s, tasks)]
            missing += [f"{arm} seed {seed}" for seed in undone]
            if not undone:
                runs[arm] = {
                    task.name: [Results.load(self.folder(arm, s) / task.name) for s in experiment.seeds]
                    for task in tasks
                }
        seconds = {arm: self._seconds(arm) for arm in runs}
        compared = _compare(experiment, tasks, runs)
        result = Result(
            experiment=experiment.name,
            command=command,
            commit=commit(experiment.folder),
            machine=machine(),
            seeds=experiment.seeds,
            arms={arm: arm_result(by_task[tasks[0].name], seconds[arm]) for arm, by_task in runs.items()},
            comparisons=[
                ComparisonResult(
                    a=a, b=b, metric=c.metric, setting=c.setting, difference=c.difference, low=c.low, high=c.high
                )
                for a, b, c in compared
            ],
        )
        outcome = Outcome(experiment, tasks, result, _tables(tasks, runs, seconds, compared), runs, seconds, missing)
        outcome.written = _write(outcome, self.out)
        return outcome

    def _finished(self, arm: str, seed: int, tasks: Sequence[Task]) -> bool:
        if arm != UNTRAINED and not self.trained(arm, seed):
            return False
        for task in tasks:
            content = _read_json(self.folder(arm, seed) / task.name / "results.json")
            block = content.get("ragmoe", {}).get("tasks", {}).get(task.name, {})
            if block.get("task") != task.model_dump(mode="json") or block.get("index_digest") != self.index.digest:
                return False
        return True

    def _seconds(self, arm: str) -> float | None:
        return _mean([_read_json(self.folder(arm, s) / "arm.json").get("seconds") for s in self.experiment.seeds])


def arm_result(runs: Sequence[Results], seconds: float | None) -> ArmResult:
    """An arm's entry in a result: means over its seeds."""
    macros, routings = [run.real["macro"] for run in runs], [run.real["routing"] or {} for run in runs]
    domains = {name: [run.real["per_domain"][name] for run in runs] for name in runs[0].real["per_domain"]}
    return ArmResult(
        macro_f1=_mean([m["f1"] for m in macros]),
        macro_em=_mean([m["em"] for m in macros]),
        per_domain={
            name: DomainResult(
                f1=_mean([b["f1"] for b in blocks]), em=_mean([b["em"] for b in blocks]), n=blocks[0]["n"]
            )
            for name, blocks in domains.items()
        },
        perplexity=None,
        active_params=runs[0].parameters.get("active"),
        total_params=runs[0].parameters.get("total"),
        normalised_mi=_mean([r.get("normalised_mi") for r in routings]),
        gate_entropy=_mean([r.get("gate_entropy") for r in routings]),
        max_load=_mean([r.get("max_load") for r in routings]),
        seconds=seconds,
    )


def command_of(experiment: Experiment, only: Sequence[str] = ()) -> str:
    """The command that runs it again, without anything that is only true of this machine."""
    path = experiment.path
    if path.is_absolute():
        inside = Path.cwd().resolve() in path.resolve().parents
        path = path.resolve().relative_to(Path.cwd().resolve()) if inside else Path(path.name)
    words = ["ragmoe", "eval", "experiment", str(path), *experiment.overrides]
    words += [word for arm in only for word in ("--only", arm)]
    words += ["--seeds", ",".join(map(str, experiment.seeds))]
    return shlex.join(words) + (' --data "$RAGMOE_DATA"' if os.environ.get("RAGMOE_DATA") else "")


def _compare(
    experiment: Experiment, tasks: Sequence[Task], runs: dict[str, dict[str, list[Results]]]
) -> list[tuple[str, str, Comparison]]:
    found = []
    for task in tasks:
        for a, b in experiment.comparisons:
            if a in runs and b in runs:
                of_a, of_b = ([run.samples[REAL] for run in runs[arm][task.name]] for arm in (a, b))
                found.append((a, b, compare(of_a, of_b, setting=task.setting_name)))
    return found


def _tables(
    tasks: Sequence[Task],
    runs: dict[str, dict[str, list[Results]]],
    seconds: dict[str, float | None],
    compared: Sequence[tuple[str, str, Comparison]],
) -> list[Table]:
    if not runs:
        return []
    tables = []
    for task in tasks:
        tables += report({arm: by_task[task.name] for arm, by_task in runs.items()}, seconds=seconds)
    last = comparison_table(compared)
    return [*tables, last] if last else tables


def _write(outcome: Outcome, out: Path) -> list[Path]:
    """The result as JSON and Markdown: in the output folder, and where the experiment says if it ran as committed."""
    experiment = outcome.experiment
    places = [out / "result.json"]
    if experiment.result and not outcome.missing and experiment.as_committed:
        places.append(experiment.resolve(experiment.result))
    text = to_markdown(outcome.tables, experiment.name, _head(outcome))
    for place in places:
        outcome.result.write(place)
        write_text(place.with_suffix(".md"), text)
    return [file for place in places for file in (place, place.with_suffix(".md"))]


def _head(outcome: Outcome) -> list[str]:
    result, where = outcome.result, outcome.result.machine
    lines = [outcome.experiment.description.strip(), ""] if outcome.experiment.description else []
    return [
        *lines,
        f"- command: `{result.command}`",
        f"- commit: {result.commit or 'none'}",
        f"- machine: {where['cpu']}, cores: {where['cores']}, threads: {where['threads']}",
        f"- seeds: {', '.join(map(str, result.seeds))}",
        *([f"- not run yet: {', '.join(outcome.missing)}"] if outcome.missing else []),
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present and len(present) == len(values) else None


def _differences(before: Any, now: Any, at: str = "") -> list[str]:
    """The dotted keys in which two nested mappings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        return [key for k in keys for key in _differences(before.get(k), now.get(k), f"{at}.{k}" if at else str(k))]
    return [] if before == now else [f"{at} ({before!r}, now {now!r})"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any] | None:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
