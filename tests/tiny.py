"""The smallest dense BERT that can be upcycled, with a WordPiece tokenizer that knows letters and a few words."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = "the a of what is who when river zebra city open clinic bank law where archive he she café"


def save_tiny_bert(folder: Path) -> Path:
    """A checkpoint of random weights: four layers, width 32, 200 tokens."""
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


def save_tiny_encoder(folder: Path, pooling: str = "mean", **options: Any) -> Path:
    """A sentence-transformers folder around `save_tiny_bert`, which reads 20 tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    bert = save_tiny_bert(folder / "bert")
    modules = [Transformer(str(bert), max_seq_length=20), Pooling(32, pooling)]
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(folder / "encoder"))
    return folder / "encoder"
