"""Running an experiment: train each arm and evaluate it; then its result is written as ``ragmoe eval report`` does.

Everything that was done is taken up again: a trained arm is not trained twice, a question that was read is not read
twice. What an arm leaves is listed in experiment_folder.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ragmoe._errors import ConfigError, UsageError
from ragmoe._folders import expect_folder
from ragmoe.bundle import MAP_NAME, take_experts
from ragmoe.evaluation.experiment import Experiment
from ragmoe.evaluation.experiment_folder import ExperimentFolder
from ragmoe.evaluation.experiment_report import Outcome, command_of, default_folder, gather, write
from ragmoe.evaluation.items import check_gold
from ragmoe.evaluation.machine import commit_of_run
from ragmoe.evaluation.opening import index_of_recipe
from ragmoe.evaluation.protocols import Reader
from ragmoe.evaluation.retrieval import Retrieval
from ragmoe.evaluation.run import Progress, evaluate
from ragmoe.evaluation.task import Task

if TYPE_CHECKING:
    from ragmoe.index import Index
    from ragmoe.training.callbacks import Shows
    from ragmoe.training.config import TrainingConfig

IndexProgress = Callable[[str, int, int], None]
# What tells of the training of a bundle, which one that is joined of several has not had.
_OF_TRAINING = ("training.yaml", "started.json", "history.jsonl", "checkpoints")


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
    root = begin(experiment, out, only)
    say = say or (lambda line: None)
    tasks = experiment.load_tasks()
    for task in tasks:
        if told := check_gold(task, task.load_questions()):
            say(told)
    index = index_of_recipe(experiment.resolve(experiment.index), progress=index_progress)
    for task in tasks:
        _require_index(task, index, experiment)
    folder = open_folder(experiment, root, index)
    retrieval = Retrieval(index)
    for seed in experiment.seeds:
        for arm in only or experiment.arm_names:
            model = _model(folder, arm, seed, index, say, show_training)
            for task in tasks:
                say(f"{arm}, seed {seed}: evaluating {task.name}")
                place, before = folder.place(arm, seed) / task.name, folder.figures(arm, seed, task)
                evaluate(model, task, index, out=place, progress=progress, retrieval=retrieval, name=arm)
                if folder.figures(arm, seed, task) != before:
                    folder.measured(arm, seed, task.name)
    outcome = gather(folder, tasks, command or command_of(experiment))
    outcome.written = write(outcome)
    return outcome


def _require_index(task: Task, index: Index, experiment: Experiment) -> None:
    """ConfigError where a task names another index than the experiment's, over which all of its tasks are evaluated."""
    if task.corpus:
        other = f"a corpus of its own, {', '.join(task.corpus)}"
    elif task.index and (own := index_of_recipe(task.resolve(task.index))).digest != index.digest:
        other = f"the index {own.folder} ({own.digest[:12]})"
    else:
        return
    raise ConfigError(
        f"the task {task.name} is over {other}, but the experiment {experiment.name} evaluates every task over "
        f"{index.folder} ({index.digest[:12]})",
        hint="leave it out of the task, or name the same index in both",
    )


def begin(experiment: Experiment, out: str | Path | None, only: Sequence[str]) -> Path:
    """The folder that an experiment runs in, once it is known that it can be one, and that the arms are there."""
    if unknown := [name for name in only if name not in experiment.arm_names]:
        raise UsageError(f"there is no arm {unknown[0]!r}; there are: {', '.join(experiment.arm_names)}")
    root = Path(out) if out else default_folder(experiment)
    expect_folder(root)
    return root


def open_folder(experiment: Experiment, root: Path, index: Index) -> ExperimentFolder:
    """The experiment's folder, in which no arm was trained otherwise; ConfigError where one was."""
    # What is committed from here on is not what runs.
    commit_of_run(experiment.folder)
    folder = ExperimentFolder(experiment, root, index.digest)
    folder.check_arms(index.folder)
    _check_joined(experiment, index)
    return folder


