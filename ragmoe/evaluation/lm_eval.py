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
        batch_size: sequences of a batch; ``auto`` takes as many as 8192 tokens hold.
        device: where the model is put; none, or a GPU where there is none, leaves it where it is.
    """

    def __init__(
        self, pretrained: str, index: str | None = None, batch_size: int | str = "auto", device: str | None = None
    ) -> None:
        LM.__init__(self)
        generator = Generator.load(pretrained)
        # The harness's command line says cuda:0 where nothing is said, wherever it runs.
        if device is not None and not (device.startswith("cuda") and not torch.cuda.is_available()):
            generator.model.to(device)
        opened: Any = None
        if index is not None:
            from ragmoe.index import Index

            opened = Index.open(index)
        HarnessModel.__init__(self, generator, opened, batch_size=None if batch_size == "auto" else int(batch_size))


def main(words: Sequence[str]) -> None:
    """The harness's own command line, which knows ``--model ragmoe`` now."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *words]
    cli_evaluate()
