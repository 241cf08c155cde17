"""Another gate for a trained reader whose experts stay, as a retrieval gate in the place of a token gate."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ragmoe._errors import ModelError
from ragmoe.models.bert import RagmoeBertForQuestionAnswering

# Fields of the configuration that make the gate, and leave every other shape as it is.
GATE_FIELDS = {
    "gate", "gate_width", "top_k", "common_experts", "vote_start", "scores", "selection", "weight_scale",
    "expert_groups", "expert_types",
}  # fmt: skip


@torch.no_grad()
def exchange_gate(
    model: RagmoeBertForQuestionAnswering, *, seed: int = 0, **settings: Any
) -> RagmoeBertForQuestionAnswering:
    """The same reader with another gate in every sparse layer.

    What both gates have, by name and shape, is kept: a retrieval gate in the place of a token gate starts as that token
    gate, bit for bit. The rest starts untrained, drawn by ``seed``; so does the scale of votes where ``vote_start`` is
    given.

    Args:
        settings: of ``GATE_FIELDS``; what is not given stays.

    Raises:
        ModelError: another setting was given, or the model has no gates.
        ConfigError: there is no such gate, or it takes no such settings.
    """
    if unknown := sorted(settings.keys() - GATE_FIELDS):
        raise ModelError(
            f"{unknown[0]!r} is not the gate's alone; an exchange may set {', '.join(sorted(GATE_FIELDS))}"
        )
    if not model.sparse_layers:
        raise ModelError("the model is dense: it has no gate to exchange")
    model._must_be_whole("given another gate")
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = RagmoeBertForQuestionAnswering(config)
    own, kept = built.state_dict(), model.state_dict()
    if "vote_start" in settings:
        kept = {name: x for name, x in kept.items() if not name.endswith(".vote_scale")}
    built.load_state_dict({name: kept[name] if _fits(kept, name, x) else x for name, x in own.items()})
    # As it is: it may not have been opened yet, or not be there.
    built.tokenizer = getattr(model, "_tokenizer", None)
    built.name_or_path, built.bundle_digests = model.name_or_path, model.bundle_digests
    parameter = next(model.parameters())
    built = built.to(parameter.device, parameter.dtype).train(model.training)
    built.set_available_experts([at for at in range(config.experts) if at not in model.held_back])
    return built


def _fits(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> bool:
    return name in state and state[name].shape == x.shape