def _check_joined(experiment: Experiment, index: Index) -> None:
    """ConfigError where bundles cannot be joined: parts that add no expert, one name twice, or to several bases."""
    for arm, parts in experiment.joined.items():
        configs = [experiment.training(part, experiment.seeds[0], index.folder) for part in parts]
        where = f"{experiment.path}: joined: {arm}"
        names = [_added(config, f"{where} is of {part}") for part, config in zip(parts, configs, strict=True)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(
                f"{where}: several of {', '.join(parts)} add an expert {twice[0]!r}; expected names of their own",
                hint="give the arms new_expert.name",
            )
        if len(bases := {config.base for config in configs}) > 1:
            raise ConfigError(f"{where}: {', '.join(parts)} begin from {', '.join(sorted(bases))}; expected one base")


def _added(config: TrainingConfig, where: str) -> str:
    """The name of the expert that an arm adds; ConfigError where it adds none."""
    if config.new_expert is None:
        raise ConfigError(f"{where}: expected an arm that trains a new expert")
    return config.new_expert.name


def trained_bundle(
    folder: ExperimentFolder,
    arm: str,
    seed: int,
    config: TrainingConfig,
    say: Callable[[str], None],
    show: Shows | None,
) -> Path:
    """An arm's bundle, trained first where it is not yet."""
    from ragmoe.training import train

    bundle = folder.bundle(arm, seed)
    if folder.trained(arm, seed):
        say(f"{arm}, seed {seed}: trained already")
    else:
        say(f"{arm}, seed {seed}: training {config.train.steps} steps")
        folder.begin(arm, seed, config)
        done = train(config, out=bundle, resume=True, cache=folder.root / "cache", show=show)
        folder.end(arm, seed, done.seconds)
    return bundle


def bundle_of(
    folder: ExperimentFolder, arm: str, seed: int, index: Index, say: Callable[[str], None], show: Shows | None
) -> Path:
    """The bundle of an arm that is not untrained: trained, or joined of those of others, where it is not yet."""
    experiment = folder.experiment
    parts = experiment.joined.get(arm)
    configs = {name: experiment.training(name, seed, index.folder) for name in parts or [arm]}
    bundles = {name: trained_bundle(folder, name, seed, config, say, show) for name, config in configs.items()}
    if parts is None:
        return bundles[arm]
    own = folder.bundle(arm, seed)
    if folder.trained(arm, seed):
        say(f"{arm}, seed {seed}: joined already")
        return own
    say(f"{arm}, seed {seed}: joining {', '.join(parts)}")
    made = own.with_name(".joining")
    # What was joined before is no bundle from here on, wherever this is stopped.
    (own / MAP_NAME).unlink(missing_ok=True)
    for stale in (own, made):
        shutil.rmtree(stale, ignore_errors=True)
    shutil.copytree(bundles[parts[0]], made, ignore=shutil.ignore_patterns(".*", *_OF_TRAINING))
    for name in parts[1:]:
        take_experts(made, bundles[name], [_added(configs[name], name)])
    folder.begin_joined(arm, seed)
    os.replace(made, own)
    return own


def _model(
    folder: ExperimentFolder, arm: str, seed: int, index: Index, say: Callable[[str], None], show: Shows | None
) -> Reader:
    """An arm's reader or generator, trained first where it is not yet."""
    from ragmoe.generation import Generator
    from ragmoe.models import load
    from ragmoe.models.xlora import XLoraReader
    from ragmoe.training.build import build_model
    from ragmoe.training.clusters import place_clusters
    from ragmoe.training.generator import open_generator, trains_generator

    config = folder.experiment.training(arm, seed, index.folder)
    if arm in folder.experiment.untrained_arms:
        folder.begin_untrained(arm, seed, config)
    if trains_generator(config):
        if arm in folder.experiment.untrained_arms:
            generator = open_generator(config, index)
            place_clusters(generator.model, index, seed=config.seed)
            return generator
        return Generator.load(bundle_of(folder, arm, seed, index, say, show))
    if arm in folder.experiment.untrained_arms:
        import torch

        model = build_model(config, index, on_cpu=not torch.cuda.is_available())
        place_clusters(model, index, seed=config.seed)
        return model
    bundle = bundle_of(folder, arm, seed, index, say, show)
    return XLoraReader.from_pretrained(bundle) if config.train.what == "xlora" else load(bundle)
