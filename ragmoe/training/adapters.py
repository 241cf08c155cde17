"""Low-rank adapters on a frozen base, by PEFT, for ``train.what: lora``; what is saved has them merged.

Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ragmoe._errors import ConfigError
from ragmoe._folders import share
from ragmoe.models.sparse import SparseModel
from ragmoe.training.config import LoraConfig

# The matrices an adapter changes: attention and feed-forward of the base, never those inside a gate.
_OF_READER = (
    r"bert\.encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|"
    r"output\.dense)"
)
_HEAD = ["qa_outputs", "special_outputs"]
# Likewise, those networks included that all experts share; of a model without gates every matrix but its head.
_OF_DECODER = r".*\.(self_attn\.\w+_proj|mlp\.(dense\.|shared_experts\.)?(gate|up|down)_proj)"
_ALL = "all-linear"


def adapt_reader(model: Any, lora: LoraConfig) -> Any:
    """The PEFT model around a reader, which trains its head whole; ours is ``peft.base_model.model``."""
    return _adapt(model, lora, target_modules=_OF_READER, modules_to_save=_HEAD)


def adapt_decoder(model: Any, lora: LoraConfig) -> Any:
    """The PEFT model around a causal language model, with gates or without.

    Raises:
        ConfigError: the model has no matrix that an adapter could change.
    """
    try:
        return _adapt(model, lora, target_modules=_OF_DECODER if isinstance(model, SparseModel) else _ALL)
    except ValueError as error:
        raise ConfigError(f"train.what is 'lora', but the base takes no adapters: {error}") from None


def added_parameters(model: Any) -> int:
    """How many parameters of a model are adapters', which are gone once it is saved."""
    merged = ("lora_", ".original_module.")
    return sum(p.numel() for name, p in model.named_parameters() if any(mark in name for mark in merged))


def merge(model: Any, adapted: Any, folder: Path) -> tuple[Any, Path | None]:
    """A trained model with its adapters merged, and where they are kept besides: in fp16, half the size.

    Args:
        adapted: the PEFT model around it; None for a model without adapters, which stays as it is.
        folder: of the run.
    """
    from safetensors.torch import load_file, save_file

    if adapted is None:
        return model, None
    folder = folder / "adapter"
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    path = folder / "adapter_model.safetensors"
    save_file({name: x.half().contiguous() for name, x in load_file(path).items()}, path, metadata={"format": "pt"})
    share(path)
    return adapted.merge_and_unload(), folder


def _adapt(model: Any, lora: LoraConfig, **where: Any) -> Any:
    import peft

    wanted = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, **where)
    return peft.get_peft_model(model, wanted)
