"""Small causal language models built of the same parts: Switch-style, GShard-style and Mixtral-style.

    model = MoEDecoder(switch_style(vocab_size=256, width=64, layers=4, experts=8))
    loss = model(input_ids, labels=input_ids).loss

They are for experiments from scratch and for tests of the parts; checkpoints of other families are not read here.
B sequences, T positions, D width, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ragmoe._errors import ConfigError
from ragmoe.experts import AUTO, Experts, FeedForward
from ragmoe.gates import Gate, Routing, Selection, Tokens, gate_class, selection_class
from ragmoe.models.loss import routing_losses
from ragmoe.moe import MoELayer, routing_loss
from ragmoe.moe.capacity import priority_class
from ragmoe.moe.losses import loss_inputs
from ragmoe.neighbours import Neighbours


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and routing of a decoder; the routing fields are those of ``RagmoeBertConfig``.

    Attributes:
        intermediate_size: H, of dense networks and of each expert.
        sparse_layers: which layers are sparse; None means every second one, beginning with the second.
        dense_beside: sparse layers keep a dense network beside their experts (a shared expert).
        norm: ``layer`` or ``rms``.
        rotary: positions by rotating queries and keys; else by a learned embedding of each position.
        positions: T at most.
        losses: routing losses by name, with their weights (``ragmoe losses ls`` shows the names).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    experts: int = 8
    top_k: int = 2
    expert_kind: str = "ffn"
    expert_rank: int = 16
    sparse_layers: tuple[int, ...] | None = None
    dense_beside: bool = False
    norm: str = "layer"
    rotary: bool = False
    positions: int = 512
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    gate: str = "token"
    gate_width: int = 64
    neighbour_width: int = 384
    scores: str = "softmax"
    selection: str = "top_k"
    normalise_weights: bool | None = None
    weight_scale: float = 1.0
    gate_noise: float = 0.0
    gate_jitter: float = 0.0
    token_dropout: float = 0.0
    common_experts: int = 0
    vote_start: float = 0.0
    expert_groups: int = 1
    expert_types: tuple[int, ...] | None = None
    capacity_factor: float | None = None
    overflow: str = "drop"
    overflow_priority: str = "position"
    moe_attention: bool = False
    losses: Mapping[str, float] = field(default_factory=lambda: {"load_balance": 0.01})
    _experts_implementation: str = AUTO

    @property
    def shared_expert(self) -> bool:
        """Whether full experts stand beside a dense network."""
        return self.dense_beside

    def resolved_sparse_layers(self) -> list[int]:
        """The sparse layers, checked."""
        if self.sparse_layers is None:
            return list(range(1, self.num_hidden_layers, 2))
        if wrong := [i for i in self.sparse_layers if not 0 <= i < self.num_hidden_layers]:
            raise ConfigError(f"sparse_layers has {wrong}, but the layers are 0 to {self.num_hidden_layers - 1}")
        return sorted(set(self.sparse_layers))


def switch_style(*, vocab_size: int, width: int, layers: int, experts: int, **changes: Any) -> DecoderConfig:
    """One expert a token, of limited capacity, in every second layer; jitter; load balance (Fedus et al. 2021)."""
    style = DecoderConfig(
        vocab_size, width, layers, max(1, width // 32), 4 * width, experts=experts, top_k=1, hidden_act="relu",
        normalise_weights=False, gate_jitter=0.01, capacity_factor=1.25, overflow="drop",
    )  # fmt: skip
    return replace(style, **changes)


def gshard_style(*, vocab_size: int, width: int, layers: int, experts: int, **changes: Any) -> DecoderConfig:
    """Two experts a token, of capacity two shares, in every second layer (Lepikhin et al. 2020)."""
    style = DecoderConfig(
        vocab_size, width, layers, max(1, width // 32), 4 * width, experts=experts, top_k=2, hidden_act="relu",
        capacity_factor=2.0, overflow="drop",
        # Its loss is 1/E**2 where all is balanced, and Switch's is one.
        losses={"gshard": 0.01 * experts**2},
    )  # fmt: skip
    return replace(style, **changes)


def mixtral_style(*, vocab_size: int, width: int, layers: int, experts: int, **changes: Any) -> DecoderConfig:
    """Two gated experts a token in every layer, without a limit; rotary positions, RMS norms (Jiang et al. 2024)."""
    style = DecoderConfig(
        vocab_size, width, layers, max(1, width // 32), 2 * width, experts=experts, top_k=2, expert_kind="glu",
        sparse_layers=tuple(range(layers)), norm="rms", rotary=True, hidden_act="silu",
    )  # fmt: skip
    return replace(style, **changes)


@dataclass
class DecoderOutput:
    """Logits (B, T, V), the loss where labels were given, its parts, and the routing of each sparse layer."""

    logits: Tensor
    routings: tuple[Routing, ...]
    loss: Tensor | None = None
    language_loss: Tensor | None = None
    routing_losses: Mapping[str, Tensor] = field(default_factory=dict)


class CausalSelfAttention(nn.Module):
    """Attention to earlier positions, to whose keys and values a layer's experts may add."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        D = config.hidden_size
        if D % config.num_attention_heads:
            raise ConfigError(f"the width {D} cannot be shared out over {config.num_attention_heads} heads")
        self.heads, self.rotary = config.num_attention_heads, config.rotary
        self.query_key_value = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor, key_values: Tensor | None = None) -> Tensor:
        B, T, D = x_BTD.shape
        query, both = self.query_key_value(x_BTD).split([D, 2 * D], dim=-1)
        key, value = (both if key_values is None else both + key_values).chunk(2, dim=-1)
        query, key, value = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in (query, key, value))
        if self.rotary:
            query, key = rotate(query), rotate(key)
        seen = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).tril() & mask_BT[:, None, None, :]
        # Padding on the left sees nothing at all, which would be NaN: it may see itself.
        seen = seen | torch.eye(T, dtype=torch.bool, device=x_BTD.device)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.out(found.transpose(1, 2).reshape(B, T, D))


