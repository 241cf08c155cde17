"""The configuration of a reader: a BERT configuration and what its sparse layers add."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

from ragmoe._errors import ModelError
from ragmoe.experts import experts_class
from ragmoe.gates import gate_class
from ragmoe.moe import RoutingLoss, routing_loss
from ragmoe.moe.capacity import overflow_class

# What a sequence can answer besides a span of its tokens, in the order of the logits; the first is "no answer here".
SPECIAL_CANDIDATES = ("", "yes", "no", "maybe")
# The routing losses whose weights are fields of their own.
OWN_WEIGHTS = {"load_balance": "balance_loss", "z": "z_loss"}


@strict
class RagmoeBertConfig(BertConfig):
    """A BERT configuration and what its sparse layers add.

    Args:
        gate: name of the gate (see ``ragmoe.gates.gate_names()``).
        experts, top_k: E experts a sparse layer, K of them for each token.
        expert_kind: ``lora`` or ``ffn``; ``expert_rank`` is the rank of the former, and of ``moe_attention``.
        scores, selection: how logits become weights and which experts are chosen (``ragmoe gates ls`` shows the names).
        weight_scale: what the experts' weights are multiplied with.
        gate_noise, gate_jitter, token_dropout: what disturbs the gate while training; see ``GateSettings``.
        expert_groups: into how many groups the experts are divided (hierarchical gate).
        expert_types: the type of token each expert serves, -1 for all (modality gate); 0 the question, 1 the passage.
        capacity_factor: an expert takes at most this many times an even share of the tokens, of a batch while training
            and of each sequence otherwise; None sets no limit.
        overflow: what becomes of the rest: ``drop``, ``shared`` or ``next``.
        overflow_priority: who is served first: by ``position``, ``probability`` or at ``random``.
        shared_expert: full experts stand beside the dense network instead of in its place (LoRA experts always do).
        moe_attention: experts of sparse layers add to the keys and values of attention too, by low-rank deltas of
            ``expert_rank``; the layer then routes once, before attention.
        sparse_layers: which layers are sparse; None means every second one, beginning with the second.
        gate_width: width of the retrieval gate's attention.
        neighbour_width: width R of the index's embeddings; ``neighbours`` how many of them the gate sees.
        common_experts: the last so many experts belong to no domain (oracle, centroid and ridge gates).
        vote_start: what a unanimous vote of the neighbours is worth at first, in units of logit (gates ``memory``,
            ``retrieval+memory`` and ``clusters``). At zero they start as gates without votes, and no vote helps before
            some expert is better than others at some domain; a few units make that so from the first step.
        neighbour_summary: add what a token's attention finds among the neighbours to its state before each sparse
            layer, whatever the gate sees: the control that separates routing from extra input.
        balance_loss, z_loss: weights of the routing losses ``load_balance`` and ``z``.
        losses: weights of further routing losses by name (see ``ragmoe.moe.loss_names()``), which are computed while
            training alone; with the weight 0 a loss is only shown.
        max_length, stride: tokens of a sequence, and how far the windows of a longer passage overlap.
        max_answer_tokens: longest answer read.
        no_answer_threshold: a question is left unanswered where "no answer here" beats the best answer by more
            than this; calibrated by training.
        expert_thresholds: one for each expert: the threshold for what most tokens take to it, where it has one of its
            own, as an expert that was added later has; None means the model's.
        expert_ids, expert_names: one for each expert; None means that they count from 0 and are unnamed.
        encoder, index_digest: of the index the model was trained with.
    """

    model_type = "ragmoe_bert"
    # Of a batch, and no predictions: Trainer's evaluation would gather them.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "answer_loss", "balance_loss", "z_loss", "further_losses", "routings", "hidden_states",
    ]  # fmt: skip

    gate: str = "retrieval"
    experts: int = 8
    top_k: int = 2
    expert_kind: str = "lora"
    expert_rank: int = 16
    shared_expert: bool = False
    moe_attention: bool = False
    sparse_layers: list[int] | None = None
    gate_width: int = 64
    gate_noise: float = 0.0
    gate_jitter: float = 0.0
    token_dropout: float = 0.0
    normalise_weights: bool | None = None
    scores: str = "softmax"
    selection: str = "top_k"
    weight_scale: float = 1.0
    expert_groups: int = 1
    expert_types: list[int] | None = None
    capacity_factor: float | None = None
    overflow: str = "drop"
    overflow_priority: str = "position"
    neighbour_width: int = 384
    neighbours: int = 16
    common_experts: int = 0
    vote_start: float = 0.0
    neighbour_summary: bool = False
    balance_loss: float = 0.01
    z_loss: float = 0.001
    losses: dict[str, float | int] | None = None
    max_length: int = 384
    stride: int = 96
    max_answer_tokens: int = 128
    no_answer_threshold: float = 0.0
    expert_thresholds: list[float | None] | None = None
    expert_ids: list[int] | None = None
    expert_names: list[str] | None = None
    encoder: dict[str, Any] | None = None
    index_digest: str | None = None

    def resolved_sparse_layers(self) -> list[int]:
        """The sparse layers, checked."""
        if self.sparse_layers is None:
            return list(range(1, self.num_hidden_layers, 2))
        wrong = [i for i in self.sparse_layers if not 0 <= i < self.num_hidden_layers]
        if wrong:
            raise ModelError(f"sparse_layers has {wrong}, but the layers are 0 to {self.num_hidden_layers - 1}")
        return sorted(set(self.sparse_layers))

    def check(self) -> None:
        """Raise ModelError where settings contradict each other; called when a model is built."""
        check_sizes(self)
        self.resolved_sparse_layers()
        if self.shared_expert and experts_class(self.expert_kind).needs_dense:
            raise ModelError(
                f"shared_expert is true, but {self.expert_kind!r} experts always stand beside the dense network",
                hint="leave shared_expert out, or set expert_kind: ffn",
            )
        self._check_capacity()
        check_gate(self)
        self._check_losses()
        check_names(self)
        own = self.expert_thresholds
        if own is not None and len(own) != self.experts:
            raise ModelError(f"expert_thresholds has {len(own)} entries: expected {self.experts}, one for each expert")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of every routing loss that is computed, by name."""
        own = {name: getattr(self, field) for name, field in OWN_WEIGHTS.items()}
        return {**own, **(self.losses or {})}

    def further_losses(self) -> dict[str, RoutingLoss]:
        """The routing losses of ``losses``, by name; ConfigError lists what exists where one does not."""
        return {name: routing_loss(name) for name in self.losses or {}}

    def _check_losses(self) -> None:
        if self.losses and not self.resolved_sparse_layers():
            raise ModelError(
                f"losses is {self.losses}, but the model has no sparse layer whose routing they could judge"
            )
        for name, loss in self.further_losses().items():
            if field := OWN_WEIGHTS.get(name):
                raise ModelError(f"losses has {name!r}, whose weight is {field}", hint=f"model.{field}=WEIGHT")
            weight = self.loss_weights[name]
            if not 0 <= weight < math.inf:
                raise ModelError(f"the weight of the loss {name!r} is {weight}: expected 0 or more")
            loss.check(self)

    def _check_capacity(self) -> None:
        if self.capacity_factor is None:
            for name in ("overflow", "overflow_priority"):
                if (value := getattr(self, name)) != getattr(type(self), name):
                    raise ModelError(
                        f"{name} is {value!r}, but capacity_factor is not set, so nothing overflows",
                        hint="model.capacity_factor=1.25",
                    )
            return
        has_dense = self.shared_expert or experts_class(self.expert_kind).needs_dense
        overflow = overflow_class(self.overflow)
        if overflow.wants_dense and not has_dense:
            raise ModelError(
                f"overflow is {self.overflow!r}, but no dense network stands beside {self.expert_kind!r} experts",
                hint="model.shared_expert=true, or model.overflow=drop",
            )
        if self.shared_expert and overflow.drops:
            raise ModelError(
                f"overflow is {self.overflow!r}, but the shared expert answers every token, those turned away too",
                hint="model.overflow=shared, which says so, or model.overflow=next",
            )


def check_sizes(config: Any) -> None:
    """Raise ModelError where there is nothing of what a sparse layer is made of."""
    for name in ("experts", "gate_width", "neighbour_width"):
        if (value := getattr(config, name)) < 1:
            raise ModelError(f"{name} is {value}: expected 1 or more")


def check_gate(config: Any) -> None:
    """Raise ModelError where a configuration has something else than its default that its gate has no use for."""
    gate = gate_class(config.gate)
    for name, knows, what in (
        ("expert_groups", gate.takes_groups, "knows no groups"),
        ("expert_types", gate.takes_types, "knows no types of tokens"),
        ("vote_start", gate.counts_votes, "counts no votes"),
        ("common_experts", gate.takes_common, "knows no domains they could share"),
    ):
        if (value := getattr(config, name)) != getattr(type(config), name) and not knows:
            raise ModelError(f"{name} is {value}, but the gate {config.gate!r} {what}")


def check_names(config: Any) -> None:
    """Raise ModelError unless each expert has a name of its own, or none has one."""
    names = config.expert_names
    if names is not None and not len(names) == len(set(names)) == config.experts:
        raise ModelError(f"expert_names is {names}: expected {config.experts} different names, one for each expert")
