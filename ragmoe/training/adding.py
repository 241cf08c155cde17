"""``add_expert``: grow a bundle by one expert, prove what that did, and publish it as the bundle's next version.

Training, proof and publishing come in this order, and the bundle's map is replaced last: whatever stops before, the
bundle is what it was. ``BUNDLE/adding/NAME`` is where it goes on from; ``BUNDLE/experts/ID`` keeps the configuration
and the history of the training.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ragmoe._differences import differences
from ragmoe._errors import BundleError, ConfigError, UsageError
from ragmoe.bundle import THRESHOLDS, BundleMap, is_bundle, read_bundle, read_map
from ragmoe.bundle.experts import CERTIFICATES, publish, recorded_thresholds
from ragmoe.corpus import write_questions
from ragmoe.evaluation import Retrieval, Task
from ragmoe.evaluation.task import parse_task
from ragmoe.experts import experts_class
from ragmoe.generation.tokenizer import open_tokenizer
from ragmoe.index import Index
from ragmoe.models import load
from ragmoe.models.families import load_decoder
from ragmoe.training.adding_language import certify_language, language_material
from ragmoe.training.callbacks import Shows
from ragmoe.training.certificate import Models, Progress, certify_new, certify_old, check_judging
from ragmoe.training.config import TrainingConfig, load_config
from ragmoe.training.data import hold_out, learnable, load_questions
from ragmoe.training.decoders import is_decoder
from ragmoe.training.folder import CONFIG_NAME, HISTORY_NAME, is_finished, is_started, saved_config
from ragmoe.training.run import prepare, train

_RECORD = "trained.json"
# The questions of so many documents are kept aside: to judge the expert by where no others are given, or else only to
# calibrate its no-answer threshold.
_DEV_SHARE, _HELD_SHARE = 0.1, 0.05


@dataclass(frozen=True)
class Added:
    """A bundle that has got an expert: its folder, its new map, and the certificate that the map records."""

    bundle: Path
    map: BundleMap
    certificate: dict[str, Any]


@dataclass(frozen=True)
class Judges:
    """What an expert is judged by.

    Attributes:
        dev: question files of the new domain, or sources of its documents for a language model; none keeps a tenth of
            the documents that are learned from aside.
        tasks: of the domains that the bundle knows, read over ``index`` (None: the index the expert is trained with).
        known: for a language model sources of documents of those domains, in the place of tasks.
        limit: at most so many questions, or documents, of a domain.
    """

    dev: Sequence[str | Path] = ()
    tasks: Sequence[Task] = ()
    known: Sequence[str | Path] = ()
    index: str | Path | None = None
    limit: int | None = None


def add_expert(
    bundle: str | os.PathLike[str],
    config: TrainingConfig,
    judges: Judges | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show: Shows | None = None,
) -> Added:
    """Train one new expert of a bundle, certify it, and publish the bundle's next version.

    Base, head, the other experts, their gate rows and what the gates share keep their files, by digest, and the bundle
    its no-answer threshold. A reader's new expert gets a threshold of its own, for what most tokens take to it, where
    the questions that are kept aside of those it learns from are enough to calibrate one.

    Args:
        config: made by ``new_expert_config``.
        judges: what the certificate measures.
        out: a new folder that gets a copy of the bundle, versions included, and the expert; None adds it in place.
            Where training cannot begin, the copy goes again.
        resume, overwrite: go on with an addition that did not finish, or begin it again.
        show: told how far everything is.

    Raises:
        ConfigError, DataError, ModelError: before anything is published.
        BundleError: the bundle answers otherwise by now, or training has moved what must stay; nothing is published.
    """
    assert config.new_expert is not None
    name, judges = config.new_expert.name, judges or Judges()
    target = Path(bundle)
    parent, copied = read_map(target), False
    if out is not None:
        copied = not Path(out).exists()
        target = _copied(target, Path(out), parent, again=resume or overwrite)
        # A copy that was begun before may have another number, but answers as the bundle does.
        parent = read_map(target)
    work = target / "adding" / re.sub(r"[^\w.-]", "_", name)
    try:
        _check_judges(config, judges)
        if resume and not overwrite:
            _check_joins(target, work, parent, config)
        trained = _train(work, config, resume=resume, overwrite=overwrite, show=show)
    except BaseException:
        if copied and not is_started(work):
            shutil.rmtree(target)
        raise
    certificate = {**trained, **_certify(target, work, parent, config, judges, show), "beside": parent.expert_names}
    # What is to stay is compared with the files' content, and that with their digests.
    kept, _ = read_bundle(target, version=parent.version, verify=True)
    if (current := read_map(target)).content == parent.content:
        # Locked, unlocked or saved again meanwhile, it answers as it did.
        parent = current
    made, made_map = read_bundle(work)
    state = _in_precision(made, kept)
    id, thresholds = parent.next_expert_id, recorded_thresholds(parent)
    # Whatever id it had while it was trained.
    if (own := recorded_thresholds(made_map).get(str(made_map.expert_ids[-1]))) is not None:
        thresholds[str(id)] = own
    map_ = publish(
        target,
        parent,
        state,
        [*((expert.id, expert.name) for expert in parent.experts), (id, name)],
        f"add expert {name}",
        extra={
            CERTIFICATES: {**parent.extra.get(CERTIFICATES, {}), str(id): certificate},
            **({THRESHOLDS: thresholds} if thresholds else {}),
        },
    )
    record = target / "experts" / str(id)
    record.mkdir(parents=True, exist_ok=True)
    for file in (CONFIG_NAME, HISTORY_NAME):
        if (work / file).is_file():
            shutil.copyfile(work / file, record / file)
    # Of this one alone: another may be training beside it.
    shutil.rmtree(work)
    with suppress(OSError):
        work.parent.rmdir()
    return Added(target, map_, certificate)


def new_expert_config(
    bundle: str | os.PathLike[str],
    name: str,
    *,
    index: str | os.PathLike[str] | None = None,
    questions: Sequence[str] = (),
    start: str | None = None,
    corpus: Sequence[str] = (),
    others: Sequence[str] = (),
    judges: Judges | None = None,
    steps: int | None = None,
    overrides: Sequence[str] = (),
) -> TrainingConfig:
    """The configuration that trains a new expert: as the bundle was trained, where that is known, but for the expert.

    Args:
        index: a language model needs none where its gate sees no neighbours and ``others`` are given.
        questions: files and globs to learn from; ``index`` holds their passages. Without any, some are made of the
            documents of ``corpus``. A language model learns from these documents themselves.
        start, corpus, others: see ``NewExpertConfig``; without a start it is the network that all experts share, or
            where there is none the nearest expert.
        judges: their documents are kept from the gate's lesson.
        overrides: ``key.key=value``, which win.

    Raises:
        ConfigError, UsageError: something was given that the bundle's kind of model does not take, or is missing.
    """
    map_ = read_map(Path(bundle))
    judges = judges or Judges()
    settings = map_.extra.get("config", {})
    kind = experts_class(settings.get("expert_kind", "lora"))
    shares = kind.needs_dense or settings.get("shared_expert")
    unseen = [*judges.dev, *judges.known, *(file for task in judges.tasks for file in task.question_files())]
    sources = [_absolute(source) for source in corpus]
    if is_decoder(str(bundle)):
        section, learned, sources = "language", language_material(name, sources, questions, judges), []
    else:
        section, learned = "raft", _reader_material(index, questions, judges)
    content: dict[str, Any] = {
        "base": os.path.abspath(bundle),
        "data": {
            "index": None if index is None else os.path.abspath(index),
            "calibration_share": 0.0 if judges.dev else _DEV_SHARE,
            # As the bundle's questions were asked.
            "question_field": _section_of(Path(bundle), "data").get("question_field", "question"),
            **learned,
        },
        section: {"neighbours": settings.get("neighbours", 16), **_section_of(Path(bundle), section)},
        "train": {
            "what": "new_expert",
            "steps": steps or 300,
            "gate_learning_rate": 3e-3,
            "experts_learning_rate": _expert_rate(kind.has_rank, language=section == "language"),
        },
        "new_expert": {
            "name": name,
            "start": start or ("shared" if shares else "nearest"),
            "corpus": sources,
            "others": [_absolute(file) for file in others],
            "unseen": [_absolute(file) for file in unseen],
            "joins": map_.content,
        },
    }
    return load_config(content, overrides)


def _expert_rate(has_rank: bool, *, language: bool) -> float:
    """The learning rate of a new expert.

    Low-rank deltas start at zero and want larger steps than copies of whole networks (eval/results/starter_health.md
    compares two rates). In a language model they want far larger ones than in a reader, for a whole domain's words are
    new to them (eval/results/lm_late.md).
    """
    if not has_rank:
        return 5e-5
    return 4e-3 if language else 1e-3


def _reader_material(index: str | os.PathLike[str] | None, questions: Sequence[str], judges: Judges) -> dict[str, Any]:
    """What a reader's new expert learns from, as ``DataConfig`` says it."""
    if index is None:
        raise UsageError("a reader's expert needs the index that holds its passages", hint="--index DIR")
    if judges.known:
        raise ConfigError("--known is given, but a reader is judged by questions", hint="--task TASK")
    calibrating: dict[str, Any] = {"calibration_limit": 1_000_000}
    if judges.dev:
        calibrating = {"calibration_share": _HELD_SHARE}
    return {"questions": [_absolute(file) for file in questions], **calibrating}


