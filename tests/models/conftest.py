"""A tiny dense BERT with a tokenizer, and readers upcycled from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_bert
from tiny_models import Make
from transformers import AutoTokenizer

from ragmoe.models import RagmoeBertForQuestionAnswering


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights and a WordPiece tokenizer that knows letters and a few words."""
    return save_tiny_bert(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def make(dense_folder: Path) -> Make:
    """``make(**settings)``: a small reader with a tokenizer; ``trained`` means that nothing is zero any more."""

    def build(*, trained: bool = True, expert_noise: float = 0.0, **settings: Any) -> RagmoeBertForQuestionAnswering:
        small = {"experts": 4, "neighbour_width": 16, "gate_width": 8, "max_length": 48, "stride": 8}
        if settings.get("expert_kind", "lora") == "lora":
            small["expert_rank"] = 8
        model = RagmoeBertForQuestionAnswering.from_dense(
            dense_folder, expert_noise=expert_noise, **{**small, **settings}
        )
        model.tokenizer = AutoTokenizer.from_pretrained(dense_folder)
        if trained:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return build