def rotate(x: Tensor) -> Tensor:
    """Queries or keys (..., T, width) turned by their position, halves against each other (Su et al. 2021)."""
    T, width = x.shape[-2:]
    rate = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angle = torch.arange(T, device=x.device).unsqueeze(1) * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class MoEBlock(nn.Module):
    """A transformer block: attention and a feed-forward network, either dense or sparse, each behind a norm.

    With ``moe_attention`` a sparse block routes once, by what attention is given, for both of its halves.
    """

    NORMS: ClassVar[dict[str, Callable[[int], nn.Module]]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        if config.norm not in self.NORMS:
            raise ConfigError(f"there is no norm {config.norm!r}; there are: {', '.join(self.NORMS)}")
        D, H, sparse = config.hidden_size, config.intermediate_size, config.resolved_sparse_layers()
        self.attention_norm, self.norm = (self.NORMS[config.norm](D) for _ in range(2))
        self.attention = CausalSelfAttention(config)
        self.moe = MoELayer(config, sparse.index(layer)) if layer in sparse else None
        keeps = self.moe is None or self.moe.experts.needs_dense or config.dense_beside
        self.up = nn.Linear(D, H) if keeps else None
        self.down = nn.Linear(H, D) if keeps else None
        self.act = ACT2FN[config.hidden_act]

    @property
    def dense(self) -> FeedForward | None:
        """The network that every token runs through, where the block has one."""
        return None if self.up is None or self.down is None else FeedForward(self.up, self.act, self.down)

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, neighbours: Neighbours | None = None
    ) -> tuple[Tensor, Routing | None]:
        """States of the next block, and the routing where this one is sparse."""
        h_BTD, routing, added = self.attention_norm(x_BTD), None, None
        if self.moe is not None and self.moe.experts.key_value is not None:
            routing = self.moe.route(h_BTD, neighbours, tokens)
            added = self.moe.key_values(h_BTD, routing)
        x_BTD = x_BTD + self.attention(h_BTD, tokens.mask_BT, added)
        h_BTD, dense = self.norm(x_BTD), self.dense
        if self.moe is not None:
            y_BTD, routing = self.moe(h_BTD, dense, neighbours, tokens, routing)
        else:
            assert dense is not None
            y_BTD = dense(h_BTD)
        return x_BTD + y_BTD, routing


