"""``ragmoe`` as a model of lm-evaluation-harness, so that it runs its own tasks on a generator with an index.

    ragmoe eval harness run --model ragmoe --model_args pretrained=runs/generator,index=indexes/demo --tasks mine

Importing this registers the name. It needs the extra ``lm-eval``. Source: Gao et al. 2021, "A framework for few-shot
language model evaluation" (EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from ragmoe._errors import ConfigError
from ragmoe.evaluation.harness import HarnessModel
from ragmoe.generation.generator import Generator

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ConfigError(
        f"lm-evaluation-harness cannot be imported ({error}): it is what runs these tasks",
        hint="pip install 'ragmoe[lm-eval]'",
    ) from None


@register_model("ragmoe")
class RagmoeLM(HarnessModel, LM):
    """A generator with an index; see ``HarnessModel``.

    Args:
        pretrained: folder of a causal language model.
        index: folder of an index that the context retrieves from; none shows the gate no neighbours.
        batch_size: sequences of a batch; ``auto`` (also ``auto:N``) takes as many as 8192 tokens hold, but no more than
            ``max_batch_size``.
        device: where the model is put; none, or a GPU where there is none, leaves it where it is.
        dtype: of its weights, as ``bfloat16``; ``auto`` and none leave them as they were saved.

    Raises:
        ConfigError: an argument is unknown, or none of these values.
    """

    def __init__(
        self,
        pretrained: str,
        index: str | None = None,
        batch_size: int | str = "auto",
        device: str | None = None,
        max_batch_size: int | str | None = None,
        dtype: str | None = None,
        **unknown: Any,
    ) -> None:
        LM.__init__(self)
        if unknown:
            raise ConfigError(
                f"--model ragmoe knows no {min(unknown)!r} (--model_args)",
                hint="it knows pretrained, index, batch_size, max_batch_size, device and dtype",
            )
        size = None if str(batch_size).split(":")[0] == "auto" else _count("batch_size", batch_size)
        most = None if max_batch_size is None else _count("max_batch_size", max_batch_size)
        precision = _dtype(dtype)
        generator = Generator.load(pretrained)
        # The harness's command line says cuda:0 where nothing is said, wherever it runs.
        if device is not None and not (device.startswith("cuda") and not torch.cuda.is_available()):
            generator.model.to(device)
        if precision is not None:
            generator.model.to(precision)
        opened: Any = None
        if index is not None:
            from ragmoe.index import Index

            opened = Index.open(index)
        HarnessModel.__init__(self, generator, opened, batch_size=size, max_batch_size=most)


def _count(name: str, value: int | str) -> int:
    """A number of sequences."""
    if not str(value).isdecimal() or not int(value):
        raise ConfigError(f"{name} is {value!r}: expected a number of sequences, 1 or more, or auto for batch_size")
    return int(value)


def _dtype(name: Any) -> torch.dtype | None:
    """A precision by its name in torch; None leaves weights as they are."""
    found = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if name in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype is {name!r}: expected auto, float32, bfloat16 or float16")
    return found


def main(words: Sequence[str]) -> None:
    """The harness's own command line, which knows ``--model ragmoe`` now."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *words]
    cli_evaluate()
