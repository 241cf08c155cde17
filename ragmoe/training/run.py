"""``train``: from a configuration to a bundle."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments, set_seed

from ragmoe._errors import BundleError, ConfigError, DataError, ModelError
from ragmoe._ranks import Ranks
from ragmoe.index import Index
from ragmoe.models import RagmoeBertForQuestionAnswering
from ragmoe.training.adapters import added_parameters, merge
from ragmoe.training.build import build_model, make_trainable, trained_parameters, wants_bf16
from ragmoe.training.calibration import ENOUGH, calibrate, calibrate_expert, enough
from ragmoe.training.callbacks import HistoryCallback, Shows, load_record
from ragmoe.training.clusters import start_gates
from ragmoe.training.config import TrainingConfig, load_config, refuse_idle
from ragmoe.training.data import (
    SPARE_NEIGHBOURS,
    RaftCollator,
    RaftDataset,
    check_questions,
    hold_out,
    learnable,
    training_questions,
)
from ragmoe.training.documents import made_questions
from ragmoe.training.fitting import fit_gates
from ragmoe.training.folder import (
    CHECKPOINTS,
    HISTORY_NAME,
    check_out,
    drop_checkpoints,
    forget_model,
    is_started,
    last_checkpoint,
    locked,
    start,
)
from ragmoe.training.generator import GeneratorRun, prepare_generator, trains_generator
from ragmoe.training.language_run import LanguageRun, prepare_language
from ragmoe.training.new_expert import NewExpert, begin_new_expert
from ragmoe.training.retrieved import CACHE_NAME, Retrieved
from ragmoe.training.stopping import StopCallback
from ragmoe.training.totals import check_losses
from ragmoe.training.trainer import TRAINS_GATES, RagmoeTrainer
from ragmoe.training.votes import check_votes, say_left_behind


@dataclass(frozen=True)
class TrainResult:
    """What a run left.

    Attributes:
        bundle: folder of the trained model.
        adapter: folder of the PEFT adapter, for ``train.what: lora``.
        seconds: spent on training steps; None for a run that went on from a checkpoint.
        loss: mean training loss; None likewise: ``history.jsonl`` has it step by step.
        parameters: total, active and trained.
        learned_from: of questions how many were fitted on, held out, and left out because nothing can be learned from
            them; or how many documents, and chunks of them.
    """

    bundle: Path
    adapter: Path | None
    seconds: float | None
    steps: int
    loss: float | None
    parameters: dict[str, int]
    learned_from: dict[str, int]


@dataclass
class Run:
    """Everything a run needs, made from its configuration."""

    config: TrainingConfig
    index: Index
    model: RagmoeBertForQuestionAnswering
    adapted: Any
    dataset: RaftDataset
    collator: RaftCollator
    held: list[Any]
    held_retrieved: Retrieved
    left_out: int
    new_expert: NewExpert | None = None

    trainer_class: ClassVar[type[RagmoeTrainer]] = RagmoeTrainer

    @property
    def material(self) -> Sequence[Any]:
        """The questions that are fitted on."""
        return self.dataset.questions

    @property
    def counts(self) -> dict[str, int]:
        """What is learned from."""
        return {"fitted": len(self.dataset.questions), "held_out": len(self.held), "left_out": self.left_out}

    def save(self, folder: Path) -> Path | None:
        """Save the trained model; the folder of its adapter, where it was trained by one."""
        return _save(self, folder)

    @property
    def parameters(self) -> dict[str, int]:
        """Total and active as the model will be saved, and how many are trained."""
        counts = self.model.parameter_counts()
        extra = added_parameters(self.model) if self.adapted is not None else 0
        return {
            "total": counts["total"] - extra,
            "active": counts["active"] - extra,
            "trained": trained_parameters(self.model),
        }


AnyRun = Run | GeneratorRun | LanguageRun


def prepare(config: TrainingConfig, *, cache: Path | None = None, show: Shows | None = None) -> AnyRun:
    """Load what is learned from and the index, retrieve once, make the model and decide what of it is trained.

    Args:
        cache: folder where neighbours of questions are kept between runs; None means in the index's own folder.
        show: told how far retrieving is, which takes minutes for many questions.
    """
    if config.data.documents:
        return prepare_language(config, cache=cache, show=show)
    make = prepare_generator if trains_generator(config) else prepare_reader
    return make(config, cache=cache, show=show)


def prepare_reader(config: TrainingConfig, *, cache: Path | None = None, show: Shows | None = None) -> Run:
    """``prepare`` for a reader.

    Raises:
        ConfigError: the configuration says how to generate.
    """
    if config.generate is not None:
        raise ConfigError(
            f"generate is given, but the base {config.base} is no causal language model: expected one, or no generate"
        )
    train = config.train
    index = Index.open(config.data.required_index)
    if config.data.questions or not config.new_expert:
        questions = training_questions(config.data, show.line if show else None)
    else:
        questions = made_questions(config.new_expert, index)
    known = [question for question in questions if learnable(question)]
    check_questions(known, index)
    fit, held = hold_out(known, index, config.data.calibration_share, config.data.calibration_limit)
    if known and not fit:
        raise DataError(
            f"all {len(known)} questions that can be learned from are about documents that are kept aside "
            f"(data.calibration_share is {config.data.calibration_share})",
            hint="data.calibration_share=0 keeps none aside",
        )
    if not fit:
        raise DataError(f"none of the {len(questions)} questions can be learned from: no answer_spans, no yes/no/maybe")
    if show and not config.new_expert and not enough(held):
        show.line(
            f"the no-answer threshold will not be calibrated: of {len(held)} questions that are kept aside fewer than "
            f"{ENOUGH} have an answer (see data.calibration_share)"
        )
    model = build_model(config, index, on_cpu=not torch.cuda.is_available())
    cache = cache or index.folder / CACHE_NAME
    new_expert = begin_new_expert(model, config, index, fit, held, cache, show)
    if new_expert is not None:
        model = new_expert.model
    check_losses(model.config, fit, train.batch_size * train.accumulation)
    check_votes(model, index, show.line if show else None)
    adapted = make_trainable(model, config)

    raw = config.data.question_field == "question_raw"
    texts = [question.raw if raw else question.question for question in fit + held]
    n = max(config.raft.neighbours, config.raft.passages + SPARE_NEIGHBOURS)
    retrieved = Retrieved.of(
        index,
        texts,
        n,
        config.raft.retriever,
        cache,
        progress=partial(show.stage, "retrieving neighbours") if show else None,
    )
    of_fit = Retrieved(index, retrieved.rows_QN[: len(fit)], retrieved.scores_QN[: len(fit)])
    of_held = Retrieved(index, retrieved.rows_QN[len(fit) :], retrieved.scores_QN[len(fit) :])
    dataset = RaftDataset(
        fit,
        index,
        of_fit,
        config.raft,
        examples=train.steps * train.batch_size * train.accumulation,
        batch_size=train.batch_size,
        seed=config.seed,
        question_field=config.data.question_field,
        recall=lambda neighbours, question: model.recall(neighbours, index, [question.domain]),
    )
    collator = RaftCollator(model.tokenizer, config.raft, raw=raw)
    fit_gates(model, index, fit, of_fit, config.raft.neighbours, again=train.what in TRAINS_GATES)
    start_gates(model, index, dataset, config, show)
    left_out = len(questions) - len(known)
    return Run(config, index, model, adapted, dataset, collator, held, of_held, left_out, new_expert)


def train(
    config: str | Path | Mapping[str, Any] | TrainingConfig,
    overrides: Sequence[str] = (),
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    cache: str | os.PathLike[str] | None = None,
    show: Shows | None = None,
) -> TrainResult:
    """Fine-tune a reader, or where the base is a causal language model a generator or that model, and save it.

    Args:
        config: YAML file, mapping or configuration; ``overrides`` are ``key.key=value``.
        out: the bundle's folder; ``training.yaml``, ``history.jsonl`` and, while training, ``checkpoints/`` go there.
        resume: go on from the last checkpoint, or from the first step where there is none; equals the run that was
            never interrupted.
        overwrite: start again where a run has left something.
        cache: folder where neighbours of questions are kept between runs; None means in the index's own folder.
        show: told of each step and each line of the history.

    Raises:
        ConfigError, DataError, ModelError: before anything is written; or another process trains in the folder, or
            this is one of several.
        BundleError: the saved model does not answer as the trained one did.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; with checkpoints only once the step is finished and kept.
    """
    _check_one_process(show)
    resolved = config if isinstance(config, TrainingConfig) else load_config(config, overrides)
    if not resume and not isinstance(config, TrainingConfig):
        refuse_idle(resolved)
    folder = Path(out)
    with locked(folder):
        check_out(folder, resolved, resume=resume, overwrite=overwrite)
        goes_on = resume and is_started(folder)
        set_seed(resolved.seed)
        run = prepare(resolved, cache=Path(cache) if cache else None, show=show)
        if resolved.new_expert is None:
            say_left_behind(resolved.base, run.model, run.index, show.line if show else None)
        bf16 = start(
            folder,
            resolved,
            index=run.index.digest if run.index is not None else "",
            material=run.material,
            bf16=wants_bf16(resolved.train.precision),
            overwrite=overwrite,
        )
        last = last_checkpoint(folder)
        if goes_on and last is None and show:
            show.line("the run before left no checkpoint: starting again at the first step")
        return _finish(run, _trainer(run, folder, bf16=bf16, show=show), folder, last)


def _check_one_process(show: Shows | None) -> None:
    """ConfigError for several processes, which would write to one folder; of several GPUs say that one is used."""
    if (count := Ranks.launched().count) > 1:
        raise ConfigError(
            f"{count} processes were started (WORLD_SIZE), but a run is one process on one GPU",
            hint="start it without torchrun; in several, train a model of ragmoe by Trainer or accelerate",
        )
    if show and (gpus := torch.cuda.device_count()) > 1:
        show.line(f"of {gpus} GPUs the first is used; CUDA_VISIBLE_DEVICES says which that is")


def _finish(run: AnyRun, trainer: RagmoeTrainer, folder: Path, checkpoint: str | None) -> TrainResult:
    """Train, from a checkpoint on where there is one, and save the model in the place of all checkpoints."""
    parameters = run.parameters
    begin = time.perf_counter()
    with _stoppable(trainer):
        loss: float | None = _fit(trainer, checkpoint)
    seconds: float | None = time.perf_counter() - begin
    if checkpoint:
        # Only those of the steps since are known.
        seconds = loss = None
    # Trainer leaves its autocast around forward; what is saved and compared is the model itself.
    run.model = trainer.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    adapter = run.save(folder)
    drop_checkpoints(folder)
    return TrainResult(folder, adapter, seconds, run.config.train.steps, loss, parameters, run.counts)


def _trainer(run: AnyRun, folder: Path, *, bf16: bool, show: Shows | None) -> RagmoeTrainer:
    """The trainer of a run, with its history in place of Trainer's own printing."""
    from transformers import PrinterCallback

    history = HistoryCallback(folder / HISTORY_NAME, steps=run.config.train.steps, show=show)
    trainer = run.trainer_class(
        model=run.model,
        args=_arguments(run.config, folder / CHECKPOINTS, bf16=bf16),
        train_dataset=run.dataset,
        data_collator=run.collator,
        callbacks=[history],
        optimiser=run.config.train,
        gate_lesson=run.new_expert.lesson if run.new_expert else None,
    )
    history.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    return trainer


