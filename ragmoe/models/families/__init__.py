"""Decoders of Hugging Face with gates that see neighbours: one small file a family, what they share in shared.py.

import ragmoe.models.families  # makes them known to the Auto classes

model = AutoModelForCausalLM.from_pretrained("runs/mixtral-retrieval")
neighbours = index.neighbours(prompts)
model.generate(**tokenizer(prompts, return_tensors="pt"), **neighbours.tensors())
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ragmoe._errors import BundleError
from ragmoe.bundle import read_map
from ragmoe.models import check_bundle
from ragmoe.models.families.config import RoutingConfig
from ragmoe.models.families.glm4_moe import RagmoeGlm4MoeConfig, RagmoeGlm4MoeForCausalLM, RagmoeGlm4MoeModel
from ragmoe.models.families.mixtral import RagmoeMixtralConfig, RagmoeMixtralForCausalLM, RagmoeMixtralModel
from ragmoe.models.families.olmoe import RagmoeOlmoeConfig, RagmoeOlmoeForCausalLM, RagmoeOlmoeModel
from ragmoe.models.families.qwen3_moe import RagmoeQwen3MoeConfig, RagmoeQwen3MoeForCausalLM, RagmoeQwen3MoeModel
from ragmoe.models.families.shared import CausalLMOutput, DecoderForCausalLM

# By the model type of the family whose checkpoints they read as they are.
FAMILIES: dict[str, Any] = {
    "mixtral": RagmoeMixtralForCausalLM,
    "qwen3_moe": RagmoeQwen3MoeForCausalLM,
    "olmoe": RagmoeOlmoeForCausalLM,
    "glm4_moe": RagmoeGlm4MoeForCausalLM,
}


def load_decoder(
    bundle: str | os.PathLike[str],
    *,
    version: int | None = None,
    experts: Sequence[int | str] | None = None,
    without: Sequence[int | str] = (),
    resident_experts: int | None = None,
    **kwargs: Any,
) -> DecoderForCausalLM:
    """Open a saved decoder, ready to write; its tokenizer is beside it, for ``AutoTokenizer``.

    Args:
        bundle: the folder that ``ragmoe init`` or ``save_pretrained`` wrote.
        version: an earlier version of it, by the number of its map; None opens the current one.
        experts: ids or names of the experts to open, in their order; None opens all.
        without: ids or names of experts that are opened but held back: no token goes to them.
        resident_experts: how many experts each layer keeps in memory; the others stay in their files until a token is
            routed to them. What is said is the same, and the model can be neither trained nor saved.
        kwargs: what ``from_pretrained`` takes, as ``dtype`` and ``device_map``.

    Raises:
        BundleError: it is missing or damaged, has no such version or expert, or holds no decoder.
        ModelError: there is no expert to be held back of that name, or ``resident_experts`` is less than one.
    """
    folder = check_bundle(bundle)
    found = read_map(folder, version=version).extra.get("config", {}).get("model_type")
    ours = {family.config_class.model_type: family for family in FAMILIES.values()}
    if found not in ours:
        raise BundleError(f"{folder} is a {found!r} model; decoders are {', '.join(ours)}", hint="ragmoe.load opens it")
    named = {"version": version, "experts": experts, "resident_experts": resident_experts}
    model = ours[found].from_pretrained(folder, **named, **kwargs).eval()
    if without:
        model.hold_back(without)
    return model


__all__ = [
    "FAMILIES",
    "CausalLMOutput",
    "DecoderForCausalLM",
    "RagmoeGlm4MoeConfig",
    "RagmoeGlm4MoeForCausalLM",
    "RagmoeGlm4MoeModel",
    "RagmoeMixtralConfig",
    "RagmoeMixtralForCausalLM",
    "RagmoeMixtralModel",
    "RagmoeOlmoeConfig",
    "RagmoeOlmoeForCausalLM",
    "RagmoeOlmoeModel",
    "RagmoeQwen3MoeConfig",
    "RagmoeQwen3MoeForCausalLM",
    "RagmoeQwen3MoeModel",
    "RoutingConfig",
    "load_decoder",
]
