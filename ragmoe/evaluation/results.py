"""The results of one model on one task: figures, samples, and their files.

A run's folder holds ``results.json``, ``samples.jsonl``, ``samples.CONDITION.jsonl`` for each perturbation, and
``run.trec`` with ``qrels.trec``. ``results.json`` has the shape of lm-evaluation-harness (a group for the task, a
subtask for each domain), with everything else under ``ragmoe``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragmoe._errors import DataError
from ragmoe._version import __version__
from ragmoe.evaluation.perturbation import REAL
from ragmoe.evaluation.samples import Sample, read_samples, write_text

#: Raised where the same answer is scored otherwise, or means are taken otherwise.
SCORING_VERSION = 3
#: The file by which an evaluation is finished.
RESULTS_NAME = "results.json"
_WRITES = "ragmoe eval run TASK --model BUNDLE --out DIR writes one, or finishes one that was stopped"
_UNITS = {
    "f1, em, accuracy, macro_f1, f1_all, difference": "points, 0 to 100",
    "coverage, auroc, retrieval, load, normalised_mi, routing_shift": "share, 0 to 1",
    "entropy": "nats",
}
_LM_EVAL_NAMES = {"f1": "f1,none", "em": "exact_match,none", "f1_thresholded": "f1_thresholded,none"}


@dataclass(frozen=True)
class Results:
    """What an evaluation found.

    Attributes:
        task: the task as configured, limits included; ``setting`` as comparisons name it.
        model: what the model is called; ``model_digest`` and ``index_digest`` say which it was.
        parameters: ``active`` and ``total``.
        conditions: ``real`` and each perturbation: the figures of ``scoring.summarise`` with ``interval`` (of macro
            F1), ``routing`` (see ``routing.summarise_routing``) and, for a perturbation, ``change`` against ``real``.
            A perturbation that does not apply to the model is None.
        retrieval: see ``retrieval.score_retrieval``.
        samples: the records by condition.
    """

    task: dict[str, Any]
    setting: str
    model: str
    model_digest: str
    index_digest: str
    parameters: dict[str, int]
    conditions: dict[str, dict[str, Any] | None]
    retrieval: dict[str, Any] | None
    samples: dict[str, list[Sample]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self.task["name"])

    @property
    def real(self) -> dict[str, Any]:
        """The figures under the question's own neighbours."""
        return self.conditions[REAL] or {}

    @property
    def macro_f1(self) -> float | None:
        """F1 in 0..100 as the mean over domains, on answerable questions."""
        return self.real["macro"]["f1"]

    @property
    def errors(self) -> list[Sample]:
        """Every question that failed, under any condition."""
        return [sample for samples in self.samples.values() for sample in samples if sample.status == "error"]

    def to_json(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return to_lm_eval([self])

    def write(self, folder: Path) -> None:
        """Write ``results.json``; the samples are there already."""
        write_text(folder / RESULTS_NAME, json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read a run back. DataError where the folder holds none, or not all of it."""
        folder = Path(folder)
        path = folder / RESULTS_NAME
        try:
            blocks = json.loads(path.read_text(encoding="utf-8"))["ragmoe"]["tasks"]
            if len(blocks) != 1:
                raise DataError(f"{path} holds {len(blocks)} tasks; expected one")
            block = next(iter(blocks.values()))
            files = {name: folder / samples_name(name) for name, figures in block["conditions"].items() if figures}
            return cls(**block, samples={name: read_samples(file) for name, file in files.items()})
        except FileNotFoundError as error:
            have = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
            raise DataError(
                f"{folder} is not a finished evaluation: it lacks {Path(error.filename).name}; "
                f"it holds {', '.join(have) or 'nothing'}",
                hint=_WRITES,
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error}", hint=f"run it again with --out {folder}") from None


def samples_name(condition: str) -> str:
    """The file name of a condition's records."""
    return "samples.jsonl" if condition == REAL else f"samples.{condition}.jsonl"


def find_runs(folder: str | Path) -> dict[str, Results]:
    """The runs in a folder, by task name: its own, or those of its sub-folders.

    Raises:
        DataError: there is none, and the folders beside it that hold some are named; or there are two of one task.
    """
    folder = Path(folder)
    places = _places(folder)
    if not places:
        have = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
        holds = f"it holds {', '.join(have) or 'nothing'}" if folder.is_dir() else "there is no such folder"
        around = folder.absolute().parent
        beside = [path.name for path in sorted(around.iterdir()) if _places(path)] if around.is_dir() else []
        raise DataError(
            f"{folder} is not a finished evaluation: expected {RESULTS_NAME} in it, or in folders of it, but {holds}; "
            f"evaluations in {folder.parent}: {', '.join(beside) or 'none'}",
            hint=_WRITES,
        )
    runs: dict[str, Results] = {}
    found: dict[str, Path] = {}
    for place in places:
        run = Results.load(place)
        if run.name in runs:
            # As with and without some experts, or with fewer questions.
            raise DataError(
                f"{folder} holds two evaluations of the task {run.name}, in {found[run.name].name} and {place.name}",
                hint=f"name one of them: {found[run.name]} or {place}",
            )
        runs[run.name], found[run.name] = run, place
    return runs


def _places(folder: Path) -> list[Path]:
    """The folder itself where a run was written into it, else those in it."""
    if os.path.exists(folder / RESULTS_NAME):
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{RESULTS_NAME}"))


def to_lm_eval(runs: Sequence[Results]) -> dict[str, Any]:
    """Several tasks of one model in one object of lm-evaluation-harness's shape."""
    shape: dict[str, Any] = {
        "results": {},
        "group_subtasks": {},
        "configs": {},
        "versions": {},
        "n-shot": {},
        "higher_is_better": {},
        "n-samples": {},
    }
    for run in runs:
        _add_group(shape, run)
    shape["config"] = {
        "model": "ragmoe",
        "model_args": runs[0].model if runs else "",
        "limit": [r.task["limit_per_domain"] for r in runs],
    }
    shape["ragmoe"] = {"version": __version__, "units": _UNITS, "tasks": {run.name: _block(run) for run in runs}}
    return shape


def _add_group(shape: dict[str, Any], run: Results) -> None:
    real, bounds = run.real, run.real["interval"] or {}
    stderr = {run.name: bounds.get("stderr")}
    stderr |= {f"{run.name}_{d}": value for d, value in bounds.get("per_domain_stderr", {}).items()}
    groups = {run.name: real["macro"]} | {f"{run.name}_{d}": block for d, block in real["per_domain"].items()}
    shape["group_subtasks"][run.name] = [name for name in groups if name != run.name]
    for name, block in groups.items():
        shape["results"][name] = _lm_eval_row(name, block, stderr.get(name))
        shape["configs"][name] = run.task
        shape["versions"][name] = SCORING_VERSION
        shape["n-shot"][name] = 0
        shape["higher_is_better"][name] = dict.fromkeys(("f1", "exact_match", "f1_thresholded"), True)
        shape["n-samples"][name] = {"original": block["total"], "effective": block["n"]}


def _lm_eval_row(name: str, block: Mapping[str, Any], stderr: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"alias": name}
    for ours, theirs in _LM_EVAL_NAMES.items():
        row[theirs] = block[ours]
    row["f1_stderr,none"] = "N/A" if stderr is None else stderr
    row["coverage,none"] = block["coverage"]
    return row


def _block(run: Results) -> dict[str, Any]:
    return {
        "task": run.task,
        "setting": run.setting,
        "model": run.model,
        "model_digest": run.model_digest,
        "index_digest": run.index_digest,
        "parameters": run.parameters,
        "conditions": run.conditions,
        "retrieval": run.retrieval,
    }
