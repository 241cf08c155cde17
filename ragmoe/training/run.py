"""``train``: from a configuration to a bundle."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ragmoe._errors import BundleError, ConfigError, DataError
from ragmoe.bundle import is_bundle
from ragmoe.index import Index
from ragmoe.models import RagmoeBertForQuestionAnswering, load
from ragmoe.training.build import build_model, make_trainable, trained_parameters, wants_bf16
from ragmoe.training.calibration import calibrate
from ragmoe.training.callbacks import HistoryCallback
from ragmoe.training.config import TrainingConfig, load_config
from ragmoe.training.data import RaftCollator, RaftDataset, Retrieved, hold_out, learnable, load_questions
from ragmoe.training.trainer import RagmoeTrainer

CONFIG_NAME, HISTORY_NAME, CACHE_NAME = "training.yaml", "history.jsonl", ".neighbours"
_SPARE_NEIGHBOURS = 10


@dataclass(frozen=True)
class TrainResult:
    """What a run left.

    Attributes:
        bundle: folder of the trained model.
        adapter: folder of the PEFT adapter, for ``train.what: lora``.
        seconds: spent on training steps.
        loss: mean training loss.
        parameters: total, active and trained.
        questions: how many were fitted on, held out, and left out because nothing can be learned from them.
    """

    bundle: Path
    adapter: Path | None
    seconds: float
    steps: int
    loss: float
    parameters: dict[str, int]
    questions: dict[str, int]


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

    @property
    def parameters(self) -> dict[str, int]:
        """Total and active as the model will be saved, and how many are trained."""
        adapters = sum(p.numel() for name, p in self.model.named_parameters() if "lora_" in name)
        copies = sum(p.numel() for name, p in self.model.named_parameters() if ".original_module." in name)
        counts = self.model.parameter_counts()
        extra = adapters + copies
        return {
            "total": counts["total"] - extra,
            "active": counts["active"] - extra,
            "trained": trained_parameters(self.model),
        }


def prepare(config: TrainingConfig, *, cache: Path | None = None) -> Run:
    """Load questions and index, retrieve once, build the model and decide what of it is trained."""
    index = Index.open(config.data.index)
    questions = load_questions(config.data.questions, config.data.limit)
    known = [question for question in questions if learnable(question)]
    fit, held = hold_out(known, config.data.calibration_share)
    if not fit:
        raise DataError(f"none of the {len(questions)} questions can be learned from: no answer_spans, no yes/no/maybe")
    held = held[: config.data.calibration_limit]
    model = build_model(config, index, on_cpu=not torch.cuda.is_available())
    adapted = make_trainable(model, config)

    raw = config.data.question_field == "question_raw"
    texts = [question.raw if raw else question.question for question in fit + held]
    n = max(config.raft.neighbours, config.raft.passages + _SPARE_NEIGHBOURS)
    retrieved = Retrieved.of(index, texts, n, config.raft.retriever, cache or index.folder / CACHE_NAME)
    of_fit = Retrieved(index, retrieved.rows_QN[: len(fit)], retrieved.scores_QN[: len(fit)])
    of_held = Retrieved(index, retrieved.rows_QN[len(fit) :], retrieved.scores_QN[len(fit) :])
    train = config.train
    dataset = RaftDataset(
        fit,
        index,
        of_fit,
        config.raft,
        examples=train.steps * train.batch_size * train.accumulation,
        batch_size=train.batch_size,
        seed=config.seed,
        question_field=config.data.question_field,
    )
    collator = RaftCollator(model.tokenizer, config.raft, raw=raw)
    return Run(config, index, model, adapted, dataset, collator, held, of_held, len(questions) - len(known))


def train(
    config: str | Path | Mapping[str, Any] | TrainingConfig,
    overrides: Sequence[str] = (),
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    cache: str | os.PathLike[str] | None = None,
    show: bool = False,
) -> TrainResult:
    """Fine-tune a reader and save it as a bundle.

    Args:
        config: YAML file, mapping or configuration; ``overrides`` are ``key.key=value``.
        out: the bundle's folder; ``training.yaml``, ``history.jsonl`` and, while training, ``checkpoints/`` go there.
        resume: go on from the last checkpoint; equals the run that was never interrupted.
        overwrite: start again where a run has left something.
        cache: folder where neighbours of questions are kept between runs; None means in the index's own folder.
        show: progress on stderr.

    Raises:
        ConfigError, DataError, ModelError: before anything is written.
        BundleError: the saved model does not answer as the trained one did.
    """
    resolved = config if isinstance(config, TrainingConfig) else load_config(config, overrides)
    folder = Path(out)
    _check_out(folder, resolved, resume=resume, overwrite=overwrite)
    set_seed(resolved.seed)
    run = prepare(resolved, cache=Path(cache) if cache else None)
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(
        yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
    )
    checkpoints = folder / "checkpoints"
    history = HistoryCallback(folder / HISTORY_NAME, steps=resolved.train.steps, show=show)
    trainer = RagmoeTrainer(
        model=run.model,
        args=_arguments(resolved, checkpoints),
        train_dataset=run.dataset,
        data_collator=run.collator,
        callbacks=[history],
        optimiser=resolved.train,
    )
    history.trainer = trainer
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    last = get_last_checkpoint(str(checkpoints)) if resume and checkpoints.is_dir() else None
    parameters = run.parameters
    begin = time.perf_counter()
    finished = trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - begin
    # Trainer leaves its autocast around forward; what is saved and compared is the model itself.
    run.model = trainer.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    adapter = _save(run, folder)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return TrainResult(
        folder,
        adapter,
        seconds,
        resolved.train.steps,
        float(finished.training_loss),
        parameters,
        {"fitted": len(run.dataset.questions), "held_out": len(run.held), "left_out": run.left_out},
    )


def _check_out(folder: Path, config: TrainingConfig, *, resume: bool, overwrite: bool) -> None:
    started = (folder / CONFIG_NAME).is_file()
    if is_bundle(folder) and not overwrite:
        raise ConfigError(f"{folder} holds a finished run", hint="name another folder, or pass --overwrite")
    if started and not resume and not overwrite:
        raise ConfigError(f"{folder} holds a run that did not finish", hint="pass --resume to go on, or --overwrite")
    if resume and started:
        before = yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        now = config.model_dump(mode="json")
        if differ := sorted(key for key in now if now[key] != before.get(key)):
            raise ConfigError(
                f"cannot resume {folder}: the configuration differs in {', '.join(differ)} from its {CONFIG_NAME}",
                hint=f"ragmoe train {folder / CONFIG_NAME} --out {folder} --resume",
            )


def _arguments(config: TrainingConfig, checkpoints: Path) -> TrainingArguments:
    train = config.train
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(train.warmup * train.steps),
        max_grad_norm=train.clip,
        bf16=wants_bf16(train.precision),
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


def _save(run: Run, folder: Path) -> Path | None:
    """Merge adapters, calibrate, save, and make sure that what was saved answers like what was trained."""
    model, adapter = run.model, None
    if run.adapted is not None:
        adapter = folder / "adapter"
        save_adapter(run.adapted, adapter)
        model = run.adapted.merge_and_unload()
        model.tokenizer = run.collator.tokenizer
    model.eval()
    texts = [run.dataset.text(question) for question in run.held]
    model.config.no_answer_threshold = calibrate(model, run.held, texts, run.held_retrieved, run.index, run.config.raft)
    model.tokenizer.save_pretrained(folder)
    model.save_pretrained(folder, message="train")
    batch = run.collator([run.dataset[at] for at in range(min(2, len(run.dataset)))])
    difference = largest_difference(model, load(folder), batch)
    if difference != 0.0:
        raise BundleError(f"{folder} was saved, but its logits differ from the trained model's by {difference:.2e}")
    return adapter


def save_adapter(adapted: Any, folder: Path) -> None:
    """The PEFT adapter with its head, in fp16: half the size, and its deltas are small."""
    from safetensors.torch import load_file, save_file

    adapted.save_pretrained(str(folder))
    path = folder / "adapter_model.safetensors"
    save_file({name: x.half().contiguous() for name, x in load_file(path).items()}, path, metadata={"format": "pt"})


@torch.no_grad()
def largest_difference(
    a: RagmoeBertForQuestionAnswering, b: RagmoeBertForQuestionAnswering, batch: Mapping[str, Any]
) -> float:
    """The largest absolute difference of two models' logits on a batch, on the CPU in fp32."""
    outputs = [model.eval().float().cpu()(**batch) for model in (a, b)]
    pairs = [(outputs[0].start_logits, outputs[1].start_logits), (outputs[0].end_logits, outputs[1].end_logits)]
    return max((x - y).abs().max().item() for x, y in pairs)


__all__ = ["Run", "TrainResult", "prepare", "train"]
