"""Encoding by tokens: the vectors are those of sentence-transformers, whatever is tokenized, cut, batched or ahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tiny import save_tiny_bert, save_tiny_encoder

from ragmoe import Passage
from ragmoe.index import windows
from ragmoe.index.ahead import BlockEncoder
from ragmoe.index.encoder import SentenceEncoder, load_encoder, token_encoder
from ragmoe.index.windows import encode_passages, encode_prepared, prepare_passages

TEXTS = ["", "the river", "who is the law of the city? " * 20, "café", "a zebra! " * 7, "when the clinic is open, he"]
PASSAGES = [
    Passage(id="long", text="the bank of the river is open when the zebra is, " * 9, title="the river"),
    Passage(id="short", text="the city", title="zebra"),
    Passage(id="no room", text="a clinic of the city " * 4, title="who what when the city river zebra open law he she"),
    Passage(id="said", text="zebra of the city", title="zebra"),
    *(Passage(id=f"{n} words", text="river " * n, title="a") for n in range(8, 20)),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    """Another pooling, another maximum length, and a prompt, than the packaged encoder's."""
    folder = tmp_path_factory.mktemp("cls")
    return SentenceEncoder("tiny", save_tiny_encoder(folder, "cls", prompts={"query": "who: ", "passage": "the law: "}))


def reference(encoder: SentenceEncoder, texts: list[str], prompt: str = "") -> np.ndarray:
    return encoder._model.encode(texts, prompt=prompt or None, normalize_embeddings=True)


@pytest.mark.parametrize("prompt", ["", "the law: "])
def test_vectors_are_those_of_sentence_transformers(tiny: SentenceEncoder, prompt: str) -> None:
    assert tiny.by_tokens is not None
    np.testing.assert_allclose(tiny.encode(TEXTS, prompt=prompt), reference(tiny, TEXTS, prompt), atol=2e-6)
    tokens = tiny.by_tokens.tokenize(TEXTS, prompt=prompt)
    for batch_tokens in (1, 50, 10_000):
        vectors = tiny.by_tokens.encode(tokens, batch_tokens=batch_tokens)
        np.testing.assert_allclose(vectors, reference(tiny, TEXTS, prompt), atol=2e-6)


def test_the_packaged_encoder_is_run_by_tokens() -> None:
    encoder = load_encoder("minilm")
    assert isinstance(encoder, SentenceEncoder) and encoder.by_tokens is not None
    expected = reference(encoder, TEXTS)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-6)
    tokens = encoder.by_tokens.tokenize(TEXTS)
    halves = encoder.by_tokens.encode(tokens, precision="bf16")
    cosines = (halves * expected).sum(axis=1)
    assert (cosines > 0.995).all() and np.abs(halves - expected).max() > 1e-4
    # Queries stay what they were.
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-6)


def test_what_a_model_does_beyond_reading_text_is_left_to_its_own_code(tmp_path: Path) -> None:
    transformer = Transformer(str(save_tiny_bert(tmp_path / "bert")), max_seq_length=20)
    dense = [transformer, Pooling(32, "mean"), Dense(32, 8), Normalize()]
    without = [transformer, Pooling(32, "mean", include_prompt=False)]
    for number, modules in enumerate((dense, without)):
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / str(number)))
        encoder = SentenceEncoder("tiny", tmp_path / str(number))
        assert token_encoder(encoder) is None
        np.testing.assert_allclose(
            encoder.encode(TEXTS, prompt="the law: "), reference(encoder, TEXTS, "the law: "), atol=2e-6
        )


@pytest.mark.parametrize("mode", ["windows", "truncate"])
@pytest.mark.parametrize("prompt", ["", "the law: "])
def test_passages_tokenized_once_are_cut_as_by_their_spans(
    tiny: SentenceEncoder, mode: windows.LongPassages, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare_passages(PASSAGES, tiny, mode=mode, prompt=prompt)
    vectors, counts = encode_passages(PASSAGES, tiny, mode=mode, prompt=prompt)
    assert len({text.shape[1] for text in prepared.tokens or []}) > 5
    monkeypatch.setattr(windows, "token_encoder", lambda encoder: None)
    slow = prepare_passages(PASSAGES, tiny, mode=mode, prompt=prompt)
    assert (prepared.windows.texts, counts.tolist()) == (slow.windows.texts, slow.per_passage.tolist())
    assert prepared.windows.owner.tolist() == slow.windows.owner.tolist()
    assert counts[0] > 1 and counts[1] == 1 and (counts[4:] > 1).any() and not (counts[4:] > 1).all()
    np.testing.assert_allclose(vectors, encode_prepared(slow, tiny, prompt=prompt), atol=2e-6)


def test_blocks_begun_ahead_are_those_made_at_once(tiny: SentenceEncoder) -> None:
    parts = [PASSAGES[:5], PASSAGES[5:11], PASSAGES[11:]]
    with BlockEncoder(tiny, "windows", "who: ", None) as encoder:
        encoder.begin(0, parts[0])
        encoder.begin(1, parts[1])
        made = [encoder.encode(number, part) for number, part in enumerate(parts)]
    for part, (vectors, counts) in zip(parts, made, strict=True):
        expected, needed = encode_passages(part, tiny, mode="windows", prompt="who: ")
        assert vectors.dtype == np.float16 and counts.tolist() == needed.tolist()
        np.testing.assert_allclose(vectors, expected, atol=1e-3)
