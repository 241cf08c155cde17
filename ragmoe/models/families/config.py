"""What a decoder's configuration has beside its family's: the gate, the experts, the losses, and where they come from.

The names are those of ``RagmoeBertConfig``; the number of experts goes by our name, ``experts``, and the family's. How
many of them serve a token is ``num_experts_per_tok`` alone: ``top_k`` would be taken for sampling's.
"""

# Annotations are not postponed here: ``strict`` checks values by types, and passes over those that are strings.
import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ragmoe._errors import ModelError
from ragmoe.gates import gate_class, selection_class
from ragmoe.models.config import OWN_WEIGHTS, check_gate, check_names, check_sizes
from ragmoe.moe import RoutingLoss, routing_loss
from ragmoe.moe.block import block_class


@strict
class RoutingConfig(PreTrainedConfig):
    """Fields of every decoder, to stand before a family's configuration among the bases.

    Args:
        gate: name of the gate; one whose choice depends on no later token.
        selection: which experts are chosen by their scores; likewise.
        gate_width: width of the retrieval gate's attention.
        gate_noise, gate_jitter, token_dropout: what disturbs the gate while training; see ``GateSettings``.
        expert_groups, common_experts, vote_start: for the gates that take them; see ``RagmoeBertConfig``.
        neighbour_width: width R of the index's embeddings; ``neighbours`` how many of them the gate sees.
        expert_kind: ``ffn``, the family's own experts, or ``lora``: deltas of ``expert_rank`` on a dense network.
        sparse_layers: which layers are sparse; None means those that the family's own fields say.
        balance_loss, z_loss: weights of the routing losses ``load_balance`` and ``z``. They take the place of the
            family's ``router_aux_loss_coef``, whose loss pools the layers, so that imbalances cancel.
        neighbour_summary: add what a token's attention finds among the neighbours to its state before each sparse
            feed-forward network, whatever the gate sees: a control, see ``RagmoeBertConfig``.
        losses: weights of further routing losses by name (see ``ragmoe.moe.loss_names()``).
        expert_ids, expert_names: one for each expert; None means that they count from 0 and are unnamed.
        encoder, index_digest: of the index the model was trained with.
    """

    gate: str = "retrieval"
    selection: str = "top_k"
    gate_width: int = 64
    gate_noise: float | int = 0.0
    gate_jitter: float | int = 0.0
    token_dropout: float | int = 0.0
    expert_groups: int = 1
    common_experts: int = 0
    vote_start: float | int = 0.0
    neighbour_width: int = 384
    neighbours: int = 16
    expert_kind: str = "ffn"
    expert_rank: int = 16
    sparse_layers: list[int] | None = None
    balance_loss: float | int = 0.01
    z_loss: float | int = 0.001
    neighbour_summary: bool = False
    losses: dict[str, float | int] | None = None
    expert_ids: list[int] | None = None
    expert_names: list[str] | None = None
    encoder: dict[str, Any] | None = None
    index_digest: str | None = None

    # What the family's routing is in our terms, for ``gate_settings``.
    scores: ClassVar[str] = "softmax"
    expert_types: ClassVar[None] = None
    expert_kinds: ClassVar[tuple[str, ...]] = ("ffn", "lora")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but a family's own configuration becomes one of ours, and is not called the family's."""
        return super().from_dict({k: v for k, v in config_dict.items() if k != "model_type"}, **kwargs)

    @property
    def normalise_weights(self) -> bool:
        """Whether the weights of the chosen experts sum to one.

        Not where a gate must learn which group to choose: there the group's own probability would cancel. LoRA experts
        start as nothing, whatever their weights.
        """
        return not (gate_class(self.gate).takes_groups and self.expert_kind == "lora")

    @property
    def float_weights(self) -> bool:
        """Whether the family's experts take their weights in float32, whatever the model's own precision."""
        return False

    @property
    def weight_scale(self) -> float:
        """What the experts' weights are multiplied with."""
        return 1.0

    def family_sparse_layers(self) -> list[int]:
        """The layers that are sparse by the family's own fields."""
        return list(range(self.num_hidden_layers))

    def resolved_sparse_layers(self) -> list[int]:
        """The sparse layers, checked."""
        if self.sparse_layers is None:
            return self.family_sparse_layers()
        wrong = [i for i in self.sparse_layers if not 0 <= i < self.num_hidden_layers]
        if wrong:
            raise ModelError(f"sparse_layers has {wrong}, but the layers are 0 to {self.num_hidden_layers - 1}")
        return sorted(set(self.sparse_layers))

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of every routing loss by name; those of weight zero are not computed."""
        own = {name: getattr(self, field) for name, field in OWN_WEIGHTS.items()}
        return {name: weight for name, weight in {**own, **(self.losses or {})}.items() if weight}

    def further_losses(self) -> dict[str, RoutingLoss]:
        """The routing losses of ``losses``, by name; ConfigError lists what exists where one does not."""
        return {name: routing_loss(name) for name in self.losses or {}}

    def check(self) -> None:
        """Raise ModelError where settings contradict each other; called when a model is built."""
        check_sizes(self)
        self.resolved_sparse_layers()
        for kind, name, causal in (
            ("gate", self.gate, gate_class(self.gate).is_causal),
            ("selection", self.selection, selection_class(self.selection).is_causal),
        ):
            if not causal:
                raise ModelError(
                    f"the {kind} {name!r} lets a token's experts depend on tokens after it: not for a decoder",
                    hint=f"{kind}={'retrieval' if kind == 'gate' else 'top_k'}",
                )
        if gate_class(self.gate).takes_types:
            raise ModelError(f"the gate {self.gate!r} routes by types of tokens, of which a decoder knows none")
        if gate_class(self.gate).takes_groups and self.normalise_weights:
            raise ModelError(
                f"the gate {self.gate!r} learns which group to choose by the group's probability, which cancels where "
                f"weights sum to one as in {self.model_type} with {self.expert_kind!r} experts",
                hint="another gate, or of a dense base expert_kind=lora",
            )
        if gate_class(self.gate).is_fitted:
            raise ModelError(
                f"the gate {self.gate!r} is fitted to questions and their domains, for readers alone",
                hint="gate=memory with expert_names of the domains routes by the neighbours' domains too",
            )
        block_class(self.expert_kind)
        if self.expert_kind not in self.expert_kinds:
            raise ModelError(
                f"expert_kind is {self.expert_kind!r}, but {self.model_type} takes {' or '.join(self.expert_kinds)}"
            )
        check_gate(self)
        check_names(self)
        self._check_losses()

    def _check_losses(self) -> None:
        for name in self.losses or {}:
            if field := OWN_WEIGHTS.get(name):
                raise ModelError(f"losses has {name!r}, whose weight is {field}", hint=f"{field}=WEIGHT")
        for name, weight in self.loss_weights.items():
            if not 0 <= weight < math.inf:
                raise ModelError(f"the weight of the loss {name!r} is {weight}: expected 0 or more")
            loss = routing_loss(name)
            if loss.needs_swapped or loss.needs_outputs:
                raise ModelError(f"the loss {name!r} needs more than the routing, which is all that a decoder has")
            loss.check(self)