def _stoppable(trainer: RagmoeTrainer) -> AbstractContextManager[None]:
    """Let signals end training with a checkpoint, where it writes any."""
    if trainer.args.save_strategy == "no":
        return nullcontext()
    stop = StopCallback()
    trainer.add_callback(stop)
    return stop.listening()


def _fit(trainer: RagmoeTrainer, checkpoint: str | None) -> float:
    """Take the steps, or those after a checkpoint; the mean training loss."""
    try:
        return float(trainer.train(resume_from_checkpoint=checkpoint).training_loss)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"out of memory in a step: {str(error).splitlines()[0]}",
            hint="halve train.batch_size and double train.accumulation, or set train.gradient_checkpointing=true",
        ) from None
    except FloatingPointError as error:
        kept = last_checkpoint(Path(trainer.args.output_dir).parent)
        raise ModelError(
            f"{error}; {f'{Path(kept).name} is kept' if kept else 'there is no checkpoint'}",
            hint="begin again with --overwrite and a lower train.learning_rate or train.clip, or train.precision=fp32",
        ) from None


def _arguments(config: TrainingConfig, checkpoints: Path, *, bf16: bool) -> TrainingArguments:
    train = config.train
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(train.warmup * train.steps),
        max_grad_norm=train.clip,
        bf16=bf16,
        # Without it, TrainingArguments takes bf16 for a wish that only a GPU can grant.
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or 500,
        save_total_limit=2,
        seed=config.seed,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        label_names=["start_positions", "end_positions"],
    )
    # On several GPUs Trainer would wrap the model in DataParallel.
    arguments._n_gpu = 1
    return arguments