def _check_joins(target: Path, work: Path, parent: BundleMap, config: TrainingConfig) -> None:
    """ConfigError where an expert was begun for a version that answers otherwise than the current one."""
    assert config.new_expert is not None
    begun = (saved_config(work)["new_expert"] or {}).get("joins") if is_started(work) else None
    if begun in (None, config.new_expert.joins):
        return
    versions = [v for v in range(1, parent.version) if read_map(target, version=v).content == begun]
    back = f"ragmoe bundle rollback {target} --to {versions[-1]}, and this command again; or " if versions else ""
    raise ConfigError(
        f"the expert {config.new_expert.name!r} was begun for version {versions[-1] if versions else 'unknown'} of "
        f"{target}, which answers otherwise now, as version {parent.version}",
        hint=f"{back}--overwrite to train it again for what is there now",
    )


def _train(work: Path, config: TrainingConfig, *, resume: bool, overwrite: bool, show: Shows | None) -> dict[str, Any]:
    """Train into a folder of its own, unless that was done already; what the certificate says of it."""
    assert config.new_expert is not None
    record = work / _RECORD
    if is_finished(work) and not overwrite:
        if not resume:
            raise ConfigError(
                f"the expert {config.new_expert.name!r} is trained, but was not published",
                hint="pass --resume to go on with it, or --overwrite to train it again",
            )
        before, now = (c.model_dump(mode="json") for c in (load_config(work / CONFIG_NAME), config))
        if differing := differences(before, now):
            raise ConfigError(
                f"{work} was trained with another configuration; it differs in {', '.join(differing)}",
                hint="pass --overwrite to train it again",
            )
        if record.is_file():
            return dict(json.loads(record.read_text(encoding="utf-8")))
        # A kill came before it was written; how long it took, nobody knows any more.
        run = prepare(config, show=show)
        trained = _told(config, run.parameters, run.counts, None)
    else:
        record.unlink(missing_ok=True)
        result = train(config, out=work, resume=resume, overwrite=overwrite, show=show)
        trained = _told(config, result.parameters, result.learned_from, result.seconds)
    part = record.with_suffix(".part")
    part.write_text(json.dumps(trained) + "\n", encoding="utf-8")
    os.replace(part, record)
    return trained


