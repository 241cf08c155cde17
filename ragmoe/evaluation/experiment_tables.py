"""Tables about an experiment's arms: how far each is, and how large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