class MoEDecoder(nn.Module):
    """A causal language model of ``MoEBlock``s, with its embedding as its head.

    Where capacity is limited and a token has several experts, its second choice waits for the first choices of the
    tokens after it, as in GShard, and the room grows with the text: such a model is not quite causal, and its losses
    are to be compared with those of its like alone.

    Raises:
        ConfigError: for a gate, a selection or an order of overflow that lets a token's experts depend on later tokens,
            or a loss that needs more than the routing.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        for field_name, name, known in (
            ("selection", config.selection, selection_class(config.selection)),
            ("gate", config.gate, gate_class(config.gate)),
            ("overflow_priority", config.overflow_priority, priority_class(config.overflow_priority)),
        ):
            if not known.is_causal:
                raise ConfigError(
                    f"the {field_name.replace('_', ' ')} {name!r} lets a token's experts depend on tokens after it: "
                    "not for a causal decoder",
                    hint="selection=top_k, gate=token, overflow_priority=position",
                )
        for name in config.losses:
            loss = routing_loss(name)
            if loss.needs_domain or loss.needs_swapped or loss.needs_outputs:
                raise ConfigError(f"the loss {name!r} needs more than the routing, which is all that a decoder has")
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = None if config.rotary else nn.Embedding(config.positions, config.hidden_size)
        self.blocks = nn.ModuleList(MoEBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = MoEBlock.NORMS[config.norm](config.hidden_size)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, Gate | Selection | Experts):
            module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        neighbours: Neighbours | None = None,
    ) -> DecoderOutput:
        """Predict each next token.

        Args:
            input_ids: (B, T) int64; attention_mask likewise, 0 for padding; labels likewise, -100 for none.
            neighbours: of as many questions as divide B, for gates that see them.

        Raises:
            ConfigError: T is more than ``positions`` where these are learned.
        """
        mask_BT = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        x_BTD, routings = self.embedding(input_ids), []
        if self.position is not None:
            if input_ids.shape[1] > self.config.positions:
                raise ConfigError(f"{input_ids.shape[1]} positions, but the model knows {self.config.positions}")
            x_BTD = x_BTD + self.position((mask_BT.cumsum(dim=1) - 1).clamp(min=0))
        for block in self.blocks:
            x_BTD, routing = block(x_BTD, Tokens(mask_BT), neighbours)
            if routing is not None:
                routings.append(routing)
        output = DecoderOutput(F.linear(self.norm(x_BTD), self.embedding.weight), tuple(routings))
        if labels is not None:
            # Where padding is on the left, its last position would predict the first word out of nothing.
            known_BT = mask_BT & torch.roll(mask_BT, 1, dims=1)
            self._add_losses(output, labels.masked_fill(~known_BT, -100), mask_BT.reshape(-1))
        return output

    def _add_losses(self, output: DecoderOutput, labels: Tensor, mask_S: Tensor) -> None:
        predicted = output.logits[:, :-1].float().flatten(0, 1)
        output.loss = output.language_loss = F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=-100)
        if output.routings:
            inputs = loss_inputs(output.routings, mask_S, None)
            output.routing_losses = routing_losses(self.config.losses, inputs, None)
            for name, value in output.routing_losses.items():
                output.loss = output.loss + self.config.losses[name] * value
