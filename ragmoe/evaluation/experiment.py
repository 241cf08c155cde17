"""Experiments: a file that names arms, seeds and tasks; each arm is trained, evaluated and compared.

    ragmoe eval experiment eval/experiments/core7.yaml --data DIR
    ragmoe eval report eval/experiments/core7.yaml --data DIR

This file reads and checks one; experiment_run.py runs it, experiment_report.py writes its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from ragmoe._errors import ConfigError, UsageError
from ragmoe._variables import expand
from ragmoe.evaluation.perturbation import REAL
from ragmoe.evaluation.task import Task, describe, load_task, parse_task, read_yaml

UNTRAINED, DENSE = "untrained", "dense"
# The setting of documents that have no name of their own.
VALID = "valid"
# In values of ``train`` and of the arms it stands for the seed, as in the path of another experiment's bundle.
SEED = "{seed}"


class Goal(BaseModel):
    """What is hoped for: arm a is better than arm b by ``at_least`` points of a metric.

    With ``at_least`` above zero it is met where the difference reaches it and its 95 % interval lies above zero. With
    zero or less it says how much worse a may be, and is met where the whole interval reaches it. Where the difference
    alone does, it is not shown.

    Attributes:
        setting: of the task, as comparisons name it.
        neighbours: what arm a's gate is shown; arm b's is always shown the question's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    a: str
    b: str
    metric: Literal["macro_f1", "macro_em", "macro_f1_thresholded", "macro_em_thresholded"] = "macro_f1"
    setting: str = "gold"
    neighbours: Literal["real", "null", "shuffled", "wrong_domain"] = "real"
    at_least: float

    @field_validator("neighbours", mode="before")
    @classmethod
    def _bare_null(cls, value: object) -> object:
        # A bare null in YAML is None, and would otherwise have to be written in quotes.
        return "null" if value is None else value


