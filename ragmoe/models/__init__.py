"""Models: one file a Hugging Face family, and ``load`` for any saved bundle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ragmoe._errors import BundleError
from ragmoe.bundle import is_bundle
from ragmoe.models.bert import QuestionAnsweringOutput, RagmoeBertForQuestionAnswering, RagmoeBertModel
from ragmoe.models.config import RagmoeBertConfig
from ragmoe.models.health import BrokenExpert, broken_experts
from ragmoe.models.output_cache import OutputCache
from ragmoe.models.reading import Answer
from ragmoe.models.starter import resolve_bundle


def load(
    bundle: str | os.PathLike[str],
    *,
    version: int | None = None,
    experts: Sequence[int | str] | None = None,
    without: Sequence[int | str] = (),
    resident_experts: int | None = None,
) -> RagmoeBertForQuestionAnswering:
    """Open a saved model, ready to read, with its tokenizer.

    Args:
        bundle: the folder that ``ragmoe train`` or ``save_pretrained`` wrote, or ``starter``, the packaged reader.
        version: an earlier version of it, by the number of its map; None opens the current one.
        experts: ids or names of the experts to open, in their order; None opens all.
        without: ids or names of experts that are opened but held back: no token goes to them.
        resident_experts: how many experts each layer keeps in memory; the others stay in their files until a token is
            routed to them. The answers are the same, and the model can only answer: it can be neither trained nor
            saved. None keeps all in memory.

    Raises:
        ModelError: there is no expert to be held back of that name.
        BundleError: when it is missing or damaged, or has no such version or expert.
        ModelError: ``resident_experts`` is less than one, or there are no experts.
    """
    model = RagmoeBertForQuestionAnswering.from_pretrained(
        check_bundle(bundle), version=version, experts=experts, resident_experts=resident_experts
    ).eval()
    if without:
        model.hold_back(without)
    return model


def check_bundle(bundle: str | os.PathLike[str]) -> Path:
    """The folder of a bundle; BundleError where it is none. Nothing of it is opened."""
    folder = resolve_bundle(bundle)
    if not is_bundle(folder):
        have = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else None
        raise BundleError(
            f"{folder} is not a bundle: expected model.safetensors.index.json, "
            + (f"found {', '.join(have) or 'nothing'}" if have is not None else "there is no such folder"),
            hint="ragmoe train CONFIG.yaml writes one, and starter is the name of the packaged one",
        )
    return folder


__all__ = [
    "Answer",
    "BrokenExpert",
    "OutputCache",
    "QuestionAnsweringOutput",
    "RagmoeBertConfig",
    "RagmoeBertForQuestionAnswering",
    "RagmoeBertModel",
    "broken_experts",
    "check_bundle",
    "load",
]
