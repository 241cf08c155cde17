"""What a layout costs: memory of training, and what expert parallelism sends.

T positions, D model width, H hidden width, E experts, K experts a token, V outputs of the head.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ragmoe._errors import ModelError
from ragmoe.models.plan.layout import Attention, Layer, Layout

# Bytes of a value, and what AdamW keeps beside weight and gradient in training: two moments in fp32, and in mixed
# precision a copy of the weights in fp32 (Rajbhandari et al. 2020, ZeRO: sixteen bytes a parameter either way).
BYTES = {"fp32": 4, "bf16": 2}
_MASTER = {"fp32": 0, "bf16": 4}
_FFN = ("dense FFN", "shared expert", "experts")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device that holds all of the model.

    Attributes:
        weights: of all parameters.
        gradients, moments, master: of the trained ones; ``master`` is the copy in fp32 beside weights in bf16.
        activations: what backward needs of one batch; ``checkpointed`` the same where each layer is computed again.
    """

    weights: int
    gradients: int
    moments: int
    master: int
    activations: int
    checkpointed: int

    @property
    def training(self) -> int:
        """All of a training step without checkpointing."""
        return self.state + self.activations

    @property
    def training_checkpointed(self) -> int:
        """All of a training step with checkpointing."""
        return self.state + self.checkpointed

    @property
    def state(self) -> int:
        """What stays between steps, and the gradients."""
        return self.weights + self.gradients + self.moments + self.master

    def as_dict(self) -> dict[str, int]:
        """With the sums."""
        sums = {"training": self.training, "training_checkpointed": self.training_checkpointed}
        return {**asdict(self), **sums}


@dataclass(frozen=True)
class Communication:
    """Expert parallelism over N ranks: each holds E / N of the experts of each layer, and all of the rest.

    Attributes:
        ranks, experts_per_rank: N, and E / N.
        parameters_per_rank, weight_bytes_per_rank: of the model.
        forward, backward: bytes that a token sends in one sparse layer, out (dispatch) and back (combine) together.
        per_token: bytes of a token in all sparse layers, forward and backward.
        per_step: bytes that a rank sends for its batch, forward and backward.
    """

    ranks: int
    experts_per_rank: int
    parameters_per_rank: int
    weight_bytes_per_rank: int
    forward: float
    backward: float
    per_token: float
    per_step: float


def memory(layout: Layout, *, trained: int, held: int, tokens: int, dtype: str) -> Memory:
    """Memory of a training step with AdamW.

    Args:
        trained: parameters that the optimiser moves.
        held: all parameters while training, adapters included.
        tokens: of a batch, padding included.
        dtype: ``fp32``, or ``bf16``: weights, gradients and activations in bf16 beside a master copy.
    """
    size = BYTES[dtype]
    return Memory(
        weights=size * held,
        gradients=size * trained,
        moments=8 * trained,
        master=_MASTER[dtype] * trained,
        activations=activation_bytes(layout, tokens, size),
        checkpointed=activation_bytes(layout, tokens, size, checkpointing=True),
    )


def activation_bytes(layout: Layout, tokens: int, size: int = 4, *, checkpointing: bool = False) -> int:
    """An estimate of what backward needs: the values each layer keeps for a token, and the head's.

    A token keeps, in values of ``size`` bytes,

    * of a norm of width W its input and output; of an RMSNorm also what is normalised, and the input in fp32;
    * queries, keys, values and what attention found. The scores are not kept, as in FlashAttention (Dao et al. 2022),
      which torch's own attention follows;
    * 2 H of a feed-forward network, 4 H of a gated one: before and after the activation, and what is multiplied;
    * K (2 D + those 2 H or 4 H) of routed experts, which get a copy of the state and give one back; 3 E of the gate;
    * K (2 D + 2 H) of LoRA experts, which act inside the dense network and leave H of its 2 H to be kept; with a single
      expert a token 2 D + 3 H beside all of it;
    * V of the head, and V more in fp32, its log-softmax.

    With checkpointing each layer keeps its input alone, and one layer at a time the rest (Chen et al. 2016). What
    autograd saves is within 20 % of this in the tests' models. Temporaries, buffers of the allocator and eager
    attention, which keeps the scores, are not in it. After Korthikanti et al. 2022, who count the same for GPT.

    Args:
        tokens: of a batch, padding included.
        size: bytes of a value.
    """
    layers = [_kept(layout, layer, size) for layer in layout.layers]
    if checkpointing:
        layers = [size * layout.width * len(layers) + max(layers, default=0)]
    head = layout.outputs * (size + 4)
    around = sum(_norm(width, plain, size) for width, plain in layout.outside.norms)
    return tokens * (sum(layers) + around + head)


