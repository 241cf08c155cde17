"""Encoders and windows: nothing is cut in silence, prompts are applied, and batches waste no padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_encoder import StubEncoder

from ragmoe import ConfigError, Passage
from ragmoe.index.encoder import Encoder, load_encoder
from ragmoe.index.tokens import length_batches
from ragmoe.index.windows import cut_windows, encode_passages, encoder_text, pool_windows


def passage(text: str, title: str = "") -> Passage:
    return Passage(id="p", text=text, title=title)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 200), st.integers(9, 40), st.integers(0, 12), st.integers(0, 5))
def test_windows_cover_every_word_and_fit_the_encoder(words: int, max_length: int, overlap: int, title: int) -> None:
    text = " ".join(f"w{i}" for i in range(words))
    encoder = StubEncoder(max_length=max_length)
    source = passage(text, " ".join("title" for _ in range(title)))
    windows = cut_windows([source], encoder, overlap=overlap)
    assert all(len(spans) <= max(max_length, 8) for spans in encoder.token_spans(windows.texts))
    assert {word for part in windows.texts for word in part.split()} - {"title"} == set(text.split())
    assert (len(windows.texts) > 1) == (windows.per_passage[0] > 1)


def test_the_first_window_is_what_truncation_keeps() -> None:
    source = passage(" ".join(f"w{i}" for i in range(60)), "Title words")
    windows = cut_windows([source], StubEncoder())
    assert encoder_text(source).startswith(windows.texts[0])
    assert all(text.startswith("Title words\n") for text in windows.texts)


def test_a_title_that_the_text_begins_with_is_not_said_twice() -> None:
    assert encoder_text(passage("Ferries leave at six.", "Ferries")) == "Ferries leave at six."
    assert encoder_text(passage("They leave at six.", "Ferries")) == "Ferries\nThey leave at six."


def test_a_title_that_leaves_no_room_is_left_out() -> None:
    windows = cut_windows([passage("one two three", " ".join("t" * 30))], StubEncoder())
    assert windows.texts == ["one two three"]


def test_windows_end_at_words() -> None:
    class Letters(StubEncoder):
        """Two letters a token: most tokens begin inside of a word."""

        def token_spans(self, texts):  # type: ignore[no-untyped-def]
            return [
                np.asarray([(i, min(i + 2, len(t))) for i in range(0, len(t), 2) if t[i] != " "]).reshape(-1, 2)
                for t in texts
            ]

    text = " ".join(["abcde"] * 20)
    for part in cut_windows([passage(text)], Letters(), overlap=4).texts:
        assert set(part.split()) == {"abcde"}


def test_mean_of_windows_is_weighted_by_tokens() -> None:
    source = [passage("short"), passage(" ".join(f"w{i}" for i in range(50)))]
    encoder = StubEncoder()
    windows = cut_windows(source, encoder)
    vectors = encoder.encode(windows.texts)
    expected = np.zeros((2, encoder.width))
    for owner, size, vector in zip(windows.owner, windows.tokens, vectors, strict=True):
        expected[owner] += size * vector
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(pool_windows(vectors, windows), expected, atol=1e-6)
    got, counts = encode_passages(source, encoder, mode="windows")
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert counts.tolist() == windows.per_passage.tolist() and counts[1] > 1


def test_truncation_counts_what_it_cuts() -> None:
    source = [passage(" ".join(f"w{i}" for i in range(50))), passage("short")]
    encoder = StubEncoder()
    vectors, counts = encode_passages(source, encoder, mode="truncate")
    assert (counts > 1).tolist() == [True, False]
    np.testing.assert_array_equal(vectors[0], encoder.encode([" ".join(f"w{i}" for i in range(16))])[0])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 50), max_size=40))
def test_batches_hold_every_text_once_within_the_budget(lengths: list[int]) -> None:
    batches = length_batches(lengths, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 100 for batch in batches)


def test_unknown_encoders_say_what_there_is(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="there is no such folder") as caught:
        load_encoder(str(tmp_path / "none"))
    assert "minilm (offline, packaged)" in str(caught.value.hint)
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(ConfigError, match=r"holds no weights .* it holds: readme\.md"):
        load_encoder(str(tmp_path))


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return load_encoder("minilm")


def test_the_packaged_encoder_works_offline(minilm: Encoder) -> None:
    assert (minilm.id, minilm.width, minilm.max_length) == ("minilm", 384, 256)
    vectors = minilm.encode(["A dog runs.", "A puppy is running.", "The bank raised its rates."])
    assert vectors.dtype == np.float32 and vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


def test_vectors_do_not_depend_on_the_batch_or_its_order(minilm: Encoder) -> None:
    texts = ["word " * n for n in (1, 200, 3, 50, 7)]
    together = minilm.encode(texts)
    alone = np.concatenate([minilm.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(minilm.encode(texts[::-1])[::-1], together, atol=1e-5)


def test_a_prompt_is_put_in_front(minilm: Encoder) -> None:
    np.testing.assert_allclose(minilm.encode(["when?"], prompt="query: "), minilm.encode(["query: when?"]), atol=1e-5)


def test_windows_of_real_tokens_are_read_whole(minilm: Encoder) -> None:
    text = " ".join(f"Unpronounceable{i} antidisestablishmentarianism, item no. {i}." for i in range(60))
    windows = cut_windows([passage(text, "A title")], minilm)
    assert len(windows.texts) > 3
    # Two special tokens are added to each.
    assert all(len(spans) + 2 <= minilm.max_length for spans in minilm.token_spans(windows.texts))
    assert {word for part in windows.texts for word in part.split()} >= set(text.split())


def test_loading_is_quiet_whatever_the_user_has_set(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        capsys.readouterr()
        load_encoder("minilm")
        assert capsys.readouterr().err == ""
        assert logging.is_progress_bar_enabled()
    finally:
        if not bars:
            logging.disable_progress_bar()
