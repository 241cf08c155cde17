"""A generator: what it says, whatever it is batched with, what it cites, and how it is kept."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoder import byte_tokenizer, tiny_llama

from ragmoe import DataError, Index, ModelError, Passage, Question
from ragmoe.evaluation.choices import accuracy, choose, multiple_choice
from ragmoe.generation import REFUSAL, Generator, PromptStyle, is_generator
from ragmoe.generation.answers import read_answer
from ragmoe.generation.likelihood import log_likelihoods
from ragmoe.generation.prompts import Prompt
from ragmoe.models.initialising import init
from ragmoe.moe import RoutingStatistics

STYLE = PromptStyle(max_length=700, max_answer_tokens=12)
QUESTIONS = ["who keeps the quay?", "when is the lock open, and by whom, on an ordinary day?", "map?"]


def generator(**style: Any) -> Generator:
    return Generator(
        tiny_llama(), byte_tokenizer(), PromptStyle(**{"max_length": 700, "max_answer_tokens": 12, **style})
    )


def small() -> Generator:
    return Generator(tiny_llama(num_hidden_layers=1), byte_tokenizer(), PromptStyle("refuse", 700, 24))


def taught(made: Generator, question: str, passages: list[Passage], answer: str, steps: int = 35) -> None:
    """Let the model learn one answer by heart."""
    gold = passages[0] if passages else None
    prompt = made.prompts.make(question, passages, gold=0 if gold else None, answer=answer)
    ids = torch.tensor([[*prompt.ids, *prompt.answer_ids]])
    labels = ids.clone()
    labels[:, : len(prompt.ids)] = -100
    optimiser = torch.optim.Adam(made.model.parameters(), lr=1e-2)
    for _ in range(steps):
        made.model(ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.fixture(scope="module")
def anna(index: Index) -> Generator:
    """A generator that has learned who keeps the quay."""
    made = small()
    taught(made, QUESTIONS[0], index.passages(index.neighbours(QUESTIONS[:1], 2).passage_ids[0]), "Anna")
    return made


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer that could be opened"):
        Generator.load(tmp_path)


def test_a_batch_changes_nothing_and_scores_are_probabilities(index: Index) -> None:
    made = generator()
    read = [index.passages(ids[:n]) for n, ids in zip((2, 3, 0), index.neighbours(QUESTIONS, 3).passage_ids)]
    together = made.read(QUESTIONS, read)
    refusal = made.prompts.answer_ids(REFUSAL)
    for question, passages, answer in zip(QUESTIONS, read, together, strict=True):
        alone = made.read([question], [passages], batch_tokens=1)[0]
        assert (alone.said, alone.cited) == (answer.said, answer.cited)
        assert alone.score == pytest.approx(answer.score, rel=1e-3)
        # Token by token, without a cache and without padding.
        ids, nats = made.prompts.make(question, passages).ids, 0.0
        for _ in range(12):
            with torch.no_grad():
                row = made.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            nats += row.max().item()
            ids.append(int(row.argmax()))
            if ids[-1] == 2:
                break
        assert answer.score == pytest.approx(math.exp(nats), rel=1e-3)
        start = made.prompts.make(question, passages).ids
        with torch.no_grad():
            logits = made.model(torch.tensor([[*start, *refusal]])).logits[0].log_softmax(-1)
        p = math.exp(sum(logits[len(start) - 1 + i, t].item() for i, t in enumerate(refusal)))
        assert answer.no_answer_score == pytest.approx(math.log(p / (1 - p)), rel=1e-3)


def test_what_it_learned_it_answers_and_cites(anna: Generator, index: Index) -> None:
    answer = anna.answer(QUESTIONS[:1], index, passages=2)[0]
    assert (answer.text, answer.said, answer.cited, answer.passage_id) == ("Anna", "Anna [1]", ("quay",), "quay")
    assert answer.answered and answer.score > 0.5 and answer.no_answer_score < 0 and answer.start is None
    made = small()
    taught(made, QUESTIONS[2], [], REFUSAL, steps=60)
    refused = made.answer(QUESTIONS[2:], index, passages=0)[0]
    assert (refused.text, refused.said, refused.cited, refused.answered) == ("", REFUSAL, (), False)
    assert refused.no_answer_score > 0


def test_passages_without_room_are_told() -> None:
    long = [Passage(f"p{i}", "word " * 60) for i in range(3)]
    answer = generator().read(["what?"], [long])[0]
    assert answer.left_out == 2 and answer.shortened == 0


@pytest.mark.parametrize(
    ("said", "text", "cited"),
    [
        ("It is so [2]. And so [1, 2].", "It is so. And so.", ("b", "a")),
        ("so [7] [0]", "so", ()),
        ("Not in the documents. [1]", "", ()),
        (" [2]", "", ()),
        ("<think>\n\n</think>\n\nParis [1]", "Paris", ("a",)),
        ("<think>Says [1] so?</think> Not in the documents", "", ()),
        ("<think>It could be [2]", "", ()),
        ("It could be [2], or not.</think>\n\nParis [1]", "Paris", ("a",)),
    ],
)
def test_words_are_read(said: str, text: str, cited: tuple[str, ...]) -> None:
    prompt = Prompt([1], [], (Passage("a", "x"), Passage("b", "y")))
    answer = read_answer(prompt, said, -0.1, 0.0)
    assert (answer.text, answer.cited, answer.answered) == (text, cited, bool(text))
    assert answer.no_answer_score == math.inf


def test_it_is_kept_as_it_was(tmp_path: Path, index: Index) -> None:
    made = Generator(tiny_llama(), byte_tokenizer(chat=True), PromptStyle("memory", 650, 9))
    made.save(tmp_path / "kept")
    again = Generator.load(tmp_path / "kept")
    assert again.style == made.style and is_generator(tmp_path / "kept") and not is_generator(tmp_path)
    assert again.answer(QUESTIONS, index) == made.answer(QUESTIONS, index)
    (tmp_path / "kept" / "prompt.json").write_text('{"length": 3}')
    with pytest.raises(ModelError, match=r"prompt\.json is damaged.*length"):
        Generator.load(tmp_path / "kept")
    with pytest.raises(ModelError, match="holds no causal language model"):
        Generator.load(tmp_path)
    with pytest.raises(ModelError, match="up to 4096 tokens, but the model has 1024 positions"):
        Generator(tiny_llama(), byte_tokenizer(), PromptStyle(max_length=4096))


def test_neighbours_are_given_by_name_to_gates_that_see_them(index: Index) -> None:
    made = generator()
    plain = made.answer(QUESTIONS, index)
    model, seen = made.model, []
    forward, generate = model.forward, model.generate
    names = ("neighbour_embeddings", "neighbour_scores", "neighbour_mask")

    def watching(call: Any) -> Any:
        def watched(**inputs: Any) -> Any:
            taken = [inputs.pop(name) for name in names]
            seen.append((inputs["input_ids"], *taken))
            return call(**inputs)

        return watched

    model.gate_sees_neighbours, model.config.neighbours = True, 2
    model.generate = lambda **inputs: (
        seen.append((inputs["input_ids"], *(inputs.pop(name) for name in names))),
        setattr(model, "forward", forward),
        generate(**inputs),
        setattr(model, "forward", watching(forward)),
    )[2]
    model.forward = watching(forward)
    assert made.answer(QUESTIONS, index) == plain
    asked = index.neighbours(QUESTIONS, 2)
    # Once to generate and once for the refusal, the longest prompt first each time.
    assert len(seen) == 2
    order = sorted(
        range(3), key=lambda i: -len(made.prompts.ids(QUESTIONS[i], index.passages(list(index.passage_ids))))
    )
    for _, embeddings, scores, mask in seen:
        assert torch.equal(embeddings, asked.embeddings_BNR[order]) and torch.equal(mask, asked.mask_BN[order])
        assert torch.equal(scores, asked.scores_BN[order])


def test_choices_by_hand() -> None:
    # In all the short one is likelier; for a character the long one.
    assert choose([-4.0, -6.0], ["ab", "abcdef"]) == (0, 1)
    assert choose([-1.0, -1.0], ["a", "b"]) == (0, 0)


def test_a_taught_answer_is_chosen(anna: Generator, index: Index) -> None:
    meta = {"choices": ["Bert and others", "Anna", "nobody"]}
    asked = Question("q", QUESTIONS[0], ("Anna",), "text", ("quay",), "port", meta=meta)
    wrong = Question("w", QUESTIONS[0], ("nobody",), "text", ("quay",), "land", meta=meta)
    chosen = multiple_choice(anna, [asked, wrong], index, passages=2)
    assert [choice.by_sum for choice in chosen] == [1, 1]
    # Judged token by token, without the end of the answer.
    prompt = anna.prompts.make(
        QUESTIONS[0], index.passages(["quay", index.neighbours(QUESTIONS[:1], 2).passage_ids[0][1]])
    )
    after = anna.prompts.answer_ids("nobody")[:-1]
    with torch.no_grad():
        logits = anna.model(torch.tensor([[*prompt.ids, *after]])).logits[0].log_softmax(-1)
    alone = sum(logits[len(prompt.ids) - 1 + i, t].item() for i, t in enumerate(after))
    assert chosen[0].nats[2] == pytest.approx(alone, rel=1e-4)
    found = accuracy(chosen)
    assert found["all"]["accuracy"] == 50.0 and found["port"] == {
        "accuracy": 100.0,
        "accuracy_by_length": 100.0,
        "n": 1,
    }
    with pytest.raises(DataError, match=r"meta\.choices is \['Anna', ' '\]"):
        multiple_choice(anna, [Question("n", "?", ("Anna",), meta={"choices": ["Anna", " "]})], index)
    with pytest.raises(DataError, match=r"meta\.choices is None"):
        multiple_choice(anna, [Question("n", "?", ("a",))], index)
    with pytest.raises(DataError, match="none of its choices"):
        multiple_choice(anna, [Question("n", "?", ("a",), meta={"choices": ["b", "c"]})], index)
    with pytest.raises(DataError, match="no question was asked"):
        accuracy([])


def test_a_turn_that_ends_before_the_text_does() -> None:
    """A model says nothing behind the end of its turn, so nothing there is judged."""
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}#\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    model = tiny_llama(num_hidden_layers=1)
    assert tokenizer.decode(Generator(model, tokenizer).prompts.answer_ids("Anna")) == "Anna#\n</s>"
    model.generation_config.eos_token_id = tokenizer("#", add_special_tokens=False)["input_ids"]
    made = Generator(model, tokenizer, PromptStyle("refuse", 700, 24))
    # What is learned and what is judged are the same.
    assert tokenizer.decode(made.prompts.answer_ids("Anna")) == "Anna#"
    judged = made.likelihoods("who?", [], ["Anna"])[0]
    assert judged.tokens == len(tokenizer("Anna", add_special_tokens=False)["input_ids"])


def test_neighbours_of_other_questions_are_refused(index: Index) -> None:
    made, neighbours = generator(), index.neighbours(QUESTIONS, 2)
    with pytest.raises(ValueError, match="2 questions, but neighbours for 3"):
        made.read(QUESTIONS[1:], [[], []], neighbours)
    with pytest.raises(ValueError, match="one question, but neighbours for 3"):
        made.likelihoods(QUESTIONS[0], [], ["Anna"], neighbours)
    with pytest.raises(ValueError, match="1 continuations, but neighbours for 3"):
        log_likelihoods(made.model, [([5], [6])], neighbours)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"without_gold": "refusal"}', "without_gold is 'refusal': expected refuse or memory"),
        ('{"max_length": "512"}', "max_length is '512': expected a number of tokens"),
        ('{"max_length": 64}', "max_answer_tokens is 64, of which max_length, 64, must be more"),
    ],
)
def test_a_prompt_style_that_cannot_be_is_told(content: str, message: str, tmp_path: Path) -> None:
    generator().save(tmp_path)
    (tmp_path / "prompt.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        Generator.load(tmp_path)


def test_a_large_vocabulary_makes_smaller_batches(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read = generator(), [index.passages(["quay"])] * 3
    whole = made.read(QUESTIONS, read)
    sizes: list[int] = []
    said = made._said
    monkeypatch.setattr(made, "_said", lambda inputs: sizes.append(len(inputs["input_ids"])) or said(inputs))
    monkeypatch.setattr("ragmoe.generation.generator._LOGITS", 2 * 12 * made.config.vocab_size)
    assert [answer.said for answer in made.read(QUESTIONS, read)] == [answer.said for answer in whole]
    assert sizes == [2, 1]


def test_a_decoder_with_gates_opens_in_a_process_that_knows_none_yet(tmp_path: Path) -> None:
    from ragmoe.models.initialising import init

    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    init(tmp_path / "base", out=tmp_path / "made", experts=2, expert_rank=8, gate_width=8)
    code = f"from ragmoe.generation import Generator; print(Generator.load({str(tmp_path / 'made')!r}).config.gate)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "retrieval\n"), done.stderr


def test_the_routing_of_prompts_is_counted_whatever_the_batch(index: Index, tmp_path: Path) -> None:
    Generator(tiny_llama(), byte_tokenizer(), STYLE).save(tmp_path / "dense")
    init(tmp_path / "dense", out=tmp_path / "sparse", experts=4, expert_rank=8, neighbour_width=index.width)
    made = Generator.load(tmp_path / "sparse")
    assert list(made.sparse_layers) == [0, 1] and len(made.expert_names) == 4
    found = index.neighbours(QUESTIONS, 3)
    read = [index.passages(ids[:n]) for n, ids in zip((2, 3, 0), found.passage_ids)]
    counted = {}
    for batch_tokens in (1, 100_000):
        counted[batch_tokens] = RoutingStatistics(made.sparse_layers, 4)
        made.read(
            QUESTIONS, read, found, batch_tokens=batch_tokens, statistics=counted[batch_tokens], domains=QUESTIONS
        )
    one, all_at_once = counted.values()
    for question, passages in zip(QUESTIONS, read):
        tokens = len(made.prompts.make(question, passages).ids)
        alone, together = one.of_domain[question], all_at_once.of_domain[question]
        assert alone.tokens == together.tokens == tokens
        assert (alone.chosen_LE == together.chosen_LE).all() and alone.chosen_LE.sum(axis=1).tolist() == [
            2 * tokens
        ] * 2
    dense = RoutingStatistics([], 1)
    Generator.load(tmp_path / "dense").read(QUESTIONS, read, statistics=dense)
    assert not dense.of_domain


def test_a_bases_own_way_of_generating_changes_no_answer(index: Index) -> None:
    """A penalty of repetition is one of quoting what was read."""
    made = generator()
    plain = made.answer(QUESTIONS, index)
    config = made.model.generation_config
    config.repetition_penalty, config.num_return_sequences, config.no_repeat_ngram_size = 1.5, 2, 2
    config.do_sample, config.min_new_tokens = True, 9
    assert made.answer(QUESTIONS, index) == plain


@pytest.mark.parametrize(("name", "is_one"), [("GPT2LMHeadModel", True), ("BertModel", False)])
def test_models_that_are_called_after_their_head(name: str, is_one: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"architectures": ["{name}"]}}')
    assert is_generator(tmp_path) is is_one


def test_a_model_that_answers_nan_says_nothing(index: Index, tmp_path: Path) -> None:
    Generator(tiny_llama(num_hidden_layers=1), byte_tokenizer(), STYLE).save(tmp_path / "dense")
    names = ["quays", "locks", "maps"]
    init(tmp_path / "dense", out=tmp_path / "sparse", experts=3, expert_rank=8, neighbour_width=32, expert_names=names)
    sparse, dense = Generator.load(tmp_path / "sparse"), generator()
    with torch.no_grad():
        # Whichever the gates choose.
        for expert in (0, 2):
            next(iter(sparse.model.expert_modules().values())).down_b[expert] = math.nan
        dense.model.lm_head.weight[5] = math.nan
    told = {"expert quays, maps holds NaN or infinity in .*down": sparse, "answers NaN: its weights are broken": dense}
    for message, made in told.items():
        with pytest.raises(ModelError, match=message):
            made.read(QUESTIONS[:1], [[]])
        with pytest.raises(ModelError, match=message):
            made.likelihoods(QUESTIONS[0], [], ["Anna", "Bert"])
