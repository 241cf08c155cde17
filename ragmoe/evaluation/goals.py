"""The comparisons of an experiment, and whether its goals are met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ragmoe.evaluation.experiment import Experiment, Goal
from ragmoe.evaluation.perturbation import REAL
from ragmoe.evaluation.report import few_documents
from ragmoe.evaluation.results import Results
from ragmoe.evaluation.statistics import Comparison, compare, lost_domains
from ragmoe.evaluation.tables import NONE, Table, bounds, number
from ragmoe.evaluation.task import Task


class Pair(NamedTuple):
    """What is compared: arm a, shown ``neighbours``, with arm b, shown the question's own, on a task."""

    a: str
    b: str
    metric: str
    task: str
    neighbours: str


Compared = dict[Pair, Comparison]


def compare_arms(
    experiment: Experiment, tasks: Sequence[Task], runs: Mapping[str, Mapping[str, Sequence[Results]]]
) -> Compared:
    """The experiment's comparisons on every task, by what it is judged by, then what its goals need beyond them.

    Of finished arms only, and not where every question of a domain failed in one of them.
    """
    settings = {task.name: task.setting_name for task in tasks}
    wanted = [Pair(a, b, task.judged_by, task.name, REAL) for task in tasks for a, b in experiment.comparisons]
    wanted += [pair_of(goal, experiment, tasks) for goal in experiment.goals]
    found: Compared = {}
    for pair in dict.fromkeys(wanted):
        if not {pair.a, pair.b} <= runs.keys():
            continue
        of_a = [run.samples.get(pair.neighbours) for run in runs[pair.a][pair.task]]
        of_b = [run.samples[REAL] for run in runs[pair.b][pair.task]]
        # A gate that sees no neighbours is the same whatever it is shown.
        shown = [own or run.samples[REAL] for own, run in zip(of_a, runs[pair.a][pair.task], strict=True)]
        if lost_domains([*shown, *of_b], pair.metric):
            continue
        setting = settings[pair.task] + ("" if pair.neighbours == REAL else f"+{pair.neighbours}")
        found[pair] = compare(shown, of_b, metric=pair.metric, setting=setting)
    return found


def pair_of(goal: Goal, experiment: Experiment, tasks: Sequence[Task]) -> Pair:
    """The comparison that decides a goal."""
    task = experiment.task_of(goal, tasks)
    return Pair(goal.a, goal.b, goal.metric.removeprefix("macro_"), task.name, goal.neighbours)


def verdict(goal: Goal, found: Comparison) -> str:
    """Whether a difference is what a goal asks for: ``met``, ``not shown`` or ``not met``; see ``Goal``."""
    if found.difference < goal.at_least:
        return "not met"
    shown = found.low > 0 if goal.at_least > 0 else found.low >= goal.at_least
    return "met" if shown else "not shown"


def goal_table(experiment: Experiment, tasks: Sequence[Task], compared: Compared) -> Table | None:
    """Every goal with the difference that was found; None where the experiment has none."""
    rows = []
    for goal in experiment.goals:
        found = compared.get(pair_of(goal, experiment, tasks))
        shown = "" if goal.neighbours == REAL else f" with {goal.neighbours} neighbours"
        rows.append(
            [
                f"{goal.a}{shown} − {goal.b}",
                goal.setting,
                goal.metric,
                f"≥ {goal.at_least:+g}",
                number(found.difference if found else None, 2, sign=True),
                bounds(found.low, found.high, sign=True) if found else NONE,
                "not finished" if found is None else verdict(goal, found),
            ]
        )
    if not rows:
        return None
    return Table(
        "Goals",
        ["arms", "setting", "metric", "asked", "difference", "95 % interval", "goal"],
        rows,
        note="Met: the difference is what was asked for, and so is all of its interval; where more than zero was asked "
        "for, all of the interval is above zero. Not shown: the difference alone is."
        + few_documents(*(found.per_domain_documents for found in compared.values())),
        labels=3,
    )