class Experiment(BaseModel):
    """An experiment as its YAML gives it; paths are relative to the folder of the file, and ``{seed}`` is the seed.

    Attributes:
        index: an index folder, or a recipe (YAML) that is built where it does not stand yet.
        train: configuration of ``ragmoe train``, a path or a mapping; index and seed are put in.
        arms: for each what it changes in ``train``, such as ``{model.gate: token}``.
        tasks: the first is the one whose figures stand in the result; the others are compared and reported as well.
        comparisons: pairs of arms.
        baseline: the arm that the picture of differences is drawn against; None for ``dense``, else the first arm.
        goals: differences hoped for, shown as met or not met.
        notes: for each arm, in words, how its size is matched to the others'.
        untrained: also evaluate the model that training starts from, as the arm ``untrained`` or of the name given; or
            for several names the arms whose starts they are, such as ``{before: added}``.
        joined: arms that nothing is trained for, each of several arms that have trained a new expert: the bundle of the
            first, with the experts of the others taken into it (``ragmoe experts take``).
        result: where the result is written, as JSON and beside it as Markdown; None for the output folder only.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    description: str = ""
    index: str
    train: str | dict[str, Any]
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)
    tasks: list[str | dict[str, Any]] = Field(min_length=1)
    comparisons: list[tuple[str, str]] = []
    baseline: str | None = None
    goals: list[Goal] = []
    notes: dict[str, str] = {}
    untrained: bool | str | dict[str, str] = False
    joined: dict[str, list[str]] = {}
    result: str | None = None

    _path: Path = PrivateAttr(Path("experiment.yaml"))
    _overrides: tuple[str, ...] = PrivateAttr(())
    _own_seeds: bool = PrivateAttr(True)

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if reserved := {UNTRAINED, *self.untrained_arms} & set(self.arms):
            name = min(reserved)
            raise ValueError(f"no arm may be called {name!r}: that is the model that training starts from (untrained)")
        for name in self.arm_names:
            if not _is_folder_name(name):
                raise ValueError(f"the arm {name!r} names a folder: expected letters, digits, '-', '_' and '.'")
        named = {
            "comparisons name": [name for pair in self.comparisons for name in pair],
            "goals name": [name for goal in self.goals for name in (goal.a, goal.b)],
            "notes name": list(self.notes),
            "baseline names": [self.baseline] if self.baseline else [],
        }
        for where, names in named.items():
            if unknown := [name for name in names if name not in self.arm_names]:
                raise ValueError(f"{where} {unknown[0]!r}; the arms are {', '.join(self.arm_names)}")
        if unknown := [name for name in self.untrained_arms.values() if name not in self.arms]:
            raise ValueError(f"untrained names {unknown[0]!r}; the arms that are trained are {', '.join(self.arms)}")
        self._check_joined()
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds has duplicates: {self.seeds}")
        return self

    def _check_joined(self) -> None:
        for name, parts in self.joined.items():
            if name in {*self.arms, *self.untrained_arms}:
                raise ValueError(f"joined has {name!r}, which is the name of another arm")
            if unknown := [part for part in parts if part not in self.arms]:
                raise ValueError(
                    f"joined: {name} is of {unknown[0]!r}; the arms that are trained are {', '.join(self.arms)}"
                )
            if len(parts) < 2 or len(set(parts)) < len(parts):
                raise ValueError(f"joined: {name} is of {', '.join(parts) or 'nothing'}; expected several arms")

    @property
    def path(self) -> Path:
        """The file it was read from."""
        return self._path

    @property
    def folder(self) -> Path:
        """What its paths are relative to."""
        return self._path.parent

    @property
    def overrides(self) -> tuple[str, ...]:
        """``a.b=c`` for the training configuration of every arm, from the command line."""
        return self._overrides

    @property
    def as_committed(self) -> bool:
        """Whether nothing was changed from the command line."""
        return self._own_seeds and not self._overrides

    @property
    def arm_names(self) -> list[str]:
        """All arms, the untrained ones first, and last those that are joined of others."""
        return [*self.untrained_arms, *self.arms, *self.joined]

    @property
    def untrained_arms(self) -> dict[str, str]:
        """The arms that are models before training, each with the arm that starts from it."""
        if isinstance(self.untrained, dict):
            return self.untrained
        name = self.untrained if isinstance(self.untrained, str) else UNTRAINED
        return {name: next(iter(self.arms))} if self.untrained else {}

    @property
    def reference(self) -> str:
        """The arm that others are drawn against."""
        return self.baseline or (DENSE if DENSE in self.arm_names else self.arm_names[0])

    def resolve(self, path: str) -> Path:
        """A path of this file with its variables and its folder put in."""
        return self.folder / expand(path, f"experiment {self.name}", given="--data FOLDER")

    def load_tasks(self) -> list[Task]:
        """The tasks, read and checked; ConfigError where two have one name or setting, or a goal has no task."""
        tasks = [
            parse_task(entry, self.folder, f"{self._path}: tasks")
            if isinstance(entry, dict)
            else load_task(self.resolve(entry))
            for entry in self.tasks
        ]
        names = [task.name for task in tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"{self._path}: two tasks are called {twice[0]!r}; their results would overwrite each other"
            )
        settings = [task.setting_name for task in tasks]
        if twice := sorted({name for name in settings if settings.count(name) > 1}):
            same = ", ".join(task.name for task in tasks if task.setting_name == twice[0])
            raise ConfigError(
                f"{self._path}: the tasks {same} are of one setting, {twice[0]!r}, by which results name comparisons",
                hint="give all but one a label of their own, which is then their setting's name: label: shown",
            )
        for goal in self.goals:
            self.task_of(goal, tasks)
        return tasks

    def task_of(self, goal: Goal, tasks: Sequence[Task]) -> Task:
        """The task that a goal is judged by, that of its setting. ConfigError where there is none."""
        of_setting = [task for task in tasks if task.setting_name == goal.setting]
        if not of_setting:
            there = ", ".join(dict.fromkeys(task.setting_name for task in tasks))
            raise ConfigError(f"{self._path}: a goal names the setting {goal.setting!r}; the tasks have {there}")
        task = of_setting[0]
        if goal.neighbours != REAL and goal.neighbours not in task.perturbations:
            raise ConfigError(
                f"{self._path}: a goal names {goal.neighbours} neighbours; the task {task.name} has the perturbations "
                f"{', '.join(task.perturbations) or 'none'}"
            )
        return task

    def training(self, arm: str, seed: int, index: Path) -> Any:
        """The resolved training configuration (``TrainingConfig``) of an arm.

        An untrained arm has that of the arm that starts from it: at step 0 they are the same model. One that is joined
        of others has that of the first.
        """
        from ragmoe.training.config import load_config
        from ragmoe.training.config import read_yaml as read_training

        changes = self.arms[self.joined[arm][0] if arm in self.joined else self.untrained_arms.get(arm, arm)]
        source, folder = self.train, self.folder
        if isinstance(source, str):
            path = self.resolve(source)
            if not path.is_file():
                raise ConfigError(f"{self._path}: train names {path}, which does not exist")
            source, folder = read_training(path), path.parent
        content = merge(source, {"data": {"index": str(index.resolve())}, "seed": seed})
        for key, value in changes.items():
            content = merge(content, nest(key, value))
        content = _with_seed(content, seed)
        try:
            return load_config(content, self._overrides, folder=folder)
        except ConfigError as error:
            raise ConfigError(f"{self._path}: arm {arm}: {error.message}", hint=error.hint) from None


class LanguageExperiment(Experiment):
    """An experiment with language models: arms learn from documents, and are compared by perplexity on others.

    Attributes:
        documents: sources of those that are predicted, in the place of tasks; or several such lists by the name of
            their setting, as ``{old: [...], new: [...]}``. The first stands in the result as tasks' first does.
        perturbations: what else the gates are shown: no neighbours (``null``), or those of the chunk that lies half of
            all chunks further on (``shuffled``): where documents come domain by domain, of another domain.
    """

    tasks: list[str | dict[str, Any]] = Field([], max_length=0)
    goals: list[Goal] = Field([], max_length=0)
    documents: list[str] | dict[str, list[str]] = Field(min_length=1)
    perturbations: list[Literal["null", "shuffled"]] = []

    @field_validator("documents")
    @classmethod
    def _named_as_folders(cls, value: list[str] | dict[str, list[str]]) -> list[str] | dict[str, list[str]]:
        for name, sources in value.items() if isinstance(value, dict) else ():
            if not _is_folder_name(name) or not sources:
                raise ValueError(f"{name!r}: expected a name of letters, digits, '-', '_' and '.', and some sources")
        return value

    @property
    def settings(self) -> dict[str, list[str]]:
        """The documents' sources by setting."""
        return self.documents if isinstance(self.documents, dict) else {VALID: self.documents}

    @field_validator("perturbations", mode="before")
    @classmethod
    def _bare_nulls(cls, value: object) -> object:
        return ["null" if entry is None else entry for entry in value] if isinstance(value, list) else value


