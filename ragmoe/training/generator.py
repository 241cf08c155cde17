"""Fine-tuning a generator: any causal language model on prompts with passages, by the same runs as a reader.

The base is a causal language model, with gates and experts where it has them or ``model`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from ragmoe._errors import ConfigError, DataError, ModelError
from ragmoe.corpus.types import Question
from ragmoe.generation.batches import IGNORED
from ragmoe.generation.generator import Generator
from ragmoe.generation.prompts import PromptStyle
from ragmoe.index import Index
from ragmoe.moe import RoutingStatistics
from ragmoe.training.adapters import merge
from ragmoe.training.callbacks import Shows
from ragmoe.training.clusters import start_gates
from ragmoe.training.config import GenerateConfig, TrainingConfig
from ragmoe.training.data import SPARE_NEIGHBOURS, check_passages, training_questions
from ragmoe.training.decoders import decoder_parameters, is_decoder, open_decoder, save_checked
from ragmoe.training.generator_data import GeneratorCollator, GeneratorDataset, answerable_from, fitting
from ragmoe.training.retrieved import CACHE_NAME, Retrieved
from ragmoe.training.totals import check_decoder_losses
from ragmoe.training.trainer import RagmoeTrainer
from ragmoe.training.votes import check_votes


def trains_generator(config: TrainingConfig) -> bool:
    """Whether the base is a causal language model; a Hub id is one where ``generate`` is given."""
    return is_decoder(config.base) if Path(config.base).is_dir() else config.generate is not None


def style_of(config: TrainingConfig) -> PromptStyle:
    """How a generator is asked that is trained so; ConfigError where its lengths do not go together."""
    generate = config.generate or GenerateConfig()
    try:
        return PromptStyle(generate.without_gold, config.raft.max_length, generate.max_answer_tokens)
    except ValueError as error:
        raise ConfigError(str(error), hint="raft.max_length and generate.max_answer_tokens") from None


def open_generator(config: TrainingConfig, index: Index) -> Generator:
    """A generator as it is before its first step.

    Raises:
        RagmoeError: as ``open_decoder``.
    """
    # Adapters say nothing yet, and would be counted.
    whole = config.model_copy(update={"train": config.train.model_copy(update={"what": "all"})})
    model, tokenizer, _ = open_decoder(whole, index, config.raft.neighbours)
    return Generator(model.eval(), tokenizer, style_of(config))


class GeneratorTrainer(RagmoeTrainer):
    """``RagmoeTrainer`` for causal language models, those without sparse layers too.

    Every token of an answer counts the same in a step, however the step is cut into micro-batches: each one's loss,
    which is a mean, is weighted by its share of the step's tokens. Of models that say their ``language_loss`` beside
    the whole, routing losses are left as they are.
    """

    def _new_statistics(self) -> RoutingStatistics:
        model: Any = self.model
        return RoutingStatistics(getattr(model, "sparse_layers", []), getattr(model.config, "experts", 1))

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        loss, output = super().compute_loss(model, inputs, return_outputs=True)
        if (weight := self._weight(inputs["labels"])) is not None:
            language = output.get("language_loss")
            loss = loss + (weight - 1) * (output["loss"] if language is None else language)
        return (loss, output) if return_outputs else loss

    def _weight(self, labels: Tensor) -> Tensor | None:
        """How many times its even share of the step's tokens a micro-batch has; None where it is the whole step."""
        parts = len(self._step_batches) * self.args.world_size
        if parts <= 1:
            return None
        # The first of a row is predicted by nothing.
        counts = [(batch["labels"][:, 1:] != IGNORED).sum() for batch in self._step_batches]
        total = self.accelerator.reduce(torch.stack(counts).sum().to(labels.device), reduction="sum")
        return (labels[:, 1:] != IGNORED).sum() * parts / total

    def _lost(self, layers: Any) -> dict[str, list[float]]:
        return super()._lost(layers) if layers else {}

    # A plain model has no bundle's format. Its checkpoints keep the names that its tensors have while it is trained: by
    # those of its native format, which Trainer loads without conversion, fused experts would stay as they were.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = model or self.model
        if hasattr(model, "load_bundle"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _load_strictly(model, Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model: Any = self.model
        if hasattr(model, "load_bundle"):
            super()._save(output_dir, state_dict)
        else:
            model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)


def _load_strictly(model: Any, checkpoint: Path) -> None:
    """Load a plain model's checkpoint in place; ModelError where it lacks a tensor, or holds an unknown one."""
    state: dict[str, Tensor] = {}
    for file in checkpoint.glob("model*.safetensors"):
        state |= load_file(file)
    found, own = model.load_state_dict(state, strict=False), model.state_dict()
    # Of tensors that are tied only one is written.
    loaded = {own[name].data_ptr() for name in state.keys() & own.keys()}
    missing = [name for name in found.missing_keys if own[name].data_ptr() not in loaded]
    if wrong := [*(f"lacks {name}" for name in missing), *(f"holds {name}" for name in found.unexpected_keys)]:
        raise ModelError(
            f"{checkpoint} is no checkpoint of this model: it {wrong[0]}; expected all of its tensors, by the names "
            "they have while it is trained",
            hint="pass --overwrite to start again",
        )


@dataclass
class GeneratorRun:
    """Everything a run needs, made from its configuration; see ``Run``.

    Attributes:
        left_out: questions nothing can be learned from, those for which there is no room included.
    """

    config: TrainingConfig
    index: Index
    model: Any
    style: PromptStyle
    dataset: GeneratorDataset
    collator: GeneratorCollator
    left_out: int
    adapted: Any = None
    new_expert: None = None

    trainer_class: ClassVar[type[RagmoeTrainer]] = GeneratorTrainer

    @property
    def parameters(self) -> dict[str, int]:
        """Total, active and trained."""
        return decoder_parameters(self.model)

    @property
    def material(self) -> Sequence[Question]:
        """The questions."""
        return self.dataset.questions

    @property
    def counts(self) -> dict[str, int]:
        """What is learned from."""
        return {"fitted": len(self.dataset.questions), "held_out": 0, "left_out": self.left_out}

    def save(self, folder: Path) -> Path | None:
        """Save, and make sure that what was saved says what was trained; the folder of its adapter, if any."""
        self.model, adapter = merge(self.model, self.adapted, folder)
        batch = self.collator([self.dataset[at] for at in range(min(2, len(self.dataset)))])
        save_checked(self.model, self.collator.tokenizer, self.style, batch, folder)
        return adapter


def prepare_generator(config: TrainingConfig, *, cache: Path | None = None, show: Shows | None = None) -> GeneratorRun:
    """``prepare`` for a generator.

    Raises:
        ConfigError: settings that are a reader's, or that the model has no use for.
        DataError: nothing can be learned from the questions, or there is room for none of them.
    """
    generate = config.generate or GenerateConfig()
    index = Index.open(config.data.required_index)
    questions = training_questions(config.data, show.line if show else None)
    style = style_of(config)
    model, tokenizer, adapted = open_decoder(config, index, config.raft.neighbours)
    generator = Generator(model, tokenizer, style)
    known = [question for question in questions if answerable_from(question)]
    check_passages(known, index)
    raw = config.data.question_field == "question_raw"
    fit, long = fitting(known, index, generator.prompts, config.raft.passages, raw=raw)
    if not fit:
        raise DataError(
            f"none of the {len(questions)} questions can be learned from: {len(questions) - len(known)} have an answer "
            f"but no gold_ids, {len(long)} do not fit into {style.max_length} tokens with their gold passage",
            hint="raft.max_length=1024, where the model has the positions",
        )
    if long and show:
        show.line(f"{len(long)} questions are left out: with their gold passage they exceed {style.max_length} tokens")
    texts = [question.raw if raw else question.question for question in fit]
    n = max(config.raft.neighbours, config.raft.passages + SPARE_NEIGHBOURS)
    progress = partial(show.stage, "retrieving neighbours") if show else None
    where = cache or index.folder / CACHE_NAME
    train = config.train
    dataset = GeneratorDataset(
        fit,
        index,
        Retrieved.of(index, texts, n, config.raft.retriever, where, progress=progress),
        config.raft,
        generate=generate,
        examples=train.steps * train.batch_size * train.accumulation,
        batch_size=train.batch_size,
        seed=config.seed,
        question_field=config.data.question_field,
        recall=lambda neighbours, question: generator.recall(neighbours, index, [question.domain]),
    )
    check_decoder_losses(model.config, fit, sees_neighbours=generator.gate_sees_neighbours)
    check_votes(model, index, show.line if show else None)
    start_gates(model, index, dataset, config, show)
    collator = GeneratorCollator(generator.prompts, sees_neighbours=generator.gate_sees_neighbours, raw=raw)
    return GeneratorRun(config, index, model, style, dataset, collator, len(questions) - len(fit), adapted)
