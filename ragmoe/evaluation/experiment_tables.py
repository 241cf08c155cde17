"""Tables about an experiment's arms: how far each is, how large, and who calls the experts that were added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ragmoe.evaluation.experiment import DENSE
from ragmoe.evaluation.experiment_folder import ExperimentFolder
from ragmoe.evaluation.results import Results
from ragmoe.evaluation.tables import NONE, Table
from ragmoe.evaluation.task import Task

TOLERANCE = 0.02


def progress_table(folder: ExperimentFolder, tasks: Sequence[Task]) -> Table:
    """How far each arm is with each seed."""
    experiment = folder.experiment
    rows = [[arm, *(folder.progress(arm, seed, tasks) for seed in experiment.seeds)] for arm in experiment.arm_names]
    return Table(
        "How far each arm is",
        ["arm", *(f"seed {seed}" for seed in experiment.seeds)],
        rows,
        note=f"F1: finished, with its macro F1 on {tasks[0].name}. An arm counts below when every seed is finished.",
        labels=1 + len(experiment.seeds),
    )


def parameter_table(arms: Mapping[str, Results], notes: Mapping[str, str]) -> Table | None:
    """Active and total parameters, the active ones against the dense arm's, and how each arm is matched.

    Args:
        arms: a run of each.
        notes: by arm, how it is matched, in words.
    """
    if not arms:
        return None
    dense = arms[DENSE].parameters["active"] if DENSE in arms else None
    rows, off = [], []
    for arm, run in arms.items():
        active, total = run.parameters["active"], run.parameters["total"]
        share = None if dense is None else active / dense - 1
        rows.append([arm, f"{active:,}", f"{total:,}", NONE if share is None else f"{100 * share:+.2f} %"])
        if share is not None and abs(share) > TOLERANCE:
            off.append(f"{arm} ({100 * share:+.1f} %)")
    lines = ["Active: every parameter used for one token, gates included."]
    if off:
        lines.append(
            f"Not matched: the active parameters differ from the dense arm's by more than 2 %: {', '.join(off)}."
        )
    elif dense is not None and len(arms) > 1:
        lines.append("The active parameters of all arms are within 2 % of the dense arm's.")
    matched = "".join(f"\n- {arm}: {notes[arm].strip()}" for arm in arms if arm in notes)
    return Table(
        "Parameters",
        ["arm", "active", "total", "active against dense"],
        rows,
        note=" ".join(lines) + (f"\n{matched}" if matched else ""),
    )


def added_table(runs: Mapping[str, Mapping[str, Sequence[Results]]], starts: Sequence[str]) -> Table | None:
    """How often experts that no starting model had are called, in each task; None where there are none.

    Args:
        runs: of each arm by task name, one a seed.
        starts: the arms that are models before training.
    """
    begun = [by_task for arm, by_task in runs.items() if arm in starts]
    known = {name for by_task in begun for results in by_task.values() for name in _experts(results)}
    rows = [
        [arm, name, *(_called(results, name) for results in by_task.values())]
        for arm, by_task in (runs.items() if known else ())
        for name in dict.fromkeys(name for results in by_task.values() for name in _experts(results))
        if name not in known
    ]
    if not rows:
        return None
    tasks = {task: results[0].setting for task, results in begun[0].items()}
    return Table(
        "Experts added",
        ["arm", "expert", *(f"{task} ({setting})" for task, setting in tasks.items())],
        rows,
        note="Share of the gate's choices that fall on the expert, as a mean over domains and layers: where a token "
        "chooses K experts, 1/K means that all tokens call it. Leaks are its calls where it is not wanted.",
        labels=2,
    )


def _experts(runs: Sequence[Results]) -> list[str]:
    return list(_routing(runs[0]).get("experts", []))


def _called(runs: Sequence[Results], expert: str) -> str:
    shares = []
    for run in runs:
        routing = _routing(run)
        if expert in routing.get("experts", []):
            at = routing["experts"].index(expert)
            shares += [load_E[at] for load_LE in routing["load_per_domain"].values() for load_E in load_LE]
    return f"{100 * fmean(shares):.1f} %" if shares else NONE


def _routing(run: Results) -> dict[str, Any]:
    return run.real.get("routing") or {}
