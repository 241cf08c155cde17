"""X-LoRA over a reader's LoRA experts, as PEFT has it: a baseline of experiments, and nothing that ``load`` opens.

    reader = XLoraReader(RagmoeBertForQuestionAnswering.from_pretrained("a bundle with LoRA experts"))

Each expert becomes a frozen PEFT adapter on the dense network that all experts share. A first pass without adapters
gives hidden states; from the last of them a classifier weighs all adapters, for each token and each adapted matrix; a
second pass runs with the adapters so weighted. Gates have no part in it, and neighbours are not looked at.

Source: Buehler and Buehler 2024 (X-LoRA), with the settings of their own model (lamm-mit/x-lora): a linear classifier,
a softmax over all adapters, scalings of their own for each matrix.

Q sequences, T positions, S = Q*T tokens, D width, L sparse layers, E adapters, r rank.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ragmoe._errors import BundleError, ModelError
from ragmoe._folders import share
from ragmoe.bundle import read_map
from ragmoe.gates import Routing
from ragmoe.models.bert import QuestionAnsweringOutput, RagmoeBertForQuestionAnswering, RagmoeBertPreTrainedModel
from ragmoe.models.config import RagmoeBertConfig
from ragmoe.models.reading import ReaderMixin

# Where a bundle's map says that its tensors are those of an X-LoRA reader: the names of the adapters.
_ADAPTERS = "xlora_adapters"
# Which matrix of a layer each half of an expert changes, in the order in which X-LoRA counts them.
_SIDES = {"up": "intermediate.dense", "down": "output.dense"}


class XLoraReader(ReaderMixin, RagmoeBertPreTrainedModel):
    """A reader whose LoRA experts are mixed by X-LoRA.

    It trains, is saved and goes on from a checkpoint as every reader does: its folder is a bundle, which only
    ``XLoraReader.from_pretrained`` opens.

    Args:
        experts: the reader with the trained experts; its gates are left behind.
        seed: for the classifier's first weights.

    Raises:
        ModelError: the experts are no adapters of one dense network.
    """

    def __init__(self, experts: RagmoeBertForQuestionAnswering, *, seed: int = 0) -> None:
        import peft

        _check_adapters(experts.config)
        super().__init__(_own_config(experts))
        self._tokenizer = getattr(experts, "_tokenizer", None)
        with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            paths = export_adapters(experts, folder)
            wanted = peft.XLoraConfig(
                hidden_size=self.config.hidden_size,
                # PEFT loads the adapters under their numbers, whatever they are called here.
                adapters={str(e): str(path) for e, path in enumerate(paths)},
                layerwise_scalings=True,
                xlora_depth=1,
            )
            self.xlora = peft.PeftModel(_Scaled(dense_reader(experts)), wanted)
        self.train(experts.training)

    @property
    def held_back(self) -> list[int]:
        """No expert ever is: all are mixed."""
        return []

    @property
    def expert_names(self) -> list[str]:
        """A name for each adapter."""
        return list(self.config.expert_names or ())

    @property
    def moe_layers(self) -> list[Any]:
        """None: PEFT's layers stand where a reader has its MoE layers."""
        return []

    def get_input_embeddings(self) -> nn.Module:
        """Those of the dense network that PEFT has wrapped."""
        return next(module for name, module in self.named_modules() if name.endswith(".word_embeddings"))

    def forward(self, **inputs: Any) -> QuestionAnsweringOutput:
        """Read Q sequences; takes and returns what ``RagmoeBertForQuestionAnswering.forward`` does.

        Outside of training ``routings`` holds, for each sparse layer, the mean of the scalings of its two matrices
        (``logits_SE`` are their logarithms), and as the one chosen expert of a token the adapter that has most of them.
        """
        output = self.xlora(**inputs)
        if not self.training:
            output.routings = self._routings(self.xlora.base_model.get_latest_scalings())
        return output

    def _routings(self, scalings: Tensor) -> tuple[Routing, ...]:
        """From scalings (Q, T, 2 L, E) in X-LoRA's order: the two matrices of one layer after the other."""
        E = self.config.experts
        scalings_SLE = scalings.float().reshape(-1, len(self.sparse_layers), len(_SIDES), E).mean(dim=2)
        return tuple(
            Routing(*scalings_SE.max(dim=-1, keepdim=True), scalings_SE.log()) for scalings_SE in scalings_SLE.unbind(1)
        )

    def parameter_counts(self) -> dict[str, int]:
        """Total parameters, and active ones, which are the same: every adapter counts for every token."""
        total = sum(p.numel() for p in self.parameters())
        return {"total": total, "active": total}

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """ModelError: PEFT hands the scalings over by hooks that are gone when backward computes a layer again."""
        raise ModelError("X-LoRA would lose its scalings in backward: set train.gradient_checkpointing=false")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        message: str = "save",
        extra: Mapping[str, Any] | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write the bundle; see ``BundleMixin.save_pretrained``."""
        extra = {**(extra or {}), _ADAPTERS: self.expert_names}
        super().save_pretrained(
            save_directory, is_main_process, state_dict, message, extra, max_shard_size, push_to_hub
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> XLoraReader:  # type: ignore[override]
        """Open what ``save_pretrained`` wrote; BundleError where it is something else."""
        bundle = read_map(Path(folder))
        if _ADAPTERS not in bundle.extra:
            raise BundleError(f"{folder} holds no X-LoRA reader", hint="ragmoe.load opens every other bundle")
        config = RagmoeBertConfig.from_dict(dict(bundle.extra["config"]))
        config.expert_names = list(bundle.extra[_ADAPTERS])
        # Its weights are chance and all replaced; it is there for its shapes.
        reader: Any = cls(RagmoeBertForQuestionAnswering(config))
        reader.load_bundle(folder)
        reader.config._name_or_path = str(Path(folder).absolute())
        return reader.eval()


class _Scaled(nn.Module):
    """A dense reader as PEFT's X-LoRA wants its model.

    It looks for the adapters' weights below a module that is called ``model``, and asks with ``return_dict`` for its
    first pass, of which it wants the hidden states.
    """

    def __init__(self, reader: RagmoeBertForQuestionAnswering) -> None:
        super().__init__()
        self.model = reader
        self.config = reader.config

    def forward(self, *, return_dict: bool = False, **inputs: Any) -> Any:
        if not return_dict:
            return self.model(**inputs)
        # The encoder alone: nobody asks for answers in this pass.
        wanted = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds")
        return self.model.bert(**{name: inputs.get(name) for name in wanted})


def dense_reader(model: RagmoeBertForQuestionAnswering) -> RagmoeBertForQuestionAnswering:
    """The dense reader that answers where no LoRA expert does: the same weights without experts and gates."""
    config = copy.deepcopy(model.config)
    config.sparse_layers = []
    # X-LoRA refuses a model that could decode with a cache; an encoder has none.
    config.use_cache = False
    dense = RagmoeBertForQuestionAnswering(config)
    dense.load_state_dict({name: x for name, x in model.state_dict().items() if ".moe." not in name})
    return dense.train(model.training)


def export_adapters(model: RagmoeBertForQuestionAnswering, folder: str | os.PathLike[str]) -> list[Path]:
    """Write each LoRA expert as a PEFT adapter of ``dense_reader(model)``; their folders, in the experts' order.

    Exact: an expert's deltas are a LoRA of the same rank, whose alpha is that rank, on both matrices.
    """
    import peft
    from safetensors.torch import save_file

    rank, paths = model.config.expert_rank, []
    layers = dict(zip(model.sparse_layers, (layer.experts for layer in model.moe_layers), strict=True))
    for e in range(model.config.experts):
        tensors, targets = {}, []
        for layer, experts in layers.items():
            for side, matrix in _SIDES.items():
                targets.append(name := f"bert.encoder.layer.{layer}.{matrix}")
                for half in "ab":
                    delta = getattr(experts, f"{side}_{half}")[e].detach().T.contiguous()
                    tensors[f"base_model.model.{name}.lora_{half.upper()}.weight"] = delta
        paths.append(path := Path(folder) / str(e))
        peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets).save_pretrained(str(path))
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        share(path / "adapter_model.safetensors")
    return paths


def _check_adapters(config: RagmoeBertConfig) -> None:
    """ModelError unless the experts are LoRA adapters and all that a sparse layer adds."""
    sparse = config.resolved_sparse_layers()
    if not sparse or config.expert_kind != "lora":
        have = f"experts of the kind {config.expert_kind!r}" if sparse else "no sparse layer"
        raise ModelError(f"X-LoRA mixes trained LoRA experts, but the model has {have}")
    if config.neighbour_summary:
        raise ModelError("X-LoRA mixes adapters of a dense network, but the model adds its neighbours' summary to it")


def _own_config(experts: RagmoeBertForQuestionAnswering) -> RagmoeBertConfig:
    """The configuration of the experts' reader, with all of them active and, for want of a gate, the plainest one."""
    config = copy.deepcopy(experts.config)
    config.gate, config.common_experts, config.vote_start = "token", 0, 0.0
    config.top_k, config.expert_names = config.experts, experts.expert_names
    # Every token calls them all, and a threshold of one's own would be everybody's.
    config.expert_thresholds = None
    return config
