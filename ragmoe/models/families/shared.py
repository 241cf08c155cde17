"""What all decoder families share; a family's file only names its own parts.

The family's own classes do the work: attention, cache, masks, recording of outputs. Three things are ours. A layer
hands the neighbours to its gate, a model takes them by name, and the language model adds routing losses and lets
``generate`` make the gates' keys and values once.

B sequences, T positions, D width, V words, N neighbours, R encoder width, L sparse layers, A gate width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from ragmoe.experts import FeedForward
from ragmoe.gates import Gate, Routing
from ragmoe.models.availability import AvailabilityMixin
from ragmoe.models.loss import routing_losses
from ragmoe.models.memory import MemoryMixin
from ragmoe.models.sparse import SparseModel
from ragmoe.moe import NeighbourSummary, StepTotals
from ragmoe.moe.block import BlockParts, NeighbourGate, SparseBlock, block_class
from ragmoe.moe.losses import LossInputs, loss_inputs
from ragmoe.neighbours import NEIGHBOUR_ARGUMENTS, Neighbours

# What transformers calls the keys and values of the tokens before: past_key_values until 5.24.
_CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class CausalLMOutput(MoeCausalLMOutputWithPast):
    """What a decoder returns beside the fields of transformers.

    Attributes:
        aux_loss: the load balance, unweighted, the mean over sparse layers; while training, with labels.
        language_loss: the loss without routing losses; while training, with labels (else ``loss`` is just that).
        further_losses: the other routing losses by name, unweighted; likewise.
        routings: one for each sparse layer, while training, or where ``output_routings`` asks for them.
    """

    language_loss: Tensor | None = None
    further_losses: dict[str, Tensor] | None = None
    routings: tuple[Routing, ...] | None = None


class NeighbourLayer(nn.Module):
    """A family's decoder layer that is sparse where the configuration says so; to stand before it among the bases."""

    parts: ClassVar[BlockParts]
    mlp: nn.Module
    self_attn: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        sparse = config.resolved_sparse_layers()
        if layer_idx in sparse:
            self.mlp = block_class(config.expert_kind)(config, self.parts, sparse.index(layer_idx))
        else:
            self.mlp = self.parts.mlp(config)
        self.summary: NeighbourSummary | None = None
        if layer_idx in sparse and config.neighbour_summary:
            self.summary = NeighbourSummary(config.hidden_size, config.neighbour_width, config.gate_width)

    def forward(self, hidden_states: Tensor, neighbours: Neighbours | None = None, **kwargs: Any) -> Tensor:
        """As the family's own, with the neighbours handed to the gate by argument."""
        attended_BTD, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        x_BTD = hidden_states + attended_BTD
        if self.summary is not None:
            x_BTD = self.summary(x_BTD, neighbours)
        h_BTD = self.post_attention_layernorm(x_BTD)
        return x_BTD + (self.mlp(h_BTD, neighbours) if isinstance(self.mlp, SparseBlock) else self.mlp(h_BTD))


class Decoder(AvailabilityMixin, SparseModel, MemoryMixin):
    """What the model and the language model of a family share."""

    # Rounded to half precision, its small steps would be lost.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["balance_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The family would look for the weight of its own gate; the inner gate is initialised for itself.
        if not isinstance(module, NeighbourGate):
            super()._init_weights(module)


