"""Fine-tuning a generator: any causal language model on prompts with passages, by the same runs as a reader.

A base that is a folder of a causal language model is trained as it is, gates and experts included where it has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from ragmoe._errors import BundleError, ConfigError, DataError
from ragmoe._quiet import quiet_loading
from ragmoe.corpus.types import Question
from ragmoe.generation.batches import IGNORED, sees_neighbours
from ragmoe.generation.generator import STYLE_NAME, Generator, is_generator
from ragmoe.generation.prompts import PromptStyle
from ragmoe.index import Index
from ragmoe.moe import RoutingStatistics
from ragmoe.training.callbacks import Shows
from ragmoe.training.config import GenerateConfig, TrainingConfig
from ragmoe.training.data import CACHE_NAME, SPARE_NEIGHBOURS, Retrieved, check_passages, training_questions
from ragmoe.training.generator_data import GeneratorCollator, GeneratorDataset, answerable_from, fitting
from ragmoe.training.trainer import RagmoeTrainer, freeze

_WHOLE = "all"
_PARTS = ("gate", "experts", "gate+experts")


def trains_generator(config: TrainingConfig) -> bool:
    """Whether the base is a causal language model; a Hub id is one where ``generate`` is given."""
    base = Path(config.base)
    return is_generator(base) if base.is_dir() else config.generate is not None


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

    # A plain model has neither a bundle's format nor experts that could stay behind.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if hasattr(model or self.model, "load_bundle"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if hasattr(self.model, "load_bundle"):
            super()._save(output_dir, state_dict)
        else:
            Trainer._save(self, output_dir, state_dict)


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
    held: list[Question] = field(default_factory=list)
    new_expert: None = None

    trainer_class: ClassVar[type[RagmoeTrainer]] = GeneratorTrainer

    @property
    def parameters(self) -> dict[str, int]:
        """Total, active and trained."""
        counts = Generator(self.model, self.collator.tokenizer, self.style).parameter_counts()
        return {**counts, "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad)}

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Save, and make sure that what was saved says what was trained."""
        batch = self.collator([self.dataset[at] for at in range(min(2, len(self.dataset)))])
        del batch["labels"]
        generator = Generator(self.model.eval().float().cpu(), self.collator.tokenizer, self.style)
        generator.save(folder)
        again = Generator.load(folder).model.float()
        difference = (self.model(**batch).logits - again(**batch).logits).abs().max().item()
        if difference != 0.0:
            # Without its style nobody takes it for a finished run.
            (folder / STYLE_NAME).unlink()
            raise BundleError(f"{folder} was saved, but its logits differ from the trained model's by {difference:.2e}")


def prepare_generator(config: TrainingConfig, *, cache: Path | None = None, show: Shows | None = None) -> GeneratorRun:
    """``prepare`` for a generator.

    Raises:
        ConfigError: settings that are a reader's, or that the model has no use for.
        DataError: nothing can be learned from the questions, or there is room for none of them.
    """
    _check(config)
    generate = config.generate or GenerateConfig()
    index = Index.open(config.data.index)
    questions = training_questions(config.data)
    style = PromptStyle(generate.without_gold, config.raft.max_length, generate.max_answer_tokens)
    generator = _opened(config, style)
    generator.check_index(index)
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
    collator = GeneratorCollator(generator.prompts, sees_neighbours=generator.gate_sees_neighbours, raw=raw)
    return GeneratorRun(config, index, generator.model, style, dataset, collator, len(questions) - len(fit))


def _opened(config: TrainingConfig, style: PromptStyle) -> Generator:
    """The base, ready to be trained in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_loading():
        model: nn.Module = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
    if config.train.what != _WHOLE and not getattr(model, "sparse_layers", None):
        raise ConfigError(f"train.what is {config.train.what!r}, but the base {config.base} has no sparse layer")
    freeze(model, config.train.what)
    if config.train.dropout is not None or config.train.attention_dropout is not None:
        raise ConfigError("train.dropout is set, but a generator is trained with its own: leave it out")
    if sees_neighbours(model):
        settings: Any = model.config
        settings.neighbours = config.raft.neighbours
    return Generator(model, AutoTokenizer.from_pretrained(config.base), style)


def _check(config: TrainingConfig) -> None:
    """Refuse what only a reader has."""
    for name, given in (
        ("model", config.model),
        ("start", config.start),
        ("new_expert", config.new_expert),
        ("expert_noise", config.expert_noise),
    ):
        if given:
            raise ConfigError(
                f"{name} is {given!r}, but the base {config.base} is a causal language model, trained as it is",
                hint=f"leave {name} out",
            )
    if config.train.what not in (_WHOLE, *_PARTS):
        raise ConfigError(
            f"train.what is {config.train.what!r}; for a causal language model expected one of: "
            f"{', '.join((_WHOLE, *_PARTS))}"
        )
