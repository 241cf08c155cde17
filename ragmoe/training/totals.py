"""What routing losses are told of an optimiser step that is cut into micro-batches, and what they need of the data.

A mean over tokens only needs the number of tokens. For the losses of a batch's statistics a pass without gradients over
the step's micro-batches comes first (``train.loss_scope: global``). Statistics of the step before would cost nothing,
but they are of other questions and of other weights, and would have to be kept over a resume; this way the step is
exactly the one of a batch that was never cut. The price is one more forward pass for each micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ragmoe._errors import ConfigError, ModelError
from ragmoe.corpus.types import Passage, Question
from ragmoe.moe import routing_loss
from ragmoe.moe.losses import loss_inputs
from ragmoe.moe.probe import Swap, swap_in_step
from ragmoe.neighbours import Neighbours


def step_tokens(batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """How many tokens of some micro-batches are no padding, float32 ()."""
    return torch.stack([batch["attention_mask"].sum().float() for batch in batches]).sum()


@torch.no_grad()
def step_sums(
    model: Any, config: Any, batches: Iterable[Mapping[str, Tensor]], device: torch.device
) -> dict[str, Tensor]:
    """The sums of ``RoutingLoss.sums`` over some micro-batches, for each loss that is learned by and is no token mean.

    Whatever is drawn at random while training (dropout, noise of the gates) is drawn again as the first micro-batch is
    learned from, so that both passes see the same routings.

    Args:
        model: in training mode, as it is called for the loss.
        config: the model's.
        batches: on the device, in the order in which they will be learned from.

    Returns:
        By loss a row for each sparse layer.
    """
    weights = config.loss_weights if config.experts > 1 else {}
    losses = {name: routing_loss(name) for name, weight in weights.items() if weight}
    losses = {name: loss for name, loss in losses.items() if not loss.per_token}
    found: dict[str, Tensor] = {}
    if not losses:
        return found
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for batch in batches:
            output = model(**{name: x for name, x in batch.items() if not name.endswith("_positions")})
            inputs = loss_inputs(output["routings"], batch["attention_mask"], batch.get("question_domain"))
            for name, loss in losses.items():
                sums = torch.stack([loss.sums(of_layer) for of_layer in inputs])
                found[name] = found[name] + sums if name in found else sums
    return found


def step_swaps(config: Any, batches: Iterable[Mapping[str, Tensor]]) -> list[Swap]:
    """For each of some micro-batches the neighbours of other questions among all of them; empty where no loss asks."""
    losses = config.further_losses().values() if config.experts > 1 else ()
    if not any(loss.needs_swapped for loss in losses):
        return []
    found = [Neighbours.from_tensors(batch) for batch in batches]
    return swap_in_step([neighbours for neighbours in found if neighbours is not None])


def check_decoder_losses(config: Any, learned: Sequence[Question | Passage], *, sees_neighbours: bool) -> None:
    """``check_losses`` for a causal language model, of questions or documents; a model without gates has none.

    Raises:
        ConfigError: a loss is told the domain together with the neighbours, which the gate does not see.
        ModelError: nothing belongs to a domain that an expert is named after.
    """
    losses = config.further_losses() if hasattr(config, "further_losses") else {}
    for name in (name for name, loss in losses.items() if loss.needs_domain):
        if not sees_neighbours:
            raise ConfigError(
                f"the loss {name!r} is told the domain together with the neighbours, which a language model's gate "
                f"{config.gate!r} does not see",
                hint="model.gate=retrieval, or leave the loss out",
            )
        _check_domains(name, config, learned)


def check_losses(config: Any, questions: Sequence[Question], step_size: int) -> None:
    """Refuse losses that these questions, or optimiser steps of this size, would teach nothing.

    Raises:
        ModelError: no question belongs to a domain that an expert is named after.
        ConfigError: a step holds no second question.
    """
    for name, loss in config.further_losses().items():
        if loss.needs_domain:
            _check_domains(name, config, questions)
        if loss.needs_swapped and step_size < 2:
            raise ConfigError(
                f"a step has {step_size} question, but the loss {name!r} compares two",
                hint="set train.batch_size or train.accumulation to 2 or more",
            )


def _check_domains(name: str, config: Any, learned: Sequence[Question | Passage]) -> None:
    if not {one.domain for one in learned} & set(config.expert_names or ()):
        raise ModelError(
            f"the loss {name!r} learns from domains, and nothing that is learned from belongs to one that an expert is "
            f"named after; the experts are {', '.join(config.expert_names or ()) or 'unnamed'}",
            hint="name the experts after the domains: model.expert_names=[...]",
        )
