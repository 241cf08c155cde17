"""Hugging Face's Trainer with what gates and experts need: their own rates, exact resume, routing in the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer

from ragmoe._errors import ConfigError
from ragmoe.gates import Routing
from ragmoe.moe import RoutingStatistics, StepTotals, fetch_sums, routing_sums
from ragmoe.moe.probe import Swap
from ragmoe.training.config import OptimiserConfig, TrainingConfig, trained_parts
from ragmoe.training.totals import step_sums, step_swaps, step_tokens

# What a parameter belongs to, by its name; the first that matches.
_PARTS = (
    ("gate", ".moe.gate."),
    ("gate", ".mlp.gate."),
    ("gate", ".summary."),
    ("gate", ".internal_xlora_classifier."),
    ("experts", ".moe.experts."),
    ("experts", ".mlp.experts."),
    ("head", "qa_outputs"),
    ("head", "special_outputs"),
)

# The values of ``train.what`` that train a model's gates.
TRAINS_GATES = ("all", "gate", "gate+experts", "lora")

# The losses of a model's output that the log shows, with the names they have there.
_LOSSES = {
    "answer_loss": "answer_loss",
    "language_loss": "language_loss",
    "balance_loss": "balance_loss",
    "aux_loss": "balance_loss",
    "z_loss": "z_loss",
}

GateLesson = Callable[[Any, int, Sequence[Routing], Tensor], Tensor]


def part_of(name: str) -> str:
    """``gate``, ``experts``, ``head`` or ``base``."""
    return next((part for part, mark in _PARTS if mark in name), "base")


def freeze(model: nn.Module, what: str) -> None:
    """Leave trainable what ``train.what`` says (for ``lora`` and ``new_expert`` what is new is trainable already)."""
    if what in ("all", "new_expert"):
        return
    trained = trained_parts(what)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in trained or (what == "lora" and ("lora_" in name)))


def check_balance(config: TrainingConfig) -> None:
    """ConfigError where gates that stay as they are would be balanced."""
    train = config.train
    if train.balance_bias_rate and train.what not in TRAINS_GATES:
        raise ConfigError(
            f"train.balance_bias_rate is {train.balance_bias_rate} and moves every gate, but train.what is "
            f"{train.what!r}, which trains none; expected one of: {', '.join(TRAINS_GATES)}",
            hint="leave train.balance_bias_rate out",
        )


class RagmoeTrainer(Trainer):
    """Trains a model of ragmoe; checkpoints are bundles and are loaded strictly, experts included.

    Examples come in the order of the dataset, which has its own (see ``RaftDataset``).

    Args:
        gate_lesson: a loss to be added, of the model, the number of the micro-batch (counted through a resumed run),
            its routings, and the mask of its tokens.
    """

    optimizer: Any

    def __init__(
        self, *args: Any, optimiser: OptimiserConfig, gate_lesson: GateLesson | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.optimiser_config = optimiser
        self.gate_lesson = gate_lesson
        self._lessons: int | None = None
        # Without this, Trainer takes the loss for a sum over the whole accumulated batch and does not average it.
        self.model_accepts_loss_kwargs = False
        self.routing = self._new_statistics()
        # What routing did since it was last fetched, still on the device.
        self._counted: Tensor | None = None
        self._parts: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._step_batches: list[dict[str, Any]] = []
        self._step_totals: StepTotals | None = None
        self._step_swaps: list[Swap] = []
        self._step_place = 0

    def _new_statistics(self) -> RoutingStatistics:
        model: Any = self.model
        return RoutingStatistics(model.sparse_layers, model.config.experts)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a group for each part and for what decays."""
        if self.optimizer is None:
            config = self.optimiser_config
            rates = {
                "base": config.learning_rate,
                "gate": config.gate_learning_rate or config.learning_rate,
                "experts": config.experts_learning_rate or config.learning_rate,
                "head": config.head_learning_rate or config.learning_rate,
            }
            groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    decays = parameter.dim() > 1 and "LayerNorm" not in name and "bias" not in name
                    groups.setdefault((part_of(name), decays), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": params, "lr": rates[part], "weight_decay": config.weight_decay if decays else 0.0}
                    for (part, decays), params in groups.items()
                ],
                betas=(0.9, 0.98),
                eps=1e-8,
            )
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._step_batches, self._step_totals, self._step_swaps = batches, None, []
        self._step_place = 0
        return batches, items

    def _totals(self, model: Any) -> StepTotals | None:
        """What the routing losses are told of the optimiser step; None where the micro-batch is the whole of it."""
        parts = len(self._step_batches) * self.args.world_size
        if parts <= 1 or not (self.routing.layers and model.training):
            return None
        if self._step_totals is None:
            sums: dict[str, Tensor] = {}
            if self.optimiser_config.loss_scope == "global":
                batches = (self._prepare_inputs(batch) for batch in self._step_batches)
                sums = step_sums(model, self.model.config, batches, self.args.device)
            tokens = step_tokens(self._step_batches).to(self.args.device)
            tokens, sums = self.accelerator.reduce((tokens, sums), reduction="sum")
            self._step_totals = StepTotals(tokens, parts, sums)
            self._step_swaps = step_swaps(self.model.config, map(self._prepare_inputs, self._step_batches))
        if self._step_swaps:
            return replace(self._step_totals, swap=self._step_swaps[self._step_place])
        return self._step_totals

    def _clip_grad_norm(self, model: Any) -> Any:
        """As in Trainer; FloatingPointError where the step would leave nothing to go on from."""
        norm = super()._clip_grad_norm(model)
        # Both in one fetch from the device.
        if not torch.isfinite(self._tr_loss + norm):
            step = self.state.global_step + 1
            raise FloatingPointError(f"the loss or its gradient is not finite in step {step} (its norm is {norm:.3g})")
        return norm

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        totals = self._totals(model)
        self._step_place += 1
        output = model(**inputs) if totals is None else model(**inputs, step_totals=totals)
        losses = {name: output.get(found) for found, name in _LOSSES.items() if found in output}
        losses |= {f"{name}_loss": value for name, value in (output.get("further_losses") or {}).items()}
        for name, value in losses.items():
            if value is not None:
                self._parts[name] = self._parts.get(name, torch.zeros(())) + value.detach().float()
        self._micro_batches += 1
        if output.get("routings"):
            counted = routing_sums(output["routings"], inputs["attention_mask"].reshape(-1).bool(), 1)
            self._counted = counted if self._counted is None else self._counted + counted
        loss = output["loss"]
        if self.gate_lesson is not None:
            loss = loss + self._taught(self.gate_lesson, model, inputs, output)
        return (loss, output) if return_outputs else loss

    def _taught(self, lesson: GateLesson, model: Any, inputs: dict[str, Any], output: Any) -> Tensor:
        if self._lessons is None:
            self._lessons = self.state.global_step * self.args.gradient_accumulation_steps
        mask_S = inputs["attention_mask"].reshape(-1).bool()
        taught = lesson(model, self._lessons, output["routings"], mask_S)
        self._lessons += 1
        self._parts["gate_loss"] = self._parts.get("gate_loss", torch.zeros(())) + taught.detach().float()
        return taught

    def drain(self) -> dict[str, Any]:
        """Mean losses and routing since the last call."""
        self._fetch_routing()
        means = {name: float(total / max(1, self._micro_batches)) for name, total in self._parts.items()}
        routing = self.routing.summary() if self.routing.domains else {"layers": []}
        self._parts, self._micro_batches, self.routing = {}, 0, self._new_statistics()
        return {
            **means,
            "load": [layer["load"] for layer in routing["layers"]],
            "gate_entropy": [layer["entropy"] for layer in routing["layers"]],
            **self._lost(routing["layers"]),
        }

    def _fetch_routing(self) -> RoutingStatistics:
        """What routing did since the last call, which is counted in ``routing`` from now on."""
        found = self._new_statistics()
        if self._counted is not None:
            for counted in fetch_sums(self._counted, len(found.layers)):
                found.add(counted, "")
                self.routing.add(counted, "")
        self._counted = None
        return found

    def _lost(self, layers: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
        """What capacity has cost, layer by layer, where it is limited or a selection leaves tokens out."""
        model: Any = self.model
        if not any(gate.leaves_empty for gate in model.gates):
            return {}
        return {name: [layer[name] for layer in layers] for name in ("overflow", "unserved")}

    def update_balance_bias(self) -> None:
        """Move every gate's balance bias by the load of one optimiser step, over all its micro-batches."""
        if rate := self.optimiser_config.balance_bias_rate:
            model: Any = self.model
            for gate, load_E in zip(model.gates, self._fetch_routing().load_LE, strict=True):
                gate.update_balance_bias(torch.from_numpy(load_E).to(gate.balance_bias), rate)

    # Trainer's own ways load with strict=False and without our format: experts would stay at initialisation.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._memory_kept():
            (model or self.model).load_bundle(resume_from_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self._memory_kept():
            super()._save(output_dir, state_dict)

    @contextmanager
    def _memory_kept(self) -> Iterator[None]:
        """A checkpoint is no version of the bundle that is trained on, and has no expert memory of its own."""
        model: Any = self.model
        before = model.bundle_digests
        yield
        model.bundle_digests = before

    def _load_best_model(self) -> None:
        self.model.load_bundle(self.state.best_model_checkpoint)
