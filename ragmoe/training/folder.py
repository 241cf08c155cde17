"""The folder of a run: what may be written there, what it was started with, and where it can go on.

training.yaml     the resolved configuration
started.json      what else the run depends on: digests of index and questions, the precision that was chosen
history.jsonl     losses and routing
checkpoints/      while training
.training.lock    likewise, and held by the process that does
the bundle        when it is done
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ragmoe._differences import differences
from ragmoe._errors import ConfigError, UsageError
from ragmoe._folders import held
from ragmoe.bundle import MAP_NAME, is_bundle
from ragmoe.generation.generator import STYLE_NAME
from ragmoe.training.config import TrainingConfig, explain, read_yaml

CONFIG_NAME, STARTED_NAME, HISTORY_NAME, CHECKPOINTS = "training.yaml", "started.json", "history.jsonl", "checkpoints"
_GONE = ".checkpoints.gone"
LOCK_NAME = ".training.lock"
# What a run leaves beside what tells that it is one.
_LEFT = (
    HISTORY_NAME, CHECKPOINTS, _GONE, "adapter", "adding", "bundle.json", "config.json", "generation_config.json",
    "base-*.safetensors", "gate.*.safetensors", "expert.*.safetensors", "model*.safetensors", "maps/[0-9]*.json",
    "experts/[0-9]*", "tokenizer*.json", "added_tokens.json", "special_tokens_map.json", "vocab.*", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip


def locked(folder: Path) -> AbstractContextManager[None]:
    """Hold a folder for one training; see ``held``.

    Raises:
        ConfigError: it is none and cannot become one, or another process is training there.
    """
    told, hint = f"{folder} is locked: another process is training there", "wait until it has finished, or name another"
    return held(folder, LOCK_NAME, ConfigError(told, hint=f"{hint} folder"))


def is_started(folder: Path) -> bool:
    """Whether a run has begun here, finished or not: a configuration alone may be the user's own."""
    return (folder / CONFIG_NAME).is_file() and (folder / STARTED_NAME).is_file()


def is_finished(folder: Path) -> bool:
    """Whether a run has left a model here that was saved whole and checked: only then do its checkpoints go.

    A bundle is known by its map, and any other model by its prompt style, either of which is written last.
    """
    return not (folder / CHECKPOINTS).is_dir() and _holds_model(folder)


def _holds_model(folder: Path) -> bool:
    weights = (folder / MAP_NAME, folder / "model.safetensors")
    return is_bundle(folder) or ((folder / STYLE_NAME).is_file() and any(path.is_file() for path in weights))


def forget_model(folder: Path) -> None:
    """Take from a folder what makes it a finished run's: the map of a bundle, the prompt style of any other model."""
    for name in (MAP_NAME, STYLE_NAME):
        (folder / name).unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove what a run has left, and nothing else; last what tells that it is one, so that a kill leaves a run."""
    for path in (path for pattern in _LEFT for path in folder.glob(pattern)):
        path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)
    forget_model(folder)
    for name in (CONFIG_NAME, STARTED_NAME):
        (folder / name).unlink(missing_ok=True)


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run whose model was saved and checked, which thereby is finished: at once or not."""
    gone = folder / _GONE
    shutil.rmtree(gone, ignore_errors=True)
    if (folder / CHECKPOINTS).is_dir():
        os.replace(folder / CHECKPOINTS, gone)
    shutil.rmtree(gone, ignore_errors=True)


