"""What a run would be, before it is one: parameters, memory, tokens a step, and the first batch in words."""

from __future__ import annotations

import math
from typing import Any

import torch

from ragmoe.models.plan import activation_bytes, read_layout
from ragmoe.training.adapters import added_parameters
from ragmoe.training.run import AnyRun

_GIB = 2**30


def describe(run: AnyRun) -> dict[str, Any]:
    """Figures of a prepared run, with ``text`` for people.

    Memory is an estimate: weights, gradients and two moments in fp32, and the activations that backward needs in the
    longest batch of the run, as ``ragmoe plan`` counts them.
    """
    config, train = run.config, run.config.train
    batch = _batch(run, 0)
    sequences, length = batch["input_ids"].shape
    longest = tuple(_batch(run, _longest(run))["input_ids"].shape)
    tokens = int(batch["attention_mask"].sum())
    parameters = run.parameters
    adapters = added_parameters(run.model) if run.adapted is not None else 0
    weights = 4 * (parameters["total"] + adapters) + 12 * parameters["trained"]
    layout = read_layout(run.model, run_gates=False)
    activations = activation_bytes(layout, math.prod(longest), checkpointing=train.gradient_checkpointing)
    report: dict[str, Any] = {
        "parameters": parameters,
        "sparse_layers": list(getattr(run.model, "sparse_layers", [])),
        "learned_from": run.counts,
        "sequences_per_step": sequences * train.accumulation,
        "tokens_per_step": tokens * train.accumulation,
        "padding": round(1 - tokens / (sequences * length), 3),
        "memory_gib": {"weights": round(weights / _GIB, 2), "activations": round(activations / _GIB, 2)},
        "longest_batch": {"sequences": longest[0], "tokens": longest[1]},
        "passes": round(len(run.dataset) / len(run.dataset.lengths), 2),
        "first_batch": run.collator.decoded(batch),
    }
    report["text"] = _text(report, config.train.steps)
    return report


def _batch(run: AnyRun, begin: int) -> dict[str, torch.Tensor]:
    collator: Any = run.collator
    return dict(collator([run.dataset[at] for at in range(begin, begin + run.config.train.batch_size)]))


def _longest(run: AnyRun) -> int:
    """Where the batch begins that holds the longest of the questions' own passages, or of the chunks."""
    dataset, size = run.dataset, run.config.train.batch_size
    begins = range(0, len(dataset), size)
    return max(begins, key=lambda at: max(dataset.lengths[i] for i in dataset.order[at : at + size]))


def _text(report: dict[str, Any], steps: int) -> str:
    p, m, longest = (report[key] for key in ("parameters", "memory_gib", "longest_batch"))
    lines = [
        f"parameters   {p['total']:,} in all, {p['active']:,} active for a token, {p['trained']:,} trained",
        f"sparse       layers {', '.join(map(str, report['sparse_layers'])) or 'none'}",
        _material(report["learned_from"], report["passes"]),
        f"a step       {report['sequences_per_step']} sequences, {report['tokens_per_step']:,} tokens, "
        f"{report['padding']:.0%} padding; {steps} steps",
        f"memory       about {m['weights']} GiB weights and optimiser, {m['activations']} GiB activations",
        f"             in the longest batch ({longest['sequences']} sequences of {longest['tokens']} tokens)",
        "",
        "first batch",
    ]
    for row in report["first_batch"]:
        lines += [f"  {row['sequence']}", f"    -> {row['target']}"]
    return "\n".join(lines)


def _material(counts: dict[str, int], passes: float) -> str:
    if "documents" in counts:
        return f"documents    {counts['documents']:,} in {counts['chunks']:,} chunks ({passes} passes)"
    return (
        f"questions    {counts['fitted']:,} to fit on ({passes} passes), {counts['held_out']} to calibrate on, "
        f"{counts['left_out']} nothing can be learned from"
    )
