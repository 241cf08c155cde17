"""BERT-family encoders whose feed-forward networks are mixtures of experts, with a question-answering head.

    model = RagmoeBertForQuestionAnswering.from_dense("path/to/bert", gate="retrieval", experts=8)

This file holds the network. Its configuration is in config.py, what a user calls on it (read, answer, route) in
reading.py, saving in saving.py, how a dense checkpoint becomes one in upcycling.py.

B questions, M passages a question, Q = B*M sequences, T positions, D width, N neighbours, R encoder width, E experts.
A sequence's candidates are C = 4 + T: "no answer here", yes, no, maybe, and each of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import ModelOutput
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertPreTrainedModel

from ragmoe._errors import ModelError
from ragmoe.experts import FeedForward
from ragmoe.gates import Routing, Tokens
from ragmoe.models.attention import RoutedSelfAttention
from ragmoe.models.availability import AvailabilityMixin
from ragmoe.models.config import OWN_WEIGHTS, SPECIAL_CANDIDATES, RagmoeBertConfig
from ragmoe.models.loss import answer_loss, asked_of_layers, routing_losses
from ragmoe.models.reading import ReaderMixin
from ragmoe.models.sparse import SparseModel
from ragmoe.models.upcycling import copy_dense, dense_source, upcycled_config
from ragmoe.moe import MoELayer, NeighbourSummary, StepTotals
from ragmoe.moe.losses import LossInputs, loss_inputs
from ragmoe.moe.probe import Asked
from ragmoe.neighbours import Neighbours


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """What the reader returns.

    Attributes:
        loss: answer loss plus weighted routing losses, where labels were given.
        answer_loss, balance_loss, z_loss: its parts, unweighted; the routing losses are means over sparse layers.
        further_losses: those of the configuration's ``losses`` by name, unweighted; while training, with labels.
        start_logits, end_logits: (Q, 4 + T), -inf-like where a token cannot be an answer.
        routings: one for each sparse layer.
        hidden_states: of the embeddings and each layer, (Q, T, D) each, where asked for.
    """

    loss: Tensor | None = None
    answer_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    further_losses: dict[str, Tensor] | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    routings: tuple[Routing, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class EncoderOutput(ModelOutput):
    """What the encoder returns.

    Attributes:
        last_hidden_state: (Q, T, D).
        hidden_states: of the embeddings and each layer, (Q, T, D) each.
        routings: one for each sparse layer.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routings: tuple[Routing, ...] | None = None


class RagmoeBertLayer(BertLayer):
    """A BERT layer that is sparse where the configuration says so, and takes the neighbours by argument."""

    def __init__(self, config: RagmoeBertConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.moe: MoELayer | None = None
        self.summary: NeighbourSummary | None = None
        if layer_idx in (sparse := config.resolved_sparse_layers()):
            self.moe = MoELayer(config, sparse.index(layer_idx))
            if config.neighbour_summary:
                self.summary = NeighbourSummary(config.hidden_size, config.neighbour_width, config.gate_width)
            if config.moe_attention:
                self.attention.self = RoutedSelfAttention(config, layer_idx=layer_idx)
            if not (self.moe.experts.needs_dense or config.shared_expert):
                self.intermediate = None
                self.output.dense = None

    @property
    def dense(self) -> FeedForward | None:
        """The feed-forward network every token runs through, where the layer has one."""
        if self.intermediate is None:
            return None
        return FeedForward(self.intermediate.dense, self.intermediate.intermediate_act_fn, self.output.dense)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        neighbours: Neighbours | None = None,
        tokens: Tokens | None = None,
        asked: Asked | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """One layer: states (Q, T, D), and its routing where it is sparse."""
        routing, added = None, {}
        if self.moe is not None and self.moe.experts.key_value is not None:
            routing = self.moe.route(hidden_states, neighbours, tokens)
            added = {"key_values": self.moe.key_values(hidden_states, routing)}
        attended_QTD, _ = self.attention(hidden_states, attention_mask, **added)
        if self.summary is not None:
            attended_QTD = self.summary(attended_QTD, neighbours)
        if self.moe is None:
            y_QTD = cast(FeedForward, self.dense)(attended_QTD)
        else:
            routed_QTD = None if routing is None else hidden_states
            y_QTD, routing = self.moe(attended_QTD, self.dense, neighbours, tokens, routing, asked, routed_QTD)
        return self.output.LayerNorm(self.output.dropout(y_QTD) + attended_QTD), routing


class RagmoeBertEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: RagmoeBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(RagmoeBertLayer(config, i) for i in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        neighbours: Neighbours | None,
        tokens: Tokens | None = None,
        asked: Asked | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Routing, ...]]:
        states, routings = [hidden_states], []
        for layer in self.layer:
            hidden_states, routing = layer(hidden_states, attention_mask, neighbours, tokens, asked)
            states.append(hidden_states)
            if routing is not None:
                routings.append(routing)
        return tuple(states), tuple(routings)


