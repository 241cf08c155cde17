"""What a dry run says: above all, that memory is that of the longest batch and not of the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ragmoe.training import load_config, prepare
from ragmoe.training.describe import describe

Config = Callable[..., dict[str, Any]]


def test_memory_is_that_of_the_longest_batch(config: Config) -> None:
    run = prepare(load_config(config(**{"train.steps": 5, "raft.passages": 2})))
    dataset, collate = run.dataset, run.collator
    assert dataset.lengths == [
        len(dataset.index.passage((q.gold_ids or q.context_ids)[0]).text) for q in dataset.questions
    ]
    last = dataset.order[-1]
    dataset.lengths = [1000 if place == last else 10 for place in range(len(dataset.questions))]
    read: list[list[str]] = []

    def padded(examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Four tokens more, and all of them padding, where the longest passage is read."""
        read.append([example.question.id for example in examples])
        batch = collate(examples)
        if dataset.questions[last].id in read[-1]:
            batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 4))
        return batch

    padded.decoded = collate.decoded  # type: ignore[attr-defined]
    run.collator = padded  # type: ignore[assignment]
    report = describe(run)
    assert dataset.questions[last].id not in read[0] and dataset.questions[last].id in read[1]
    assert report["sequences_per_step"] == 8
    assert report["longest_batch"] == {"sequences": 8, "tokens": 64 + 4}
    assert "in the longest batch (8 sequences of 68 tokens)" in report["text"]


def test_adapters_are_weights_too(config: Config) -> None:
    run = prepare(load_config(config(**{"train.what": "lora", "train.lora": {"rank": 4096}})))
    held = sum(p.numel() for p in run.adapted.parameters())
    expected = (4 * held + 12 * run.parameters["trained"]) / 2**30
    assert describe(run)["memory_gib"]["weights"] == round(expected, 2) >= 0.1