def _kept(layout: Layout, layer: Layer, size: int) -> int:
    """Bytes that a layer keeps for a token."""
    D = layout.width
    values = sum(map(_attended, layer.attention))
    for kind in _FFN:
        sizes = layer.matrices.get(kind)
        if sizes and not (kind == "experts" and layer.routed and layer.routed.inside_dense):
            values += _hidden(sizes, D) * (layer.routed.top_k if kind == "experts" and layer.routed else 1)
    if routed := layer.routed:
        values += 3 * routed.experts + 2 * routed.top_k * D
        if routed.inside_dense:
            hidden = _hidden(layer.matrices["dense FFN"], D)
            values += hidden * 3 // 2 if routed.top_k == 1 else routed.top_k * hidden - hidden // 2
    norms = sum(_norm(width, plain, size) * _heads(width, layer, D) for width, plain in layer.norms)
    return size * values + norms


def _norm(width: int, plain: bool, size: int) -> int:
    return width * (2 * size if plain else 2 * size + 4)


def _heads(width: int, layer: Layer, D: int) -> int:
    """How often a norm is applied to a token: one of a head's width is applied to each head."""
    of_heads = [a for a in layer.attention if width in (a.key_width, a.value_width) and width < D]
    return (of_heads[0].heads + of_heads[0].kv_heads) // 2 if of_heads else 1


def _attended(attention: Attention) -> int:
    a = attention
    return a.heads * (a.key_width + a.value_width) + a.kv_heads * (a.key_width + a.value_width)


def _hidden(sizes: list[int], D: int) -> int:
    """2 H values for two matrices of D by H, 4 H for three, of which two may be one of twice the size."""
    # Without the single row of a new expert that is held apart.
    large = [size for size in sizes if 4 * size >= max(sizes)]
    gated = sum(large) > 2 * min(large)
    return sum(large) * 4 // (3 * D) if gated else sum(large) // D


def communication(layout: Layout, *, ranks: int, tokens: int, dtype: str) -> Communication:
    """What expert parallelism over ``ranks`` sends, each rank with ``tokens`` of its own.

    A token's state goes to each of its K experts and comes back, and (N - 1) / N of them are elsewhere where experts
    are called alike: ``2 K D bytes (N - 1) / N`` a layer forward, and as much backward. Copies for experts of the same
    rank are counted as often as they are sent one by one. Source: Lepikhin et al. 2020 (GShard).

    Raises:
        ModelError: the model has no experts to share out, they lie inside a dense network, or N does not divide E.
    """
    if not layout.routed:
        raise ModelError(f"expert parallelism over {ranks} ranks: the model has no routed experts")
    if any(routed.inside_dense for routed in layout.routed):
        raise ModelError(
            f"expert parallelism over {ranks} ranks: LoRA experts lie inside a dense network and are not sent to",
            hint="plan full ones: model.expert_kind=ffn",
        )
    counts = {routed.experts for routed in layout.routed}
    if uneven := [E for E in sorted(counts) if E % ranks]:
        E = uneven[0]
        fits = [n for n in range(1, E + 1) if all(other % n == 0 for other in counts)]
        raise ModelError(
            f"{E} experts cannot be shared out over {ranks} ranks; numbers of ranks that fit: "
            f"{', '.join(map(str, fits))}"
        )
    size, away = BYTES[dtype], (ranks - 1) / ranks
    sent = [2 * routed.top_k * layout.width * size * away for routed in layout.routed]
    elsewhere = sum(routed.parameters // ranks * (ranks - 1) for routed in layout.routed)
    held = layout.total - elsewhere
    return Communication(
        ranks=ranks,
        experts_per_rank=layout.routed[0].experts // ranks,
        parameters_per_rank=held,
        weight_bytes_per_rank=size * held,
        forward=sent[0],
        backward=sent[0],
        per_token=2 * sum(sent),
        per_step=2 * sum(sent) * tokens,
    )