class DecoderModel(Decoder):
    """A family's model without its head; to stand before it among the bases."""

    layer_class: ClassVar[type[nn.Module]]
    norm_class: ClassVar[type[nn.Module]]
    rotary_class: ClassVar[type[nn.Module]]

    def __init__(self, config: Any) -> None:
        # The family's own would build its own layers first, at full size.
        PreTrainedModel.__init__(self, config)
        config.check()
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = self.rotary_class(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        neighbour_embeddings: Tensor | None = None,
        neighbour_scores: Tensor | None = None,
        neighbour_mask: Tensor | None = None,
        neighbour_votes: Tensor | None = None,
        question_domain: Tensor | None = None,
        neighbour_keys: Tensor | None = None,
        neighbour_values: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's own; for the neighbours see ``DecoderForCausalLM.forward``."""
        neighbours = None
        if self.gate_sees_neighbours:
            neighbours = Neighbours.from_tensors(
                {
                    "neighbour_embeddings": neighbour_embeddings,
                    "neighbour_scores": neighbour_scores,
                    "neighbour_mask": neighbour_mask,
                    "neighbour_votes": neighbour_votes,
                    "question_domain": question_domain,
                    "neighbour_keys": neighbour_keys,
                    "neighbour_values": neighbour_values,
                }
            )
        given = input_ids if inputs_embeds is None else inputs_embeds
        if neighbours is not None and given is not None:
            neighbours.require_sequences(given.shape[0])
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=self.config.output_router_logits
            if output_router_logits is None
            else output_router_logits,
            neighbours=neighbours,
            **{_CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )


class DecoderForCausalLM(Decoder, GenerationMixin):
    """A family's language model; to stand before it among the bases."""

    model_class: ClassVar[type[DecoderModel]]

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def moe_layers(self) -> list[SparseBlock]:
        """The sparse blocks, first to last."""
        return [module for module in self.modules() if isinstance(module, SparseBlock)]

    @property
    def shared_networks(self) -> list[FeedForward | None]:
        """Of each sparse layer the network that its experts change, where they do."""
        return [block.changed for block in self.moe_layers]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_routings: bool = False,
        logits_to_keep: int | Tensor = 0,
        neighbour_embeddings: Tensor | None = None,
        neighbour_scores: Tensor | None = None,
        neighbour_mask: Tensor | None = None,
        neighbour_votes: Tensor | None = None,
        question_domain: Tensor | None = None,
        neighbour_keys: Tensor | None = None,
        neighbour_values: Tensor | None = None,
        step_totals: StepTotals | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Predict each next token.

        While training, with labels, the loss holds the routing losses, each times its weight. With
        ``num_items_in_batch`` (which Trainer gives) a micro-batch counts by its share of the step's labels, so that
        the language loss and its gradient do not change with how many micro-batches or ranks a step has; nor do the
        routing losses where ``step_totals`` tells them of the whole step.

        Args:
            input_ids, attention_mask, labels: (B, T) int64; -100 for no label.
            output_router_logits: return each gate's logits, (B*T, E) float32; None means what the configuration says.
            output_routings: return each gate's whole routing, as is always done while training.
            neighbour_embeddings, neighbour_scores, neighbour_mask: (Q, N, R), (Q, N), (Q, N) of Q questions; Q divides
                B and the sequences of one question are consecutive. All or none.
            neighbour_votes: (Q, N, L, E), for gates with expert memory.
            question_domain: (Q,) int64, for the oracle gate and for losses that need it.
            neighbour_keys, neighbour_values: (Q, N, L, A), what ``prepare_neighbours`` makes; ``generate`` does.
            step_totals: what the routing losses are told of the optimiser step, where this batch is a part of it.
            cache, past_key_values: of the tokens before, by the newer and by the older name of transformers.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_routings=output_routings or self.training,
            neighbour_embeddings=neighbour_embeddings,
            neighbour_scores=neighbour_scores,
            neighbour_mask=neighbour_mask,
            neighbour_votes=neighbour_votes,
            question_domain=question_domain,
            neighbour_keys=neighbour_keys,
            neighbour_values=neighbour_values,
            **{_CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )
        logits, loss = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)), None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        # The loss is there from the start, and therefore first where the output is taken for a tuple.
        output = CausalLMOutput(
            loss=loss,
            logits=logits,
            **{name: outputs.get(name) for name in (_CACHE, "hidden_states", "attentions", "router_logits")},
        )
        if "routings" in outputs:
            output.routings = tuple(Routing(*fields) for fields in outputs["routings"])
        if labels is not None and self.training and output.routings and self.config.experts > 1:
            share = _share(labels, kwargs.get("num_items_in_batch"), step_totals)
            mask = _routed(attention_mask, labels)
            self._add_losses(output, loss_inputs(output.routings, mask, question_domain), step_totals, share)
        return output

    def _add_losses(
        self, output: CausalLMOutput, inputs: list[LossInputs], step: StepTotals | None, share: Tensor | float
    ) -> None:
        losses = routing_losses(self.config.loss_weights, inputs, step)
        output.language_loss = loss = cast(Tensor, output.loss)
        for name, weight in self.config.loss_weights.items():
            loss = loss + share * weight * losses[name].to(loss.device)
        output.loss, output.aux_loss, output.further_losses = loss, losses.pop("load_balance", None), losses

    # -- generation -------------------------------------------------------------------------------------------------

    def prepare_neighbours(self, neighbours: Neighbours) -> dict[str, Tensor]:
        """What the gates make of neighbours alone, by the names that ``forward`` takes it; empty where nothing."""
        if not self.gate_sees_neighbours:
            return {}
        made = [gate.prepare(neighbours.to(gate.balance_bias.device)) for gate in self.gates]
        pairs = [pair for pair in made if pair is not None]
        if not pairs:
            return {}
        device = neighbours.mask_BN.device
        keys, values = (torch.stack([x.to(device) for x in side], dim=2) for side in zip(*pairs, strict=True))
        return {"neighbour_keys": keys, "neighbour_values": values}

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        # Called once by generate, before the batch is multiplied by the beams: the place to make once what every step
        # needs. It travels on by argument, as all else that forward takes.
        neighbours = Neighbours.from_tensors(kwargs)
        if neighbours is not None and neighbours.keys_BNLA is None:
            kwargs |= self.prepare_neighbours(neighbours)
        return super()._expand_inputs_for_generation(*args, **kwargs)

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        assistant = kwargs.get("assistant_model")
        kept = self._read_by(assistant) if isinstance(assistant, Decoder) else ()
        given = {k: v for k, v in model_kwargs.items() if k in kept or k not in NEIGHBOUR_ARGUMENTS}
        return super()._get_candidate_generator(*args, model_kwargs=given, **kwargs)

    def _read_by(self, assistant: Decoder) -> tuple[str, ...]:
        """Which of this model's arguments an assistant of ours can read; it makes keys of its own.

        Votes are for this model's experts. A gate that wants some for others is shown no neighbours: what an assistant
        drafts is judged anyway.
        """
        own, other = self.config, assistant.config
        if own.neighbour_width != other.neighbour_width:
            return ()
        read = ("neighbour_embeddings", "neighbour_scores", "neighbour_mask")
        if not any(gate.uses_votes for gate in assistant.gates):
            return read
        alike = (own.experts, len(self.gates)) == (other.experts, len(assistant.gates))
        same = alike and self.expert_names == assistant.expert_names
        return (*read, "neighbour_votes") if same else ()

    # generate asks its signature whether it takes inputs_embeds.
    @wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, without recording what a step has no use for."""
        return {**super().prepare_inputs_for_generation(*args, **kwargs), "output_router_logits": False}


def _routed(mask: Tensor | None, labels: Tensor) -> Tensor:
    """Which tokens of this batch are no padding, (B, T), as far as the attention mask says."""
    if mask is None or mask.ndim != 2:
        return torch.ones_like(labels)
    # Before them it may have what is in the cache, as with a prefix.
    return mask[:, -labels.shape[1] :]


def _share(labels: Tensor, items: Tensor | int | None, step: StepTotals | None) -> Tensor | float:
    """By how much a micro-batch's routing losses count, where the losses of the step's micro-batches are summed up."""
    if items is None:
        # The caller takes the mean.
        return 1.0
    if step is not None:
        return 1.0 / step.parts
    # As Trainer counts them: the first position is predicted by nothing.
    return (labels[..., 1:] != -100).sum() / items


def register_family(config_class: Any, model_class: Any, causal_class: Any, family_type: str) -> None:
    """Make a family known: to the Auto classes, to what loads native checkpoints, and to what records outputs.

    Args:
        family_type: the family's own ``model_type``, whose checkpoints are read as they are.
    """
    model_type = config_class.model_type
    AutoConfig.register(model_type, config_class)
    AutoModel.register(config_class, model_class)
    AutoModelForCausalLM.register(config_class, causal_class)
    # By the names in here Trainer knows whose labels are to be shifted, where it computes the loss itself.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = causal_class.__name__
    register_checkpoint_conversion_mapping(
        model_type,
        [
            *get_checkpoint_conversion_mapping(family_type),
            WeightRenaming(r"mlp\.gate\.weight$", "mlp.gate.inner.token.weight"),
            WeightRenaming(r"mlp\.gate\.e_score_correction_bias$", "mlp.gate.inner.balance_bias"),
        ],
    )
    # All fields of a routing at once, which is a tuple: the losses need more of it than the logits.
    recorded = {"routings": OutputRecorder(Gate, index=slice(None))}
    for known in (model_class, causal_class):
        known._can_record_outputs = {**known._can_record_outputs, **recorded}
