"""The result of an experiment: what is finished is gathered, compared, drawn and written; nothing is run.

ragmoe eval report eval/experiments/core7.yaml --data DIR
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from ragmoe._errors import DataError
from ragmoe.evaluation.experiment import Experiment, LanguageExperiment
from ragmoe.evaluation.experiment_folder import ExperimentFolder
from ragmoe.evaluation.experiment_tables import added_table, parameter_table, progress_table
from ragmoe.evaluation.goals import compare_arms, goal_table
from ragmoe.evaluation.machine import commit
from ragmoe.evaluation.perturbation import REAL
from ragmoe.evaluation.plots import Picture, draw, require_matplotlib
from ragmoe.evaluation.report import comparison_table, report, to_markdown
from ragmoe.evaluation.result import ArmResult, ComparisonResult, DomainResult, Result
from ragmoe.evaluation.results import Results
from ragmoe.evaluation.samples import write_text
from ragmoe.evaluation.statistics import question_mismatch
from ragmoe.evaluation.tables import Table, markdown
from ragmoe.evaluation.task import Task

# What the Markdown says of where it was run: other versions make other figures, and another Python another library.
_MACHINE = ("cpu", "gpu", "cores", "threads", "python", "torch")


@dataclass
class Outcome:
    """What an experiment found so far.

    Attributes:
        folder: that the experiment runs in.
        summary: tables about all tasks; ``details``: about each.
        runs: results of finished arms by arm and task name, one a seed.
        missing: arms and seeds that were not run; with any, no result is written outside the output folder.
        lines: what the Markdown begins with.
        written: the files written.
    """

    experiment: Experiment
    folder: Path
    tasks: list[Task]
    result: Result
    summary: list[Table]
    details: list[Table]
    runs: dict[str, dict[str, list[Results]]]
    missing: list[str]
    lines: list[str]
    written: list[Path] = field(default_factory=list)

    @property
    def tables(self) -> list[Table]:
        """Everything that is known, the most important first."""
        return [*self.summary, *self.details]

    @property
    def results(self) -> list[Results]:
        """Every evaluation."""
        return [run for by_task in self.runs.values() for runs in by_task.values() for run in runs]


def report_experiment(
    experiment: Experiment,
    *,
    out: str | Path | None = None,
    plots: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Outcome:
    """Write the result of an experiment from what was run already, with pictures.

    Args:
        out: folder that the experiment was run in; None for ``runs/NAME``.
        plots: folder for the pictures; None for one beside the Markdown that is written.
        say: called with a line on what happens next.

    Raises:
        DataError: nothing of the experiment was run there.
        ConfigError: an arm there was trained with another configuration, or over another index than the others.
        RagmoeError: matplotlib is not installed.
    """
    require_matplotlib()
    say = say or (lambda line: None)
    root = Path(out) if out else default_folder(experiment)
    tasks, folder = experiment.load_tasks(), ExperimentFolder(experiment, root)
    folder.index = folder.used_index(tasks)
    if folder.index is None:
        raise DataError(
            f"{root} holds nothing of the experiment {experiment.name}: no arm was trained or evaluated there",
            hint=command_of(experiment, out=out),
        )
    folder.check_arms(root, moved=True)
    say("gathering and comparing")
    outcome = gather(folder, tasks, command_of(experiment))
    committed = _committed(outcome)
    beside = committed.with_suffix("") if committed else root / "plots"
    say("drawing")
    losses = {arm: [folder.losses(arm, seed) for seed in experiment.seeds] for arm in experiment.arms}
    otherwise = folder.learning_otherwise(experiment.reference)
    drawn = draw(outcome.runs, losses, experiment.reference, Path(plots) if plots else beside, otherwise=otherwise)
    outcome.written = [*write(outcome, drawn), *(picture.file for picture in drawn)]
    return outcome


def default_folder(experiment: Experiment) -> Path:
    """Where an experiment runs unless told otherwise."""
    return Path("runs") / experiment.name


def gather(folder: ExperimentFolder, tasks: list[Task], command: str) -> Outcome:
    """Load what is finished, compare it, and make its tables. ``command``: how it is made again."""
    experiment = folder.experiment
    runs: dict[str, dict[str, list[Results]]] = {}
    missing = []
    for arm in experiment.arm_names:
        undone = [seed for seed in experiment.seeds if not folder.finished(arm, seed, tasks)]
        missing += [f"{arm} seed {seed}" for seed in undone]
        if not undone:
            runs[arm] = folder.results(arm, tasks)
    _require_same_questions(experiment, tasks, runs)
    command = of_finished(command, runs, missing)
    seconds = {arm: folder.seconds(arm) for arm in runs}
    compared = compare_arms(experiment, tasks, runs)
    triples = [(pair.a, pair.b, comparison) for pair, comparison in compared.items()]
    result = Result(
        experiment=experiment.name,
        command=command,
        commit=commit(experiment.folder),
        machine=folder.machine(),
        seeds=experiment.seeds,
        arms={arm: arm_result(by_task[tasks[0].name], seconds[arm]) for arm, by_task in runs.items()},
        comparisons=[
            ComparisonResult(
                a=a, b=b, metric=f"macro_{c.metric}", setting=c.setting, difference=c.difference, low=c.low, high=c.high
            )
            for a, b, c in triples
        ],
    )
    summary = [
        progress_table(folder, tasks) if missing else None,
        goal_table(experiment, tasks, compared),
        comparison_table(triples),
        added_table(runs, list(experiment.untrained_arms)),
        parameter_table({arm: by_task[tasks[0].name][0] for arm, by_task in runs.items()}, experiment.notes),
    ]
    details = []
    for task in tasks if runs else []:
        details += report({arm: by_task[task.name] for arm, by_task in runs.items()}, seconds=seconds)
    return Outcome(
        experiment=experiment,
        folder=folder.root,
        tasks=tasks,
        result=result,
        summary=[replace(table, command=command) for table in summary if table is not None],
        details=[replace(table, command=command) for table in details],
        runs=runs,
        missing=missing,
        lines=head(folder, result, missing, [task.name for task in tasks]),
    )


def _require_same_questions(
    experiment: Experiment, tasks: Sequence[Task], runs: Mapping[str, Mapping[str, Sequence[Results]]]
) -> None:
    """DataError where arms were asked other questions on a task, whose file has changed since: no table mixes them."""
    for task in tasks:
        asked = [(arm, run.samples[REAL]) for arm, by_task in runs.items() for run in by_task[task.name]]
        for arm, samples in asked[1:]:
            if mismatch := question_mismatch(asked[0][1], samples):
                raise DataError(
                    f"{asked[0][0]} and {arm} were not asked the same on {task.name}: {mismatch}",
                    hint=f"{command_of(experiment)} asks anew whoever was asked what no longer stands in the files",
                )


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


def command_of(experiment: Experiment, *, verb: str = "experiment", out: str | Path | None = None) -> str:
    """The command that runs it again, or reports on it, without anything that is only true of this machine.

    Args:
        out: for a hint, where it was or is to be run, in the place of its own folder.
    """
    path = experiment.path
    if path.is_absolute():
        inside = Path.cwd().resolve() in path.resolve().parents
        path = path.resolve().relative_to(Path.cwd().resolve()) if inside else Path(path.name)
    words = ["ragmoe", "eval", verb, str(path), *experiment.overrides]
    words += ["--seeds", ",".join(map(str, experiment.seeds))]
    words += [] if out is None else ["--out", str(out)]
    return shlex.join(words) + (' --data "$RAGMOE_DATA"' if os.environ.get("RAGMOE_DATA") else "")


def of_finished(command: str, finished: Iterable[str], missing: Sequence[str]) -> str:
    """The command that runs no more than what is finished, where something is missing; as it is otherwise."""
    only = [f"--only {shlex.quote(arm)}" for arm in finished] if missing and "--only" not in command else []
    return " ".join([command, *only])


def write(outcome: Outcome, drawn: Sequence[Picture] = ()) -> list[Path]:
    """The result as JSON and Markdown: in the output folder, and where the experiment says if it ran as committed."""
    committed = _committed(outcome)
    places = [outcome.folder / "result.json", *([committed] if committed else [])]
    for place in places:
        outcome.result.write(place)
        parts = [to_markdown(outcome.summary, outcome.experiment.name, outcome.lines)]
        parts += [p.markdown(place.parent, command_of(outcome.experiment, verb="report")) for p in drawn]
        write_text(place.with_suffix(".md"), "\n".join([*parts, markdown(outcome.details)]))
    return [file for place in places for file in (place, place.with_suffix(".md"))]


def _committed(outcome: Outcome) -> Path | None:
    """Where the result worth keeping goes; None unless everything ran without an error, and as the file says."""
    experiment = outcome.experiment
    failed = any(run.errors for run in outcome.results)
    if not experiment.result or outcome.missing or failed or not experiment.as_committed:
        return None
    return experiment.resolve(experiment.result)


def head(folder: ExperimentFolder, result: Result, missing: Sequence[str], names: Sequence[str]) -> list[str]:
    """What the Markdown begins with: where the figures come from.

    Args:
        names: of the tasks, or settings, that arms were measured on.
    """
    experiment, where = folder.experiment, result.machine
    lines = [experiment.description.strip(), ""] if experiment.description else []
    trained, evaluated = folder.commits(), folder.evaluated_at(result.arms, names)
    written = "report" if isinstance(experiment, LanguageExperiment) else "report and pictures"
    return [
        *lines,
        f"- command: `{result.command}`",
        f"- {written}: `{command_of(experiment, verb='report')}`",
        f"- commit: {result.commit or 'none'}",
        *([f"- trained at commit: {_said(trained)}"] if [*trained] not in ([], [result.commit]) else []),
        *([f"- evaluated at commit: {_said(evaluated)}"] if [*evaluated] not in ([], [result.commit]) else []),
        f"- machine: {', '.join(f'{key} {where[key]}' for key in _MACHINE if where.get(key))}",
        f"- seeds: {', '.join(map(str, result.seeds))}",
        *([f"- not run yet: {', '.join(missing)}"] if missing else []),
    ]


def _said(by_value: Mapping[str, Sequence[str]]) -> str:
    """The values with their arms; the value alone where all have the same."""
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} ({', '.join(arms)})" for value, arms in by_value.items())


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present and len(present) == len(values) else None
