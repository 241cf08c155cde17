"""The configuration of a training run: one YAML file, unknown keys fail, ``a.b=c`` overrides a key.

Its sections and their defaults stand in sections.py; the resolved configuration is saved as ``training.yaml``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from ragmoe._errors import ConfigError, UsageError
from ragmoe._variables import expand
from ragmoe.training.sections import (
    DataConfig,
    GenerateConfig,
    LanguageConfig,
    LoraConfig,
    NewExpertConfig,
    OptimiserConfig,
    RaftConfig,
    Section,
)


class TrainingConfig(Section):
    """A whole run.

    Attributes:
        base: dense checkpoint to upcycle: ``minilm`` (the packaged default), a path or a Hub id; or a bundle, which is
            trained on (``starter`` is the packaged one).
        start: what the dense base has learned already: a PEFT adapter (``warm-start`` is the packaged one, else a
            folder), or the dense network of a bundle with LoRA experts (``starter``, or a folder); None for nothing.
        model: fields of ``RagmoeBertConfig``; of a causal language model what ``ragmoe init`` is told (``gate``,
            ``experts``, ``top_k``, ``expert_kind``, ``layers``, ``init``, ``amount`` and others), or nothing to train
            it as it is.
        expert_noise: relative noise that tells copied full experts apart.
        new_expert: for ``train.what: new_expert``, and only there.
        generate: for a base that is a causal language model, and only there; a folder of one needs none, and a Hub id
            is taken for one where this is given, be it empty (``generate: {}``).
        language: for ``data.documents``, and only there; None takes its defaults.
        checkpoint_every: steps between checkpoints; 0 writes none.
        log_every: steps between lines of the history.
    """

    base: str = "minilm"
    start: str | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    expert_noise: float = Field(0.0, ge=0)
    data: DataConfig
    raft: RaftConfig = RaftConfig()
    train: OptimiserConfig = OptimiserConfig()
    new_expert: NewExpertConfig | None = None
    generate: GenerateConfig | None = None
    language: LanguageConfig | None = None
    seed: int = 0
    checkpoint_every: int = Field(100, ge=0)
    log_every: int = Field(10, ge=1)


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, folder: Path | None = None
) -> TrainingConfig:
    """Read a configuration, apply overrides, make its paths absolute.

    Args:
        source: a YAML file, or a mapping of the same form.
        overrides: ``key.key=value`` with the value in YAML; their paths count from the working directory.
        folder: what relative paths of a mapping are relative to; None means the working directory.

    Raises:
        ConfigError: naming the key, what was got and what was expected.
        UsageError: the same, where an override is what is wrong.
    """
    if isinstance(source, Mapping):
        name, content, folder = "configuration", copy.deepcopy(dict(source)), folder or Path.cwd()
    else:
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"there is no configuration file {path}", hint="ragmoe train CONFIG.yaml")
        name, content, folder = str(path), read_yaml(path), path.parent
    given = {set_key(content, override) for override in overrides}
    try:
        config = TrainingConfig.model_validate(content)
    except ValidationError as error:
        if _is_about(error, given):
            raise UsageError(explain(error)) from None
        raise ConfigError(f"{name}: {explain(error)}") from None
    _check_model_keys(given)
    _check_material(name, config)
    config.data.questions = [resolve(entry, folder) for entry in config.data.questions]
    config.data.documents = [e if e.startswith("hub:") else resolve(e, folder) for e in config.data.documents]
    config.data.replay = [e if e.startswith("hub:") else resolve(e, folder) for e in config.data.replay]
    if expert := config.new_expert:
        for name in ("others", "unseen", "corpus"):
            named = getattr(expert, name)
            setattr(expert, name, [e if e.startswith("hub:") else resolve(e, folder) for e in named])
    if config.data.index is not None:
        config.data.index = resolve(config.data.index, folder)
    # What begins with a dot is no Hub id, whether or not it is there.
    is_folder = config.base.startswith((".", "~", "$")) or (folder / config.base).exists()
    if config.base != "minilm" and "base" not in given and is_folder:
        config.base = resolve(config.base, folder)
    if config.base == "starter":
        from ragmoe.models.starter import resolve_bundle

        config.base = str(resolve_bundle(config.base).absolute())
    if config.start not in (None, "warm-start", "starter"):
        config.start = resolve(config.start, folder)
    return config


def _check_material(name: str, config: TrainingConfig) -> None:
    """Refuse a run that has nothing to learn from, or both questions and documents."""
    data = config.data
    if data.documents and data.questions:
        raise ConfigError(f"{name}: data.questions and data.documents exclude each other")
    for key, given in (("language", config.language is not None), ("data.without", data.without)):
        if given and not data.documents:
            raise ConfigError(f"{name}: {key} is given, but no data.documents that it could be about")
    if not (data.documents or data.questions or (config.new_expert and config.new_expert.corpus)):
        raise ConfigError(
            f"{name}: data.questions is empty: there is nothing to learn from",
            hint="a new expert can learn from documents alone (new_expert.corpus, --corpus), and a causal language "
            "model from data.documents",
        )
    if not data.documents:
        # Questions are about passages.
        _ = data.required_index


# What is trained beside the head, where ``train.what`` does not say it itself.
_TRAINED = {
    "all": {"base", "gate", "experts"}, "lora": {"gate", "experts"}, "new_expert": {"gate", "experts"},
    "xlora": {"gate"},
}  # fmt: skip


def trained_parts(what: str) -> set[str]:
    """Which of ``gate``, ``experts``, ``head`` and ``base`` are trained; of adapters and new experts only these."""
    return {"head", *_TRAINED.get(what, what.split("+"))}


def refuse_idle(config: TrainingConfig) -> None:
    """Raise ConfigError for a setting that would change nothing. (Arms of an experiment may share such settings.)"""
    train, parts = config.train, trained_parts(config.train.what)
    documents, language = bool(config.data.documents), config.language or LanguageConfig()
    learned, what = "but data.documents are learned from", f"but train.what is {train.what!r}"
    idle = (
        ("raft", documents and config.raft != RaftConfig(), learned),
        ("generate", documents and config.generate is not None, learned),
        ("train.gate_learning_rate", train.gate_learning_rate is not None and "gate" not in parts, what),
        ("train.experts_learning_rate", train.experts_learning_rate is not None and "experts" not in parts, what),
        (
            "language.retriever",
            language.retriever is not None and language.shown == "queries",
            "but language.shown is 'queries', for which nothing is searched",
        ),
        ("train.lora", train.lora != LoraConfig() and train.what != "lora", what),
    )
    for name, given, why in idle:
        if given:
            raise ConfigError(f"{name} is given, {why}: it would change nothing", hint=f"leave {name} out")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; expected a mapping of keys")
    return content


def set_key(content: dict[str, Any], override: str) -> str:
    """Apply ``a.b=c`` to nested mappings in place and return ``a.b``; UsageError where it cannot be read."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        # Mostly the second of several files behind one option.
        several = "; an option is given once for each file" if os.path.exists(override) else ""
        raise UsageError(
            f"cannot read the override {override!r}: expected key.key=value",
            hint=f"for example: train.steps=200{several}",
        )
    *path, last = key.split(".")
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"cannot read the override {override!r}: {value!r} is not YAML") from None
    at = content
    for part in path:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise UsageError(f"cannot override {key!r}: {part!r} is not a section")
    at[last] = _from_here(key, read) if key in _PATHS else _number(read)
    return key


