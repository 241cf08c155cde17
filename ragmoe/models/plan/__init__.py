"""What a model would cost, before it is there: parameters, FLOPs, memory, communication.

    plan("eval/experiments/halvern.yaml").parameters["active"]
    plan({"model_type": "deepseek_v3", "n_routed_experts": 384}, dtype="bf16", expert_parallel=64)

The model is made on the meta device, which keeps shapes and no values: exact counts, also of a trillion parameters, in
seconds and without their memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ragmoe._errors import ModelError, UsageError
from ragmoe.models.plan.costs import BYTES, Communication, Memory, activation_bytes, communication, memory
from ragmoe.models.plan.layout import Layout
from ragmoe.models.plan.reading import read_layout
from ragmoe.models.plan.source import Planned, Source, build_on_meta, known_types, read_source

_USUAL_LENGTH = 2048


@dataclass(frozen=True)
class Flops:
    """FLOPs, two for a multiplication and an addition, of matrix products alone.

    ``forward = 2 x (elements of the matrices a token is multiplied by) + attention scores``: active parameters without
    embeddings, norms and biases, the head included, and of E experts K. Attention over T positions adds
    ``2 T heads (key width + value width)`` a layer, without sparing what a causal mask hides; a window counts as its
    width. Sources: Kaplan et al. 2020, section 2.1; Hoffmann et al. 2022, appendix F, without its embeddings and
    softmax. A backward is two forwards: one matrix product each for the gradients of state and weight.

    Attributes:
        by_kind: of the forward of one token.
        forward: their sum.
        backward: twice that, as if everything is trained; recomputing (checkpointing) adds one forward.
        per_sequence: what is applied once a sequence, such as a pooler; not in ``forward``.
        per_question: what gates make of a question's neighbours, once a question; not in ``forward``.
    """

    by_kind: dict[str, int]
    forward: int
    backward: int
    per_sequence: int
    per_question: int


@dataclass(frozen=True)
class Plan:
    """What a model would cost.

    Attributes:
        source: what was asked about.
        model_type, layers, width, sparse_layers: of the model; the last is how many layers have experts.
        experts, top_k: E and K of its sparse layers, where it has any.
        parameters: total, active (used for one token, gates included) and trained.
        parameters_by_kind: total, by kind.
        batch, length, dtype: sequences and tokens of a training batch, ``fp32`` or ``bf16``.
        notes: what was assumed, and what is not in the figures.
    """

    source: str
    model_type: str
    layers: int
    width: int
    sparse_layers: int
    experts: int | None
    top_k: int | None
    parameters: dict[str, int]
    parameters_by_kind: dict[str, int]
    batch: int
    length: int
    dtype: str
    flops: Flops
    memory: Memory
    communication: Communication | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "memory": self.memory.as_dict()}


def plan(
    source: Source,
    overrides: Sequence[str] = (),
    *,
    batch: int | None = None,
    length: int | None = None,
    dtype: str | None = None,
    expert_parallel: int | None = None,
) -> Plan:
    """Count what a model would cost, without its weights.

    Args:
        source: a training file; a bundle, or ``starter``; a folder with a ``config.json``, or such a file; a YAML file
            or a mapping with a ``model_type`` and its fields.
        overrides: ``key=value``: keys of a training file, or fields of the model.
        batch, length: sequences and tokens of a training batch; None means as the source says, or one of at most 2048.
        dtype: ``fp32`` or ``bf16``; None means as the source says.
        expert_parallel: over how many ranks the experts are shared out; a batch is then that of each rank.

    Raises:
        ConfigError, ModelError: there is no such configuration, or no such model.
        UsageError: an argument or an override is off.
    """
    if dtype is not None and dtype not in BYTES:
        raise UsageError(f"dtype is {dtype!r}: expected {' or '.join(BYTES)}")
    for name, value in (("batch", batch), ("length", length), ("expert-parallel", expert_parallel)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: expected at least 1")
    planned = read_source(source, overrides)
    model = build_on_meta(planned.config)
    layout = _layout(model)
    batch, dtype = batch or planned.batch, dtype or planned.dtype
    length = _checked_length(model, length or planned.length)
    # Last, because adapters for training change the model.
    held, trained = planned.counts(model) if planned.counts else (layout.total, layout.total)
    tokens = batch * length
    sent = communication(layout, ranks=expert_parallel, tokens=tokens, dtype=dtype) if expert_parallel else None
    first = layout.routed[0] if layout.routed else None
    return Plan(
        source=planned.name,
        model_type=planned.config.model_type,
        layers=len(layout.layers),
        width=layout.width,
        sparse_layers=len(layout.routed),
        experts=first.experts if first else None,
        top_k=first.top_k if first else None,
        parameters={"total": layout.total, "active": layout.active, "trained": trained},
        parameters_by_kind=layout.parameters,
        batch=batch,
        length=length,
        dtype=dtype,
        flops=_flops(layout, length),
        memory=memory(layout, trained=trained, held=held, tokens=tokens, dtype=dtype),
        communication=sent,
        notes=(*planned.notes, *layout.notes),
    )


def _layout(model: Any) -> Layout:
    """The layout of a model that may be of any family of transformers."""
    try:
        return read_layout(model)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ModelError(f"the modules of {model.config.model_type!r} cannot be read: {error}") from error


def _flops(layout: Layout, length: int) -> Flops:
    by_kind = layout.flops(length)
    forward = sum(by_kind.values())
    return Flops(by_kind, forward, 2 * forward, layout.per_sequence, layout.per_question)


def _checked_length(model: Any, length: int | None) -> int:
    """The length, where the model has so many positions."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if length is None:
        return min(_USUAL_LENGTH, positions or _USUAL_LENGTH)
    # Learned positions end; computed ones (rotary) do not.
    if positions and length > positions and not hasattr(config, "rope_parameters"):
        raise ModelError(f"a sequence of {length} tokens is longer than the {positions} positions of the model")
    return length


__all__ = [
    "Communication",
    "Flops",
    "Layout",
    "Memory",
    "Plan",
    "Planned",
    "activation_bytes",
    "build_on_meta",
    "known_types",
    "plan",
    "read_layout",
]