def _save(run: Run, folder: Path) -> Path | None:
    """Merge adapters, calibrate, save, and make sure that what was saved answers like what was trained."""
    model, adapter = merge(run.model, run.adapted, folder)
    if adapter is not None:
        model.tokenizer = run.collator.tokenizer
    model.eval()
    if run.new_expert is not None:
        model = run.new_expert.finish(model)
    texts = [run.dataset.text(question) for question in run.held]
    told = (run.held, texts, run.held_retrieved, run.index, run.config.raft, run.config.data.unanswerable_share)
    # Beside a new expert the reader's own stays, as everything else that its other experts go by.
    (calibrate if run.new_expert is None else calibrate_expert)(model, *told)
    model.tokenizer.save_pretrained(folder)
    model.save_pretrained(folder, message="train", extra=load_record(folder / HISTORY_NAME, model.config))
    batch = run.collator([run.dataset[at] for at in range(min(2, len(run.dataset)))])
    difference = largest_difference(model, type(model).from_pretrained(folder), batch)
    if difference != 0.0:
        forget_model(folder)
        raise BundleError(f"{folder} was saved, but its logits differ from the trained model's by {difference:.2e}")
    return adapter


@torch.no_grad()
def largest_difference(
    a: RagmoeBertForQuestionAnswering, b: RagmoeBertForQuestionAnswering, batch: Mapping[str, Any]
) -> float:
    """The largest absolute difference of two models' logits on a batch, on the CPU in fp32."""
    outputs = [model.eval().float().cpu()(**batch) for model in (a, b)]
    pairs = [(outputs[0].start_logits, outputs[1].start_logits), (outputs[0].end_logits, outputs[1].end_logits)]
    # Not Python's max, to which a number is as good as NaN.
    return torch.stack([(x - y).abs().max() for x, y in pairs]).max().item()


__all__ = ["Run", "TrainResult", "prepare", "prepare_reader", "train"]
