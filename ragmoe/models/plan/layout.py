"""What a model consists of, as far as its cost goes: parameters by kind, multiplications, attention, experts.

T positions, D model width, E experts, K experts a token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# What a parameter can be; the order is that of tables.
KINDS = ("embedding", "attention", "gate", "experts", "shared expert", "dense FFN", "norm", "head", "other")


@dataclass(frozen=True)
class Attention:
    """Attention of T positions over each other.

    Attributes:
        heads, kv_heads: of queries, and of keys and values.
        key_width, value_width: of one head.
        window: how many positions are seen at most; None means all.
    """

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    window: int | None = None

    def flops(self, length: int) -> int:
        """Of one token over ``length`` positions: scores, and the mean of the values. A causal mask saves nothing."""
        seen = length if self.window is None else min(length, self.window)
        return 2 * seen * self.heads * (self.key_width + self.value_width)


@dataclass(frozen=True)
class Routed:
    """The routed experts of one layer.

    Attributes:
        experts, top_k: E and K.
        parameters: of all E.
        inside_dense: whether they are deltas inside a dense network, and not networks of their own.
    """

    experts: int
    top_k: int
    parameters: int
    inside_dense: bool = False


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        parameters: by kind.
        flops: a token, by kind, matrix products alone; of the routed experts those of K.
        matrices: numbers of elements of the matrices of each feed-forward kind; of the routed experts those of one.
        norms: widths of the norms, and whether each is a LayerNorm (which keeps less for backward than an RMSNorm).
        once: FLOPs a question, for what is made of its neighbours.
    """

    parameters: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    matrices: dict[str, list[int]] = field(default_factory=dict)
    norms: list[tuple[int, bool]] = field(default_factory=list)
    attention: tuple[Attention, ...] = ()
    routed: Routed | None = None
    once: int = 0


@dataclass(frozen=True)
class Layout:
    """A model: its layers, and what stands around them.

    Attributes:
        width: D.
        outside: what is in no layer: embeddings, the last norm, the head.
        outputs: how many values the head gives a token.
        per_sequence: FLOPs of what is applied once a sequence.
        notes: what of the model is not in the figures.
    """

    width: int
    layers: tuple[Layer, ...]
    outside: Layer
    outputs: int
    per_sequence: int
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, int]:
        """By kind, in the order of ``KINDS``."""
        whole = sum((layer.parameters for layer in (self.outside, *self.layers)), Counter())
        return {kind: whole[kind] for kind in KINDS if whole[kind]}

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def active(self) -> int:
        """Every parameter used for one token, gates included: all but E - K of the routed experts of each layer."""
        return self.total - sum(r.parameters - r.parameters * r.top_k // r.experts for r in self.routed)

    @property
    def routed(self) -> list[Routed]:
        """The routed experts, one entry a sparse layer."""
        return [layer.routed for layer in self.layers if layer.routed]

    @property
    def per_question(self) -> int:
        """FLOPs of what is made of a question's neighbours, once a question."""
        return sum(layer.once for layer in self.layers)

    def flops(self, length: int) -> dict[str, int]:
        """Of one token's forward in a sequence of ``length``, by kind, with attention's scores apart."""
        whole = sum((layer.flops for layer in (self.outside, *self.layers)), Counter())
        found = {kind: whole[kind] for kind in KINDS if whole[kind]}
        scores = sum(attention.flops(length) for layer in self.layers for attention in layer.attention)
        return {**found, "attention scores": scores} if scores else found
