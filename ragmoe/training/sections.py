"""The sections of a training configuration; every field has its default here. config.py reads a whole file."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ragmoe._errors import ConfigError


class Section(BaseModel):
    """Unknown keys are errors, and so are numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """What is learned from.

    Attributes:
        questions: question files (jsonl); globs and ``${VARIABLES}`` are expanded, relative to the configuration file.
            None at all only where ``new_expert.corpus`` says of which documents to make some, or ``documents`` are
            learned from.
        documents: sources of whole documents, in the place of questions: a causal language model learns to predict
            their words, with the neighbours of the words before (see ``LanguageConfig``).
        without: domains whose documents are left out, as where one of them is to arrive later.
        index: index folder that the questions' passages, or the documents' neighbours, come from. Documents need none
            where the gate sees no neighbours.
        question_field: ``question``, or ``question_raw`` to retrieve and read without the document's name.
        limit: use only so many questions, drawn by digest; None uses all.
        replay: question files, or sources of documents, of what a bundle knows already, mixed in against forgetting;
        replay_share: how many of all questions (of documents: of all characters) are such, 0 to 1, drawn by digest.
        calibration_share: share of the questions' documents kept aside to calibrate the no-answer threshold, or that
            of a new expert and to judge it by; ``calibration_limit`` is how many of their questions are used at most.
            Of documents that are learned from so many are kept aside for a new expert, and only for one.
        unanswerable_share: how many of the questions that will be asked are expected to have no answer; the threshold
            is calibrated for that.
    """

    questions: list[str] = []
    documents: list[str] = []
    without: list[str] = []
    index: str | None = None
    question_field: Literal["question", "question_raw"] = "question"
    limit: int | None = Field(None, ge=1)
    replay: list[str] = []
    replay_share: float = Field(0.5, gt=0.0, lt=1.0)
    calibration_share: float = Field(0.03, ge=0.0, lt=0.5)
    calibration_limit: int = Field(100, ge=1)
    unanswerable_share: float = Field(0.1, ge=0.0, le=1.0)

    @property
    def required_index(self) -> str:
        """The index, for what cannot do without; ConfigError where none is given."""
        if self.index is None:
            raise ConfigError(
                "data.index is missing: expected the folder of an index",
                hint="ragmoe index build SOURCE --out DIR makes one",
            )
        return self.index


class RaftConfig(Section):
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


class GenerateConfig(Section):
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


class LanguageConfig(Section):
    """How documents are cut for language modelling, and what is retrieved for a chunk of them.

    Attributes:
        chunk_tokens: tokens that are predicted together, with the same neighbours.
        context_tokens: how many tokens before a chunk are read with it and not predicted; the first one at least
            depends on the last token before it.
        query_chunks: how many of the chunks before it are its query, as one text.
        queries: from how many queries its neighbours come: its own, and those of the chunks before it, which have been
            asked already. The best by score of all that they find are shown, so that a document's topic is not lost
            where the last chunk says little of it.
        shown: what the gate sees: the ``passages`` that are found; or the embeddings of the ``queries`` themselves, for
            which nothing is searched (``neighbours`` and ``retriever`` say nothing then): a control of what the
            passages bring. Where recorded votes count, queries vote as ``ExpertMemory.guess`` says.
        neighbours: N, how many the gate sees.
        retriever: None means the index's default.
        drop_all, drop_each: neighbour dropout, as in ``RaftConfig``; for training alone.
    """

    chunk_tokens: int = Field(128, ge=1)
    context_tokens: int = Field(1, ge=1)
    query_chunks: int = Field(1, ge=1)
    # Left out where it is one: evaluations from before there was a choice stay what they are.
    queries: int = Field(1, ge=1, exclude_if=lambda queries: queries == 1)
    shown: Literal["passages", "queries"] = Field("passages", exclude_if=lambda shown: shown == "passages")
    neighbours: int = Field(16, ge=1)
    retriever: str | None = None
    drop_all: float = Field(0.0, ge=0.0, le=1.0)
    drop_each: float = Field(0.0, ge=0.0, le=1.0)


class LoraConfig(Section):
    """Low-rank adapters on attention and feed-forward matrices of the frozen base, for ``train.what: lora``."""

    rank: int = Field(32, ge=1)
    alpha: float = 64.0


class OptimiserConfig(Section):
    """How it is learned.

    Attributes:
        what: ``all``; ``gate``, ``experts`` or ``gate+experts`` (with a reader's head); ``lora``: adapters on the
            frozen base, with gate, experts and head; ``new_expert``: one more expert of a bundle, and nothing else; or
            ``xlora``: X-LoRA's classifier over the experts of a bundle (with the head), a baseline of experiments.
        steps: optimiser steps.
        batch_size: questions of a micro-batch; ``accumulation`` micro-batches make a step.
        learning_rate: of the base; the others where given, else the same.
        context_start: logits by which the gate, before anything is learned, prefers one expert for each cluster of what
            is retrieved: the examples are divided into as many clusters as there are experts. For gates that learn from
            the neighbours' embeddings (``pooled``, ``retrieval``, ``retrieval+memory``) and have not done so yet. None
            starts them as the token gate, and while experts are still alike they learn next to nothing of neighbours. A
            small ``gate_learning_rate`` (1e-4) keeps the start until they differ: optimisers like Adam take steps of
            full size however little a gradient says. The lead weighs, too: 4 leaves the second of a token's experts a
            fiftieth, until the z-loss (``model.z_loss``) has evened that out within some hundred steps; without that
            loss take 1.
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
    context_start: float | None = Field(None, gt=0)
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


class NewExpertConfig(Section):
    """One more expert for a bundle, trained alone, for ``train.what: new_expert``; ``ragmoe experts add`` fills it in.

    Attributes:
        name: of the expert; its domain's, where it has one.
        start: what it starts as: ``shared`` (the layer's dense network), ``nearest`` (the expert whose documents lie
            nearest to the new ones), or an expert's name or id.
        corpus: sources of the new documents, all in the index; none means the passages of the questions' domains. A
            language model learns from ``data.documents``, and needs none.
        others: questions about what the bundle knows, for the gate to learn when not to call the new expert; none
            means that sentences of the index's other passages stand for them. Of a language model sources of
            documents; none means the index's other documents.
        unseen: questions (of a language model: documents) by which the expert will be judged: the gate learns nothing
            from their documents.
        documents: how many of the new and of the other documents (of a language model: chunks) the gate learns from
            at most.
        first_token: of a reader: how much the first token, [CLS], counts in the gate's lesson beside all tokens
            together. The reader finds its no-answer score there, which rises where that token calls the expert
            (eval/results/withheld.md). 0 is as one token among all.
        train_gate: False leaves the gate rows as they start, so that only votes lead to the expert.
        keep: share of the calls by its own questions that the expert keeps at least, layer by layer, while its balance
            bias is lowered after training: what nearly calls it is seldom its own. 1 leaves it as it has learned.
        gate_bias: added to the expert's balance bias after training, so that it is called only by this margin of logit.
        joins: digest of what the bundle answers by (``BundleMap.content``), where it must still be that.
    """

    name: str = Field(min_length=1)
    start: str = "shared"
    corpus: list[str] = []
    others: list[str] = []
    unseen: list[str] = []
    documents: int = Field(1000, ge=1)
    first_token: float = Field(0.0, ge=0)
    train_gate: bool = True
    keep: float = Field(0.95, gt=0, le=1)
    gate_bias: float = Field(0.0, le=0)
    joins: str | None = None
