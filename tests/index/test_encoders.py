"""Encoders and windows: nothing is cut in silence, prompts are applied, and batches waste no padding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_encoder import StubEncoder
from tiny import save_tiny_encoder

from ragmoe import ConfigError, EncoderMismatchError, Passage
from ragmoe.index import BuildOptions, Index, Manifest, build_index, plan_add, plan_build, plan_merge
from ragmoe.index.encoder import Encoder, declared_prompts, encoder_folder, load_encoder, settings_digest, settings_of
from ragmoe.index.manifest import read_manifest
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


@pytest.mark.parametrize(
    ("said", "query", "passage"),
    [
        ({}, "", ""),
        ({"prompts": {"query": "q: ", "passage": "p: "}}, "q: ", "p: "),
        ({"prompts": {"query": "q: ", "document": "d: ", "passage": "p: "}}, "q: ", "d: "),
        # Declared as empty, it is no matter for the default.
        ({"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "query"}, "q: ", ""),
        ({"prompts": {"all": "a: "}, "default_prompt_name": "all"}, "a: ", "a: "),
        ({"prompts": {"query": None}, "default_prompt_name": None}, "", ""),
    ],
)
def test_prompts_are_those_that_a_model_declares(
    said: dict[str, Any], query: str, passage: str, tmp_path: Path
) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(said))
    assert declared_prompts(tmp_path) == {"query": query, "passage": passage}


def test_an_encoder_in_a_folder_is_known_by_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_encoder(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    assert load_encoder(str(folder.relative_to(tmp_path))).id == str(folder)


def test_an_encoder_that_reads_queries_otherwise_is_refused(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models

    def static() -> StaticEmbedding:
        return StaticEmbedding(Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), embedding_dim=8)

    both = Router.for_query_document(query_modules=[static()], document_modules=[static()])
    SentenceTransformer(modules=[both]).save(str(tmp_path / "router"))
    with pytest.raises(ConfigError, match=r"reads queries with other modules than passages \(Router\)"):
        load_encoder(str(tmp_path / "router"))
    SentenceTransformer(modules=[static()]).save(str(tmp_path / "static"))
    with pytest.raises(ConfigError, match=r"has no maximum length \(StaticEmbedding\)"):
        load_encoder(str(tmp_path / "static"))


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


def test_settings_are_what_the_files_say_of_pooling_and_tokens(minilm: Encoder, tmp_path: Path) -> None:
    packaged = encoder_folder("minilm")
    own = shutil.copytree(packaged, tmp_path / "own", ignore=shutil.ignore_patterns("*.safetensors"))
    assert settings_of(minilm) == settings_digest(packaged) == settings_digest(own)
    pooling, tokens = own / "1_Pooling" / "config.json", own / "tokenizer.json"
    said = json.loads(pooling.read_text())
    # Only how it is written, and what is set anew wherever it is used.
    pooling.write_text(json.dumps(said))
    tokens.write_text(json.dumps({**json.loads(tokens.read_text()), "truncation": None}))
    assert settings_digest(own) == settings_of(minilm)
    pooling.write_text(json.dumps(said | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))
    assert settings_digest(own) != settings_of(minilm)
    pooling.write_text("{")
    with pytest.raises(ConfigError, match=r"1_Pooling/config\.json is damaged: Expecting"):
        settings_digest(own)


class Pooled(StubEncoder):
    """Of the same weights, whatever its settings."""

    def __init__(self, settings: str) -> None:
        super().__init__()
        self.settings = settings


def test_an_encoder_of_the_same_weights_and_other_settings_is_another(corpus: Path, tmp_path: Path) -> None:
    def built(name: str, encoder: Encoder, **options: bool) -> Manifest:
        return build_index(BuildOptions((str(corpus),), tmp_path / name, encoder=encoder, **options))

    manifest, other = built("mean", Pooled("mean")), built("cls", Pooled("cls"))
    assert (manifest.encoder.settings, other.encoder.settings) == ("mean", "cls")
    with pytest.raises(EncoderMismatchError, match=r"of other settings than .* another modules\.json"):
        Index.open(tmp_path / "mean", encoder=Pooled("cls"))
    (tmp_path / "more.jsonl").write_text('{"id": "more", "text": "One more."}')
    with pytest.raises(EncoderMismatchError, match="of other settings"):
        plan_add(tmp_path / "mean", [str(tmp_path / "more.jsonl")], encoder=Pooled("cls"))
    with pytest.raises(EncoderMismatchError, match=r"settings 'mean'; .* settings 'cls'"):
        plan_merge(tmp_path / "mean", tmp_path / "cls", tmp_path / "both")


def test_of_an_index_without_settings_nothing_is_asked(corpus: Path, tmp_path: Path) -> None:
    for name, encoder in (("old", StubEncoder()), ("new", Pooled("mean"))):
        build_index(BuildOptions((str(corpus),), tmp_path / name, encoder=encoder))
    old = read_manifest(tmp_path / "old")
    assert "settings" not in json.loads((tmp_path / "old" / "manifest.json").read_text())["encoder"]
    assert Index.open(tmp_path / "old", encoder=Pooled("mean")).digest == old.digest
    assert plan_merge(tmp_path / "old", tmp_path / "new", tmp_path / "both").rows.duplicates == 24
    # What is finished stays as it is, and no vector is made anew.
    again = BuildOptions((str(corpus),), tmp_path / "old", encoder=Pooled("mean"), resume=True, overwrite=True)
    assert plan_build(again).contents.new == 0 and build_index(again) == old


def test_an_encoder_that_reads_less_by_now_is_another(folder: Path) -> None:
    with pytest.raises(EncoderMismatchError, match="'stub-0' reading 20 tokens, but 'stub-0' reads 9 now"):
        Index.open(folder, encoder=StubEncoder(max_length=9))