def _told(
    config: TrainingConfig, sizes: Mapping[str, int], counts: Mapping[str, int], seconds: float | None
) -> dict[str, Any]:
    """What the certificate says of the training."""
    assert config.new_expert is not None
    return {
        "name": config.new_expert.name,
        "start": config.new_expert.start,
        "steps": config.train.steps,
        "minutes": round(seconds / 60, 2) if seconds is not None else None,
        "parameters": {"trained": sizes["trained"], "total": sizes["total"]},
        **({"questions": counts["fitted"]} if "fitted" in counts else counts),
    }


def _certify(
    target: Path, work: Path, parent: BundleMap, config: TrainingConfig, judges: Judges, show: Shows | None
) -> dict[str, Any]:
    """The figures of the certificate."""
    progress = show.stage if show else lambda name, done, total: None
    if config.data.documents:
        models = _models(work, parent, load_decoder(target, version=parent.version))
        index = None if config.data.index is None else Index.open(config.data.index)
        return certify_language(models, open_tokenizer(target, models.before), config, index, judges, progress)
    models = _models(work, parent, load(target, version=parent.version))
    return _certify_reader(models, config, judges, progress)


def _certify_reader(models: Models, config: TrainingConfig, judges: Judges, progress: Progress) -> dict[str, Any]:
    index = Index.open(config.data.required_index)
    retrieval = Retrieval(index)
    of_tasks = retrieval if judges.index is None else Retrieval(Index.open(judges.index))
    old = [certify_old(models, task.limited(judges.limit), of_tasks, progress) for task in judges.tasks]
    with tempfile.TemporaryDirectory() as folder:
        task = _dev_task(config, index, judges, Path(folder))
        new = certify_new(models, task.limited(judges.limit), retrieval, progress) if task else None
    if new and not judges.dev and models.live.config.expert_thresholds:
        # Kept aside for both, since no others were given.
        new["past_threshold"]["chosen_on_these"] = models.live.config.expert_thresholds[-1] is not None
    return {"index": index.digest, "old": old, "new": new}


