"""One more expert in a trained model, whose tensors alone can be trained.

A slice of a fused parameter cannot be frozen, and weight decay moves slices whose gradient is zero. So the new expert's
rows are parameters of their own, joined to the frozen rows of the others whenever the whole is used. State dicts show
the whole under its usual name: saving, loading and resuming know nothing of it.

E experts before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ragmoe._errors import ModelError
from ragmoe.gates.joining import why_none_can_join
from ragmoe.models.sparse import SparseModel

Model = TypeVar("Model", bound=SparseModel)


@torch.no_grad()
def grow(model: Model, rows: Mapping[str, Tensor], *, id: int, name: str) -> Model:
    """The same model with one expert more, the last; of its parameters only that expert's require a gradient.

    Args:
        rows: by the names of ``model.expert_tensors()`` what the new expert starts with, without the dimension E.
        id, name: of the new expert.

    Raises:
        ModelError: the gate takes no new expert.
    """
    of = model.config
    if why := why_none_can_join(of.gate, getattr(of, "selection", "top_k"), getattr(of, "choice_groups", 1)):
        message, hint = why
        raise ModelError(message, hint=hint)
    config = copy.deepcopy(model.config)
    E = config.experts
    config.experts = E + 1
    config.expert_ids = [*(range(E) if config.expert_ids is None else config.expert_ids), id]
    config.expert_names = [*model.expert_names, name]
    if getattr(config, "expert_thresholds", None) is not None:
        config.expert_thresholds = [*config.expert_thresholds, None]
    state = {
        key: torch.cat([x, rows[key].unsqueeze(0).to(x)]) if key in rows else x for key, x in model.state_dict().items()
    }
    grown = _build(model, config, state)
    for parameter in grown.parameters():
        parameter.requires_grad_(False)
    for key in sorted(rows):
        owner, _, leaf = key.rpartition(".")
        module = grown.get_submodule(owner)
        if leaf in dict(module.named_parameters(recurse=False)):
            _set_apart(module, leaf)
    return grown


@torch.no_grad()
def settle(model: Model) -> Model:
    """A grown model as an ordinary one, with the new expert's rows in the fused parameters."""
    return _build(model, model.config, model.state_dict())


def _build(model: Model, config: Any, state: Mapping[str, Tensor]) -> Model:
    with torch.random.fork_rng(devices=[]):
        built = type(model)(config)
    built.load_state_dict(state, strict=True)
    # A reader has its tokenizer, once it was opened, and what writes its settings for that.
    for own in ("_tokenizer", "generation_config"):
        if hasattr(model, own):
            setattr(built, own, getattr(model, own))
    built.name_or_path = model.name_or_path
    built.bundle_digests = model.bundle_digests
    for gate, before in zip(built.gates, model.gates, strict=True):
        # Who is held back stays so, and the new one is let in.
        open_E = before.available.cpu()
        gate.set_available(torch.cat([open_E, open_E.new_ones(config.experts - len(open_E))]))
    return built.to(next(model.parameters()).device).train(model.training)


class _Joined(nn.Module):
    """The frozen rows of E experts, followed by those of the new one."""

    def __init__(self, frozen: Tensor) -> None:
        super().__init__()
        self.frozen = nn.Parameter(frozen, requires_grad=False)

    def forward(self, own: Tensor) -> Tensor:
        return torch.cat([self.frozen, own])

    def right_inverse(self, whole: Tensor) -> Tensor:
        return whole[len(self.frozen) :].clone()


def _set_apart(module: nn.Module, leaf: str) -> None:
    """Make the last row of a fused parameter a parameter of its own."""
    whole = module.get_parameter(leaf)
    first = not parametrize.is_parametrized(module)
    parametrize.register_parametrization(module, leaf, _Joined(whole[:-1].detach().clone()))
    module.parametrizations[leaf].original.requires_grad_(True)  # type: ignore[index,union-attr]
    if first:
        module.register_state_dict_post_hook(_show_whole)
        module.register_load_state_dict_pre_hook(_take_whole)


def _show_whole(module: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for leaf in module.parametrizations:
        own = state.pop(f"{prefix}parametrizations.{leaf}.original")
        state[prefix + leaf] = torch.cat([state.pop(f"{prefix}parametrizations.{leaf}.0.frozen"), own])


def _take_whole(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for leaf in module.parametrizations:
        if (whole := state.pop(prefix + leaf, None)) is not None:
            state[f"{prefix}parametrizations.{leaf}.original"] = whole[-1:]
            state[f"{prefix}parametrizations.{leaf}.0.frozen"] = whole[:-1]
