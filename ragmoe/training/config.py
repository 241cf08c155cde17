"""The configuration of a training run: one YAML file, unknown keys fail, ``a.b=c`` overrides a key.

Every field has its default here; the resolved configuration is saved beside the model as ``training.yaml``.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ragmoe._errors import ConfigError, UsageError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataConfig(_Strict):
    """What is learned from.

    Attributes:
        questions: question files (jsonl); globs and ``${VARIABLES}`` are expanded, relative to the configuration file.
            None at all only where ``new_expert.corpus`` says of which documents to make some, or ``documents`` are
            learned from.
        documents: sources of whole documents, in the place of questions: a causal language model learns to predict
            their words, with the neighbours of the words before (see ``LanguageConfig``).
        index: index folder that the questions' passages, or the documents' neighbours, come from.
        question_field: ``question``, or ``question_raw`` to retrieve and read without the document's name.
        limit: use only so many questions, drawn by digest; None uses all.
        replay: question files of what a bundle knows already, mixed in against forgetting;
        replay_share: how many of all questions are such, 0 to 1, drawn by digest.
        calibration_share: share of the questions' documents kept aside to calibrate the no-answer threshold;
            ``calibration_limit`` is how many of their questions are used at most.
        unanswerable_share: how many of the questions that will be asked are expected to have no answer; the threshold
            is calibrated for that.
    """

    questions: list[str] = []
    documents: list[str] = []
    index: str
    question_field: Literal["question", "question_raw"] = "question"
    limit: int | None = Field(None, ge=1)
    replay: list[str] = []
    replay_share: float = Field(0.5, gt=0.0, lt=1.0)
    calibration_share: float = Field(0.03, ge=0.0, lt=0.5)
    calibration_limit: int = Field(100, ge=1)
    unanswerable_share: float = Field(0.1, ge=0.0, le=1.0)


class RaftConfig(_Strict):
    """Retrieval-augmented fine-tuning (Zhang et al. 2024): gold passage plus hard distractors.

    Attributes:
        passages: M, how many passages a question is read with.
        gold_probability: P, how often the gold passage is among them; otherwise it leaves the neighbours too, and the
            target is "no answer here".
        neighbours: N, how many neighbours the gate sees.
        retriever: None means the index's default.
        drop_all: how often a question's neighbours are all hidden from the gate.
        drop_each: how often each single neighbour is.
        shuffle_neighbours: show the gate another question's neighbours, always the same one's: a control.
        max_length: tokens of a training sequence; of a longer passage a random window with the answer is read.
    """

    passages: int = Field(2, ge=1)
    gold_probability: float = Field(0.9, ge=0.0, le=1.0)
    neighbours: int = Field(16, ge=1)
    retriever: str | None = None
    drop_all: float = Field(0.1, ge=0.0, le=1.0)
    drop_each: float = Field(0.1, ge=0.0, le=1.0)
    shuffle_neighbours: bool = False
    max_length: int = Field(256, ge=32)


class GenerateConfig(_Strict):
    """What a generator is taught, for a base that is a causal language model.

    Attributes:
        no_context: how often a question is shown without any passage; as where the gold passage is left out, this
            leaves the neighbours too.
        without_gold: what it should say without the gold passage: ``refuse``, that it is not in the documents, or the
            answer from ``memory``, without a citation. A question without an answer is always refused.
        max_answer_tokens: longest answer that it gives when asked.
    """

    no_context: float = Field(0.1, ge=0.0, le=1.0)
    without_gold: Literal["refuse", "memory"] = "refuse"
    max_answer_tokens: int = Field(64, ge=1)


class LanguageConfig(_Strict):
    """How documents are cut for language modelling, and what is retrieved for a chunk of them.

    Attributes:
        chunk_tokens: tokens that are predicted together, with the same neighbours.
        context_tokens: how many tokens before a chunk are read with it and not predicted; the first one at least
            depends on the last token before it.
        query_chunks: how many of the chunks before it retrieve its neighbours.
        neighbours: N, how many the gate sees.
        retriever: None means the index's default.
        drop_all, drop_each: neighbour dropout, as in ``RaftConfig``; for training alone.
    """

    chunk_tokens: int = Field(128, ge=1)
    context_tokens: int = Field(1, ge=1)
    query_chunks: int = Field(1, ge=1)
    neighbours: int = Field(16, ge=1)
    retriever: str | None = None
    drop_all: float = Field(0.0, ge=0.0, le=1.0)
    drop_each: float = Field(0.0, ge=0.0, le=1.0)


class LoraConfig(_Strict):
    """Low-rank adapters on attention and feed-forward matrices of the frozen base, for ``train.what: lora``."""

    rank: int = Field(32, ge=1)
    alpha: float = 64.0


class OptimiserConfig(_Strict):
    """How it is learned.

    Attributes:
        what: ``all``; ``gate``, ``experts`` or ``gate+experts`` (with the head); ``lora``: adapters on the frozen
            base, with gate, experts and head; ``new_expert``: one more expert of a bundle, and nothing else; or
            ``xlora``: X-LoRA's classifier over the experts of a bundle (with the head), a baseline of experiments.
        steps: optimiser steps.
        batch_size: questions of a micro-batch; ``accumulation`` micro-batches make a step.
        learning_rate: of the base; the others where given, else the same.
        warmup: share of the steps; afterwards the rate falls linearly to zero.
        dropout: None means none on a CPU and the base's own on a GPU.
        attention_dropout: of the attention's weights; None means as ``dropout``. Zero keeps attention on a CPU on its
            fast path.
        precision: ``auto`` takes bf16 where it is measured to be faster.
        loss_scope: what the losses of a batch's statistics (`ragmoe losses ls`) judge: ``micro``, each micro-batch by
            itself; or ``global``, all micro-batches of a step together, so that the step is the same however it is
            cut. That costs another forward pass without gradients, and nothing where ``accumulation`` is 1.
    """

    what: Literal["all", "gate", "experts", "gate+experts", "lora", "new_expert", "xlora"] = "all"
    steps: int = Field(450, ge=1)
    batch_size: int = Field(12, ge=1)
    accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    gate_learning_rate: float | None = Field(None, gt=0)
    experts_learning_rate: float | None = Field(None, gt=0)
    head_learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    warmup: float = Field(0.1, ge=0, le=1)
    dropout: float | None = Field(None, ge=0, lt=1)
    attention_dropout: float | None = Field(None, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    balance_bias_rate: float = Field(0.0, ge=0)
    loss_scope: Literal["micro", "global"] = "micro"
    lora: LoraConfig = LoraConfig()


class NewExpertConfig(_Strict):
    """One more expert for a bundle, trained alone, for ``train.what: new_expert``; ``ragmoe experts add`` fills it in.

    Attributes:
        name: of the expert; its domain's, where it has one.
        start: what it starts as: ``shared`` (the layer's dense network), ``nearest`` (the expert whose documents lie
            nearest to the new ones), or an expert's name or id.
        corpus: sources of the new documents, all in the index; none means the passages of the questions' domains.
        others: questions about what the bundle knows, for the gate to learn when not to call the new expert; none
            means that sentences of the index's other passages stand for them.
        unseen: questions by which the expert will be judged: the gate learns nothing from their documents.
        documents: how many of the new and of the other documents the gate learns from at most.
        train_gate: False leaves the gate rows as they start, so that only votes lead to the expert.
        keep: share of the calls by its own questions that the expert keeps at least, layer by layer, while its balance
            bias is lowered after training: what nearly calls it is seldom its own. 1 leaves it as it has learned.
        gate_bias: added to the expert's balance bias after training, so that it is called only by this margin of logit.
        joins: digest of the bundle's map, where it must still be that.
    """

    name: str = Field(min_length=1)
    start: str = "shared"
    corpus: list[str] = []
    others: list[str] = []
    unseen: list[str] = []
    documents: int = Field(1000, ge=1)
    train_gate: bool = True
    keep: float = Field(0.95, gt=0, le=1)
    gate_bias: float = Field(0.0, le=0)
    joins: str | None = None


class TrainingConfig(_Strict):
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
    config.data.replay = [resolve(entry, folder) for entry in config.data.replay]
    if expert := config.new_expert:
        expert.others = [resolve(entry, folder) for entry in expert.others]
        expert.unseen = [resolve(entry, folder) for entry in expert.unseen]
        expert.corpus = [entry if entry.startswith("hub:") else resolve(entry, folder) for entry in expert.corpus]
    config.data.index = resolve(config.data.index, folder)
    if config.base != "minilm" and "base" not in given and (folder / config.base).exists():
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
    if config.language is not None and not data.documents:
        raise ConfigError(f"{name}: language is given, but no data.documents to be cut as it says")
    if not (data.documents or data.questions or (config.new_expert and config.new_expert.corpus)):
        raise ConfigError(
            f"{name}: data.questions is empty: there is nothing to learn from",
            hint="a new expert can learn from documents alone (new_expert.corpus, --corpus), and a causal language "
            "model from data.documents",
        )


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
        raise UsageError(
            f"cannot read the override {override!r}: expected key.key=value", hint="for example: train.steps=200"
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
    expanded = os.path.expandvars(os.path.expanduser(entry))
    if unset := re.findall(r"\$\{?(\w+)\}?", expanded):
        raise ConfigError(
            f"{entry!r} needs the environment variable {unset[0]}, which is not set",
            hint=f"export {unset[0]}=/path/to/the/data",
        )
    return str((folder / expanded).resolve())


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