def _is_folder_name(name: str) -> bool:
    return name.replace("-", "").replace("_", "").replace(".", "").isalnum()


def load_experiment(
    path: str | Path, *, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None
) -> Experiment:
    """Read an experiment's YAML file.

    Args:
        overrides: ``a.b=c`` for the training configuration of every arm.
        seeds: in place of the file's.

    Raises:
        ConfigError: it is missing, no YAML, or has an unknown key or a wrong value.
    """
    path = Path(path)
    content = read_yaml(path, "experiment", "ragmoe eval experiment FILE.yaml")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(content).__name__}")
    kind = LanguageExperiment if "documents" in content else Experiment
    try:
        experiment = kind.model_validate({**content, **({"seeds": list(seeds)} if seeds is not None else {})})
    except ValidationError as error:
        raise ConfigError(
            f"{path}: {describe(error)}", hint=f"an experiment may have: {', '.join(kind.model_fields)}"
        ) from None
    for override in overrides:
        if "=" not in override:
            raise UsageError(f"expected a.b=c, got {override!r}", hint="for example: train.steps=100")
    experiment._path, experiment._overrides, experiment._own_seeds = (
        path,
        tuple(overrides),
        # Also where the file's own are given, as in the command that a result shows.
        seeds is None or list(seeds) == (content.get("seeds") or kind.model_fields["seeds"].default),
    )
    return experiment


def _with_seed(value: Any, seed: int) -> Any:
    """Nested values with the seed in its place."""
    if isinstance(value, dict):
        return {key: _with_seed(entry, seed) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_seed(entry, seed) for entry in value]
    return value.replace(SEED, str(seed)) if isinstance(value, str) else value


def nest(key: str, value: Any) -> dict[str, Any]:
    """``a.b`` and c as {a: {b: c}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested mappings with changes put in."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