class RagmoeBertPreTrainedModel(SparseModel, BertPreTrainedModel):
    """Loading, saving and initialisation shared by the models of this file."""

    config_class = RagmoeBertConfig
    config: RagmoeBertConfig
    _no_split_modules: ClassVar[list[str]] = ["BertEmbeddings", "RagmoeBertLayer"]
    # The base class records outputs by hooks on BertLayer; ours are returned by the layers themselves.
    _can_record_outputs: ClassVar[dict[str, Any]] = {}
    # The loss is the mean of a batch; of a forward that takes any keyword Trainer would think that it is divided by
    # num_items_in_batch already.
    accepts_loss_kwargs = False


class RagmoeBertModel(RagmoeBertPreTrainedModel):
    """The encoder without a head."""

    def __init__(self, config: RagmoeBertConfig) -> None:
        super().__init__(config)
        config.check()
        self.embeddings = BertEmbeddings(config)
        self.encoder = RagmoeBertEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        neighbour_embeddings: Tensor | None = None,
        neighbour_scores: Tensor | None = None,
        neighbour_mask: Tensor | None = None,
        neighbour_votes: Tensor | None = None,
        question_domain: Tensor | None = None,
        asked: Asked | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The hidden states, which are always all returned, and the routings of the sparse layers.

        The arguments are those of ``RagmoeBertForQuestionAnswering.forward``; ``asked``: what losses ask of the layers.
        """
        _refuse_attentions(output_attentions)
        neighbours = None
        if self.gate_sees_neighbours:
            neighbours = Neighbours.from_tensors(
                {
                    "neighbour_embeddings": neighbour_embeddings,
                    "neighbour_scores": neighbour_scores,
                    "neighbour_mask": neighbour_mask,
                    "neighbour_votes": neighbour_votes,
                    "question_domain": question_domain,
                }
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        x_QTD = self.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        if neighbours is not None:
            neighbours.require_sequences(x_QTD.shape[0])
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x_QTD, attention_mask=attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones(x_QTD.shape[:2], device=x_QTD.device)
        tokens = Tokens(attention_mask.bool(), token_type_ids)
        states, routings = self.encoder(x_QTD, mask, neighbours, tokens, asked)
        return _as_asked(EncoderOutput(states[-1], states, routings), return_dict)


class RagmoeBertForQuestionAnswering(AvailabilityMixin, ReaderMixin, RagmoeBertPreTrainedModel):
    """Extractive reader: a span, yes, no, maybe, or that the passage holds no answer."""

    def __init__(self, config: RagmoeBertConfig) -> None:
        super().__init__(config)
        self.bert = RagmoeBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.special_outputs = nn.Linear(config.hidden_size, len(SPECIAL_CANDIDATES))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        neighbour_embeddings: Tensor | None = None,
        neighbour_scores: Tensor | None = None,
        neighbour_mask: Tensor | None = None,
        neighbour_votes: Tensor | None = None,
        question_domain: Tensor | None = None,
        context_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        step_totals: StepTotals | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Read Q sequences.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (Q, T).
            neighbour_embeddings, neighbour_scores, neighbour_mask: (B, N, R), (B, N), (B, N); B divides Q and the
                sequences of one question are consecutive. All or none.
            neighbour_votes: (B, N, L, E), for gates with expert memory.
            question_domain: (B,) int64, for the oracle gate and for losses that need it.
            context_mask: (Q, T) bool, the tokens that may be answers; without it, those of the second segment.
            start_positions, end_positions: (B, M) int64, the candidate that is right in each of a question's M
                sequences: 0 no answer here, 1 yes, 2 no, 3 maybe, 4 + t token t.
            step_totals: what the routing losses are told of the optimiser step, where this batch is a part of it.
            return_dict: False returns a tuple of what there is, in the order of ``QuestionAnsweringOutput``.

        Raises:
            ModelError: ``output_attentions`` are asked for, which the fast kernels do not have.
        """
        wanted = self.training and start_positions is not None
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            inputs_embeds,
            neighbour_embeddings,
            neighbour_scores,
            neighbour_mask,
            neighbour_votes,
            question_domain,
            asked_of_layers(self.config, step_totals) if wanted else None,
            position_ids=position_ids,
            output_attentions=output_attentions,
        )
        x_QTD, routings = encoded.last_hidden_state, encoded.routings
        if attention_mask is None:
            attention_mask = torch.ones(x_QTD.shape[:2], dtype=torch.long, device=x_QTD.device)
        if context_mask is None:
            context_mask = attention_mask if token_type_ids is None else attention_mask * (token_type_ids == 1)
        start_QC, end_QC = self._candidates(x_QTD, context_mask.bool())
        answer = None
        if start_positions is not None and end_positions is not None:
            answer = answer_loss(start_QC, end_QC, start_positions, end_positions)
        output = QuestionAnsweringOutput(
            **self._losses(answer, loss_inputs(routings, attention_mask, question_domain), step_totals),
            start_logits=start_QC,
            end_logits=end_QC,
            routings=routings,
            hidden_states=encoded.hidden_states if output_hidden_states else None,
        )
        return _as_asked(output, return_dict)

    def _losses(self, answer: Tensor | None, inputs: Sequence[LossInputs], step: StepTotals | None) -> dict[str, Any]:
        """The losses by name, as far as they can be told; ``inputs`` are of the sparse layers."""
        config = self.config
        own = routing_losses(OWN_WEIGHTS, inputs, step)
        losses: dict[str, Any] = {OWN_WEIGHTS[name]: value for name, value in own.items()}
        if answer is None:
            return losses
        loss = answer
        if losses and config.experts > 1:
            loss = loss + config.balance_loss * losses["balance_loss"] + config.z_loss * losses["z_loss"]
            if config.losses and self.training:
                losses["further_losses"] = further = routing_losses(config.losses, inputs, step)
                loss = loss + sum(config.losses[name] * x for name, x in further.items() if config.losses[name])
        return {"loss": loss, "answer_loss": answer, **losses}

    def _candidates(self, x_QTD: Tensor, context_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end logits (Q, C) in float32."""
        special_Q4 = self.special_outputs(x_QTD[:, 0]).float()
        both_QT2 = self.qa_outputs(x_QTD).float()
        both_QT2 = both_QT2.masked_fill(~context_mask.unsqueeze(-1), torch.finfo(torch.float32).min)
        # "no", "yes" and "maybe" begin and end with themselves, so half of their score stands on either side.
        start_QC = torch.cat([special_Q4, both_QT2[..., 0]], dim=1)
        end_QC = torch.cat([special_Q4, both_QT2[..., 1]], dim=1)
        return start_QC, end_QC

    # -- the sparse layers ------------------------------------------------------------------------------------------

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, first to last."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    @property
    def shared_networks(self) -> list[FeedForward | None]:
        """Of each sparse layer the network that every token runs through, where it has one."""
        layers = cast(list[RagmoeBertLayer], list(self.bert.encoder.layer))
        return [layers[i].dense for i in self.sparse_layers]

    # -- upcycling --------------------------------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls,
        base: str | Path | RagmoeBertForQuestionAnswering,
        *,
        expert_noise: float = 0.0,
        seed: int = 0,
        **settings: Any,
    ) -> RagmoeBertForQuestionAnswering:
        """Upcycle a dense BERT: its feed-forward networks become experts.

        At step 0 the encoder's output equals the dense model's: exactly for LoRA experts, within 1e-5 for copies.
        Source: Komatsuzaki et al. 2022 (sparse upcycling).

        Args:
            base: path or Hub id of a checkpoint of model type ``bert``, whose head starts untrained; or a reader
                without sparse layers, whose head is kept.
            expert_noise: standard deviation, relative to each matrix's own, of the noise that tells copies apart.
            settings: fields of ``RagmoeBertConfig``.

        Raises:
            ModelError: when there is no such checkpoint, it is of another model type or lacks weights, or for settings
                that do not exist or contradict each other.
        """
        dense_config, dense = dense_source(base)
        config = upcycled_config(dense_config, settings)
        config.architectures = [cls.__name__]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config)
        if isinstance(base, RagmoeBertForQuestionAnswering):
            model.qa_outputs.load_state_dict(base.qa_outputs.state_dict())
            model.special_outputs.load_state_dict(base.special_outputs.state_dict())
        copy_dense(model.bert, dense, noise=expert_noise, generator=torch.Generator().manual_seed(seed))
        return model


def _as_asked(output: ModelOutput, return_dict: bool | None) -> Any:
    return output.to_tuple() if return_dict is False else output


def _refuse_attentions(output_attentions: bool | None) -> None:
    if output_attentions:
        raise ModelError("output_attentions is true: expected false, the attention kernels return no weights")


AutoConfig.register("ragmoe_bert", RagmoeBertConfig)
AutoModel.register(RagmoeBertConfig, RagmoeBertModel)
AutoModelForQuestionAnswering.register(RagmoeBertConfig, RagmoeBertForQuestionAnswering)
