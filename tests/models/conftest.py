"""A tiny dense BERT with a tokenizer, and readers upcycled from it."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Make
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from ragmoe.models import RagmoeBertForQuestionAnswering

WORDS = "the a of what is who when river zebra city open clinic bank law where archive he she café"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that waiting for a second thread takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights and a WordPiece tokenizer that knows letters and a few words."""
    folder = tmp_path_factory.mktemp("dense")
    config = BertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(7)
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    pieces = [*string.ascii_lowercase, *string.digits, *".,-?!'"]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = [*specials, *pieces, *(f"##{piece}" for piece in pieces[:36]), *WORDS.split()]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocab)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make(dense_folder: Path) -> Make:
    """``make(**settings)``: a small reader with a tokenizer; ``trained`` means that nothing is zero any more."""

    def build(*, trained: bool = True, expert_noise: float = 0.0, **settings: Any) -> RagmoeBertForQuestionAnswering:
        small = {"experts": 4, "expert_rank": 8, "neighbour_width": 16, "gate_width": 8, "max_length": 48, "stride": 8}
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