def check_out(folder: Path, config: TrainingConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse to write over what is there, unless told to; nothing is changed here.

    Raises:
        UsageError: both resume and overwrite were asked for.
        ConfigError: the folder holds a run, or something else, or a run of another configuration.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    started, finished = is_started(folder), is_finished(folder)
    for name, needed in _needed(config, material=overwrite):
        if any(_lies_in(path, folder) for path in (needed, *glob.glob(needed, recursive=True))):
            raise ConfigError(
                f"{name} is {needed}, which lies in {folder}, where the run's own model would be written",
                hint="name another folder; to add an expert to a bundle in its place: ragmoe experts add",
            )
    # A kill may have left the first file of a run alone.
    others = sorted({path.name for path in folder.iterdir()} - {STARTED_NAME, LOCK_NAME})
    if others and not (started or finished):
        raise ConfigError(
            f"{folder} holds other things than a run: {', '.join(others[:5])}", hint="name another folder"
        )
    if overwrite:
        return
    if finished:
        raise ConfigError(f"{folder} holds a finished run", hint="name another folder, or pass --overwrite")
    can_go_on = any(_is_whole(path) for path in _checkpoints(folder))
    again = "--overwrite to start again"
    if started and not resume:
        raise ConfigError(
            f"{folder} holds a run that did not finish{'' if can_go_on else ' and left no checkpoint'}",
            hint=f"pass --resume to go on from the last checkpoint, or {again}" if can_go_on else f"pass {again}",
        )
    if started and (differing := differences(saved_config(folder), config.model_dump(mode="json"))):
        raise ConfigError(
            f"cannot resume {folder}: the configuration differs from its {CONFIG_NAME} in {', '.join(differing)}",
            hint=f"ragmoe train {folder / CONFIG_NAME} --out {folder} --resume" if can_go_on else f"pass {again}",
        )


def _needed(config: TrainingConfig, *, material: bool) -> list[tuple[str, str]]:
    """The files and folders that a run reads, by the setting that names them.

    Args:
        material: what it learns from too, which only goes where a folder is overwritten.
    """
    data, expert = config.data, config.new_expert
    named = [("base", config.base), ("start", config.start)]
    if material:
        named.append(("data.index", data.index))
        lists = {"data.questions": data.questions, "data.documents": data.documents, "data.replay": data.replay}
        if expert is not None:
            lists |= {"new_expert.corpus": expert.corpus, "new_expert.others": expert.others}
            lists |= {"new_expert.unseen": expert.unseen}
        named += [(name, source) for name, sources in lists.items() for source in sources]
    return [(name, str(value)) for name, value in named if value]


def _lies_in(source: str, folder: Path) -> bool:
    """Whether a source is there, and in a folder or that folder itself."""
    path = Path(source)
    return path.exists() and path.resolve().is_relative_to(folder.resolve())


def saved_config(folder: Path) -> dict[str, Any]:
    """The configuration a run in ``folder`` was started with; keys that did not exist then have their defaults.

    Raises:
        ConfigError: it is none that this version knows.
    """
    path = folder / CONFIG_NAME
    try:
        return TrainingConfig.model_validate(read_yaml(path)).model_dump(mode="json")
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}", hint="was it written by a newer ragmoe?") from None


def start(
    folder: Path, config: TrainingConfig, *, index: str, material: Sequence[object], bf16: bool, overwrite: bool
) -> bool:
    """Make the folder ready and say whether to train in bf16: as the run began, where it goes on.

    Raises:
        ConfigError: the index, or the questions or documents (``material``), have changed since the run began.
    """
    now: dict[str, Any] = {"index": index, "questions": _digest(material), "bf16": bf16}
    if overwrite:
        _clear(folder)
    path = folder / STARTED_NAME
    if is_started(folder):
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in ("index", "questions") if before[name] != now[name]]:
            raise ConfigError(
                f"cannot resume {folder}: the {' and the '.join(changed)} changed since it began",
                hint="pass --overwrite to start again",
            )
        # A kill while the model was saved has left it unchecked; it is made again from the last checkpoint.
        forget_model(folder)
        for torn in (checkpoint for checkpoint in _checkpoints(folder) if not _is_whole(checkpoint)):
            shutil.rmtree(torn)
        return bool(before["bf16"])
    path.write_text(json.dumps(now) + "\n", encoding="utf-8")
    (folder / CONFIG_NAME).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return bf16


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; a kill, or another process at this moment, may have left a torn one."""
    return next((str(path) for path in _checkpoints(folder) if _is_whole(path)), None)


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, newest first."""
    found = (folder / CHECKPOINTS).glob("checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _is_whole(checkpoint: Path) -> bool:
    try:
        # Trainer writes it last.
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _digest(material: Sequence[object]) -> str:
    return hashlib.sha256("\x1e".join(repr(one) for one in material).encode()).hexdigest()