# Keys whose values are paths.
_PATHS = {"base", "start", "data.index", "data.questions", "data.documents", "data.replay"}
_PATHS |= {"new_expert.corpus", "new_expert.others", "new_expert.unseen"}


# What ``model`` may say of a causal language model beside settings.
_OF_INIT = {"layers", "init", "amount"}


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-4 for a text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _from_here(key: str, value: Any) -> Any:
    """A path of the command line, which counts from the working directory."""
    if isinstance(value, list):
        return [_from_here(key, entry) for entry in value]
    if not isinstance(value, str) or value in ("minilm", "warm-start", "starter") or value.startswith("hub:"):
        return value
    # A base that is no folder here is a Hub id.
    if key == "base" and not Path(value).expanduser().exists():
        return value
    return resolve(value, Path.cwd())


def _is_about(error: ValidationError, keys: set[str]) -> bool:
    """Whether one of the faults lies in one of the keys, or below it."""
    places = [".".join(str(part) for part in fault["loc"]) for fault in error.errors()]
    return any(place == key or place.startswith(f"{key}.") for place in places for key in keys)


def _check_model_keys(keys: set[str]) -> None:
    """UsageError for an unknown ``model.KEY``: what is below ``model`` is otherwise checked as the model is built."""
    if names := {key.split(".")[1] for key in keys if key.startswith("model.")} - _OF_INIT:
        from ragmoe.models.upcycling import check_settings

        check_settings(names, UsageError)


def resolve(entry: str, folder: Path) -> str:
    """Expand ``${VARIABLES}`` and make a path absolute."""
    return str((folder / expand(entry)).resolve())


def explain(error: ValidationError) -> str:
    """A validation error in one line an entry: where, what was got, what was expected."""
    lines = []
    for entry in error.errors():
        where = ".".join(str(part) for part in entry["loc"])
        if entry["type"] == "extra_forbidden":
            lines.append(f"unknown key {where!r}{_known(entry['loc'])}")
        else:
            lines.append(f"{where}: {entry['msg']} (got {entry.get('input')!r})")
    return "; ".join(lines)


def _known(loc: tuple[int | str, ...]) -> str:
    model: type[BaseModel] | None = TrainingConfig
    for part in loc[:-1]:
        annotation = model.model_fields[str(part)].annotation if model and str(part) in model.model_fields else None
        # A section that may be missing is a union with None.
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
    return f"; there are: {', '.join(model.model_fields)}" if model else ""


__all__ = [
    "DataConfig",
    "GenerateConfig",
    "LanguageConfig",
    "LoraConfig",
    "NewExpertConfig",
    "OptimiserConfig",
    "RaftConfig",
    "TrainingConfig",
    "explain",
    "load_config",
    "read_yaml",
    "refuse_idle",
    "resolve",
    "set_key",
    "trained_parts",
]