def _check_judges(config: TrainingConfig, judges: Judges) -> None:
    """Raise DataError where a reader's expert could not be judged by what is given: before it is trained, not after."""
    if config.data.documents or not (judges.tasks or judges.dev):
        return
    index = Index.open(config.data.required_index)
    of_tasks = index if judges.index is None else Index.open(judges.index)
    for task in judges.tasks:
        check_judging(task, of_tasks, "--task-index")
    if judges.dev:
        with tempfile.TemporaryDirectory() as folder:
            if (dev := _dev_task(config, index, judges, Path(folder))) is not None:
                check_judging(dev, index, "--index")


def _in_precision(state: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a bundle has them: a decoder in half precision is trained in fp32, which holds it to the bit."""
    # Names that share a tensor go on sharing it.
    made = {(id(x), kept[name].dtype): x.to(kept[name].dtype) for name, x in state.items()}
    return {name: made[id(x), kept[name].dtype] for name, x in state.items()}


def _models(work: Path, parent: BundleMap, before: Any) -> Models:
    """What was before, and what was trained as it will be published: with the bundle's own settings and memory."""
    kind, opened = type(before), []
    for experts in (parent.expert_ids, None):
        config = kind.config_class.from_dict(dict(parent.extra["config"]))
        opened.append(kind.from_pretrained(work, config=config, experts=experts).eval())
        opened[-1].bundle_digests = before.bundle_digests
    return Models(before, *opened)


def _dev_task(config: TrainingConfig, index: Index, judges: Judges, folder: Path) -> Task | None:
    """The questions of the new domain, read with their gold passages; None where there are none."""
    assert config.new_expert is not None
    files = [_absolute(file) for file in judges.dev]
    data = config.data
    if not files:
        known = [q for q in load_questions(data.questions, data.limit) if learnable(q)]
        _, held = hold_out(known, index, data.calibration_share, data.calibration_limit)
        if not any(question.answers for question in held):
            return None
        write_questions(folder / "dev.jsonl", held)
        files = [str(folder / "dev.jsonl")]
    name = re.sub(r"[^\w-]", "_", config.new_expert.name)
    content = {"name": f"dev_of_{name}", "questions": files, "question_field": data.question_field}
    return parse_task(content, folder, f"the questions of {config.new_expert.name}")


def _copied(bundle: Path, out: Path, parent: BundleMap, *, again: bool) -> Path:
    """A copy of the bundle to add to, there whole or not at all."""
    if out.exists():
        begun = _is_copy(out, parent)
        if again and begun:
            return out
        hint = "name another folder with --out"
        if begun:
            hint += (
                "; where it is an addition that did not finish: --resume to go on with it, --overwrite to begin again"
            )
        raise ConfigError(f"{out} is there already", hint=hint)
    part = out.with_name(f".{out.name}.copying")
    if part.exists():
        shutil.rmtree(part)
    shutil.copytree(
        bundle, part, ignore=shutil.ignore_patterns(".bundle.lock", "adding", "checkpoints", ".checkpoints.gone")
    )
    os.replace(part, out)
    return out


def _is_copy(folder: Path, parent: BundleMap) -> bool:
    """Whether a folder holds a bundle that answers as this one."""
    try:
        return is_bundle(folder) and read_map(folder).content == parent.content
    except BundleError:
        return False


def _section_of(bundle: Path, name: str) -> dict[str, Any]:
    """How the bundle's questions were shown to it, or its documents cut, where its folder still says so."""
    path = bundle / CONFIG_NAME
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict((content or {}).get(name) or {})


def _absolute(source: str | Path) -> str:
    return str(source) if str(source).startswith("hub:") else os.path.abspath(source)
