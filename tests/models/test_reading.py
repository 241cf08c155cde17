"""Reading: the best answer across passages and windows, against slow and obvious oracles."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import Make, some_neighbours
from torch import Tensor

from ragmoe import ModelError, Neighbours, OutputCache, Passage, RoutingStatistics, load
from ragmoe.models import Answer, QuestionAnsweringOutput, RagmoeBertForQuestionAnswering
from ragmoe.models.windows import collate, tokenize_passages, tokenize_questions, windows
from ragmoe.moe import SequenceRouting

LEAST = torch.finfo(torch.float32).min
QUESTIONS = ["who is at the clinic?", "when is the bank open?", "where is the café?", "what is law?"]
TEXTS = [
    "The clinic by the river, open since 1912; she's the one who runs it.",
    "A bank. " * 12 + "He left.",
    "Where the Zebra was: an archive - 'city law' - and a café.",
    "Short",
    "when 3.5 of the law is what the city knows, who's to say? " * 3,
]
PASSAGES = [Passage(id=f"p{i}", text=text) for i, text in enumerate(TEXTS)]
READ = [PASSAGES[:3], [PASSAGES[3]], PASSAGES[1:], [PASSAGES[4], PASSAGES[0]]]


@pytest.fixture(scope="module")
def model(make: Make) -> RagmoeBertForQuestionAnswering:
    torch.manual_seed(1)
    return make(max_answer_tokens=6)


@pytest.fixture
def neighbours() -> Neighbours:
    return some_neighbours(4)


# -- decoding -----------------------------------------------------------------------------------------------------


def oracle(start_C: Tensor, end_C: Tensor, reach: int) -> tuple[float, int, int, int]:
    """(score, special, first, last) over all candidates one by one."""
    best = (-math.inf, 0, 0, 0)
    for c in (1, 2, 3):
        best = max(best, ((start_C[c] + end_C[c]).item(), c, 0, 0))
    T = len(start_C) - 4
    for i, j in itertools.product(range(T), range(T)):
        if i <= j < i + reach and start_C[4 + i] > LEAST and end_C[4 + j] > LEAST:
            best = max(best, ((start_C[4 + i] + end_C[4 + j]).item(), 0, i, j))
    return best


@pytest.mark.parametrize("reach", [1, 3, 12, 500])
@pytest.mark.parametrize("lift", [-9.0, 0.0, 9.0])
def test_decoding_against_all_spans(
    model: RagmoeBertForQuestionAnswering, monkeypatch: pytest.MonkeyPatch, reach: int, lift: float
) -> None:
    monkeypatch.setattr(model.config, "max_answer_tokens", reach)
    Q, T = 40, 12
    start_QC, end_QC = torch.randn(Q, 4 + T), torch.randn(Q, 4 + T)
    for logits_QC in (start_QC, end_QC):
        logits_QC[:, :4] += lift
    for q in range(Q):
        outside = torch.ones(T, dtype=torch.bool)
        outside[q % 5 : q % 5 + 1 + q % 7] = False
        start_QC[q, 4:][outside], end_QC[q, 4:][outside] = LEAST, LEAST
    kinds = set()
    for q, got in enumerate(model._decode(start_QC, end_QC)):
        score, special, first, last = oracle(start_QC[q], end_QC[q], reach)
        assert got.score == pytest.approx(score, abs=1e-5)
        assert got.special == special
        if not special:
            assert (got.first, got.last) == (first, last)
        assert got.none == pytest.approx((start_QC[q, 0] + end_QC[q, 0]).item(), abs=1e-5)
        kinds.add(bool(special))
    assert kinds == {-9.0: {False}, 0.0: {True, False}, 9.0: {True}}[lift]


def one_by_one(
    model: RagmoeBertForQuestionAnswering, question: str, passages: Sequence[Passage], neighbours: Neighbours | None
) -> Answer:
    """Each window alone through ``forward``, each candidate one by one."""
    tokenizer, config = model.tokenizer, model.config
    asked = tokenize_questions(tokenizer, [question], config.max_length)[0]
    best: Any = None
    masses = []
    for passage in passages:
        text = tokenize_passages(tokenizer, [passage.text])[0]
        for w in windows(tokenizer, asked, text, max_length=config.max_length, stride=config.stride):
            named = neighbours.tensors() if neighbours is not None else {}
            with torch.no_grad():
                output = model(**collate(tokenizer, [w]), **named)
            start_C, end_C = output.start_logits[0], output.end_logits[0]
            score, special, first, last = oracle(start_C, end_C, config.max_answer_tokens)
            # Of every start with every end of the same window.
            masses.append((start_C[1:].unsqueeze(1) + end_C[1:]).flatten().logsumexp(dim=0))
            if best is None or score > best[0]:
                best = (score, special, first, last, passage, w, (start_C[0] + end_C[0]).item())
    score, special, first, last, passage, w, none = best
    mass = torch.stack(masses).logsumexp(dim=0)
    start = None if special else w.offsets[first - w.context_start][0]
    end = None if special else w.offsets[last - w.context_start][1]
    text = ("", "yes", "no", "maybe")[special] or passage.text[start:end]
    kind = "yesno" if special else "span"
    answered = none - score <= config.no_answer_threshold
    return Answer(text, kind, passage.id, start, math.exp(score - mass.item()), none - score, answered)


def close(one: Answer, two: Answer) -> bool:
    numbers = [(one.score, two.score), (one.no_answer_score, two.no_answer_score)]
    rest = [(a.text, a.answer_type, a.passage_id, a.start, a.answered) for a in (one, two)]
    return rest[0] == rest[1] and all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) for a, b in numbers)


def test_reading_against_one_window_at_a_time(model: RagmoeBertForQuestionAnswering, neighbours: Neighbours) -> None:
    got = model.read(QUESTIONS, READ, neighbours)
    for b, answer in enumerate(got):
        assert close(answer, one_by_one(model, QUESTIONS[b], READ[b], neighbours.rows([b])))
        assert 0 < answer.score <= 1
    assert len({answer.passage_id for answer in got}) > 1


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_batches_change_nothing(
    model: RagmoeBertForQuestionAnswering, neighbours: Neighbours, batch_tokens: int
) -> None:
    want = model.read(QUESTIONS, READ, neighbours)
    got = model.read(QUESTIONS, READ, neighbours, batch_tokens=batch_tokens)
    assert all(map(close, got, want))


def test_order_changes_nothing(model: RagmoeBertForQuestionAnswering, neighbours: Neighbours) -> None:
    want = model.read(QUESTIONS, READ, neighbours)
    order = [2, 0, 3, 1]
    got = model.read([QUESTIONS[i] for i in order], [READ[i] for i in order], neighbours.rows(order), batch_tokens=90)
    assert all(close(answer, want[i]) for answer, i in zip(got, order, strict=True))
    turned = model.read(QUESTIONS, [row[::-1] for row in READ], neighbours)
    assert all(map(close, turned, want))


def test_neighbours_reach_the_gate_and_their_absence_is_none(
    model: RagmoeBertForQuestionAnswering, neighbours: Neighbours
) -> None:
    with_them = model.read(QUESTIONS, READ, neighbours)
    without = model.read(QUESTIONS, READ, None)
    assert not all(map(close, with_them, without))
    assert model.read(QUESTIONS, READ, Neighbours.empty(4, 16, 3)) == without


def test_spans_are_verbatim(make: Make) -> None:
    by_id = {passage.id: passage for passage in PASSAGES}
    spans = 0
    for seed in range(4):
        torch.manual_seed(seed)
        reader = make(max_answer_tokens=6)
        with torch.no_grad():
            reader.special_outputs.bias -= 5
        for answer in reader.read(QUESTIONS, READ):
            assert answer.answer_type == "span" and answer.text
            passage = by_id[answer.passage_id]
            assert passage.text[answer.start : answer.start + len(answer.text)] == answer.text
            spans += 1
    assert spans == 16


# -- crafted logits -----------------------------------------------------------------------------------------------


def craft(model: RagmoeBertForQuestionAnswering, monkeypatch: pytest.MonkeyPatch, word: str, **special: float) -> None:
    """Let the model find a word (start and end on its token) and score none, yes, no and maybe as told."""
    token = model.tokenizer.convert_tokens_to_ids(word)
    assert token != model.tokenizer.unk_token_id

    def forward(input_ids: Tensor, context_mask: Tensor, **_: Any) -> QuestionAnsweringOutput:
        logits_QT = torch.where(input_ids == token, 10.0, 0.0).masked_fill(~context_mask, LEAST)
        four = torch.tensor([special.get(name, -9.0) for name in ("none", "yes", "no", "maybe")])
        logits_QC = torch.cat([four.expand(len(input_ids), 4), logits_QT], dim=1)
        return QuestionAnsweringOutput(start_logits=logits_QC, end_logits=logits_QC.clone())

    monkeypatch.setattr(model, "forward", forward)


LONG = "The river of the city. " * 30 + "In the end: zebra"


def test_a_span_at_the_end_of_a_long_passage_is_found(
    model: RagmoeBertForQuestionAnswering, monkeypatch: pytest.MonkeyPatch
) -> None:
    craft(model, monkeypatch, "zebra")
    assert len(tokenize_passages(model.tokenizer, [LONG])[0].ids) > 3 * model.config.max_length
    answer = model.read(["what?"], [[PASSAGES[0], Passage(id="long", text=LONG)]])[0]
    assert (answer.text, answer.passage_id, answer.start) == ("zebra", "long", len(LONG) - 5)
    assert answer.answered and answer.final_text == "zebra"


def test_every_place_in_a_long_passage_is_read(
    model: RagmoeBertForQuestionAnswering, monkeypatch: pytest.MonkeyPatch
) -> None:
    craft(model, monkeypatch, "zebra")
    words = ["river"] * 120
    for place in range(0, 120, 7):
        text = " ".join([*words[:place], "zebra", *words[place:]])
        answer = model.read(["what?"], [[Passage(id="long", text=text)]])[0]
        assert (answer.text, answer.start) == ("zebra", 6 * place)


def test_yes_no_and_maybe(model: RagmoeBertForQuestionAnswering, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("yes", "no", "maybe"):
        craft(model, monkeypatch, "zebra", **{word: 11.0})
        answer = model.read(["is it?"], [[PASSAGES[2], PASSAGES[0]]])[0]
        assert (answer.text, answer.answer_type, answer.start) == (word, "yesno", None)
        assert answer.passage_id in {"p0", "p2"}


def test_no_answer_is_decided_by_the_threshold(
    model: RagmoeBertForQuestionAnswering, monkeypatch: pytest.MonkeyPatch
) -> None:
    craft(model, monkeypatch, "zebra", none=11.0)
    for threshold, answered in ((1.9, False), (2.0, True), (2.1, True)):
        monkeypatch.setattr(model.config, "no_answer_threshold", threshold)
        answer = model.read(["what?"], [[PASSAGES[2]]])[0]
        assert answer.no_answer_score == pytest.approx(2.0)
        assert answer.text == "Zebra" and answer.answered is answered
        assert answer.final_text == ("Zebra" if answered else "")


def test_an_expert_may_have_a_threshold_of_its_own(model: RagmoeBertForQuestionAnswering) -> None:
    """It holds for what most tokens take to the expert, read or remembered, and for nothing else."""
    model = copy.deepcopy(model)
    model.config.no_answer_threshold, model.config.expert_thresholds = 0.25, [None, -50.0, None, 50.0]
    for called, threshold in (([0, 2], 0.25), ([0, 1], -50.0), ([2, 3], 50.0)):
        for layer in model.moe_layers:
            layer.gate.balance_bias.zero_()
            layer.gate.balance_bias[called] = 100.0
        answers = model.read(QUESTIONS, READ)
        assert {answer.threshold for answer in answers} == {threshold}, called
        assert [answer.answered for answer in answers] == [a.no_answer_score <= threshold for a in answers]
        model.output_cache = OutputCache()
        assert model.read(QUESTIONS, READ) == model.read(QUESTIONS, READ) == answers
        model.output_cache = None
    model.hold_back([3])
    assert {answer.threshold for answer in model.read(QUESTIONS, READ)} == {0.25}


def test_most_tokens_are_half_of_them_in_the_mean_of_the_layers(model: RagmoeBertForQuestionAnswering) -> None:
    model = copy.deepcopy(model)
    model.config.expert_thresholds = [None, None, None, 50.0]
    for calls, threshold in ((10.0, 50.0), (9.0, 0.0)):
        chosen_LE = np.array([[10.0, 10.0, 10.0 - calls, calls], [10.0, 10.0, 10.0, 0.0]])
        routing = SequenceRouting(10.0, np.zeros(2), np.zeros((2, 2)), chosen_LE)
        assert model._threshold(routing) == threshold
    two = SequenceRouting(10.0, np.zeros(2), np.zeros((2, 2)), np.array([[0.0, 6.0, 6.0, 8.0]] * 2))
    model.config.expert_thresholds = [None, 1.0, 2.0, 3.0]
    assert model._threshold(two) == 3.0 and model._threshold(None) == 0.0


def test_the_score_is_a_share_of_all_that_was_read(
    model: RagmoeBertForQuestionAnswering, monkeypatch: pytest.MonkeyPatch
) -> None:
    craft(model, monkeypatch, "zebra")
    one = model.read(["what?"], [[Passage(id="a", text="zebra")]])[0]
    two = model.read(["what?"], [[Passage(id="a", text="zebra"), Passage(id="b", text="zebra")]])[0]
    assert one.score == pytest.approx(1.0, abs=1e-3) and two.score == pytest.approx(0.5, abs=1e-3)


def test_nothing_to_read(model: RagmoeBertForQuestionAnswering) -> None:
    nothing, something = model.read(QUESTIONS[:2], [[], [PASSAGES[0]]])
    assert nothing == Answer("", "span", None, None, 0.0, math.inf, False)
    assert nothing.final_text == "" and something.passage_id == "p0"
    assert model.read([], []) == []


def test_a_passage_without_text_beside_another(model: RagmoeBertForQuestionAnswering) -> None:
    empty = Passage(id="empty", text="")
    answer = model.read(["who?"], [[empty, PASSAGES[0]]])[0]
    assert answer.text
    alone = model.read(["who?"], [[empty]])[0]
    assert alone.answer_type == "yesno" and alone.text in {"yes", "no", "maybe"}


# -- statistics and routes ----------------------------------------------------------------------------------------


def test_statistics_count_tokens_and_never_padding(
    model: RagmoeBertForQuestionAnswering, neighbours: Neighbours
) -> None:
    domains = ["a", "b", "a", "c"]
    found = []
    for batch_tokens in (1, 100_000):
        statistics = RoutingStatistics(model.sparse_layers, model.config.experts)
        model.read(QUESTIONS, READ, neighbours, batch_tokens=batch_tokens, statistics=statistics, domains=domains)
        found.append(statistics)
    lengths = [len(s.window) for s in model._sequences(QUESTIONS, READ)]
    want = sum(lengths) * model.config.top_k
    for statistics in found:
        assert (statistics.counts_DLE.sum(axis=(0, 2)) == want).all()
        assert sorted(statistics.domains) == ["a", "b", "c"]
    assert np.allclose(found[0].load_LE, found[1].load_LE)
    assert found[0].summary()["gate_entropy"] == pytest.approx(found[1].summary()["gate_entropy"], rel=1e-5)


def test_route_is_the_mean_gate(model: RagmoeBertForQuestionAnswering, neighbours: Neighbours) -> None:
    row = neighbours.rows([0])
    route_LE = model.route(QUESTIONS[0], READ[0], row)
    assert route_LE.shape == (2, 4) and np.allclose(route_LE.sum(axis=1), 1.0, atol=1e-5)
    total, tokens = torch.zeros(2, 4), 0
    for sequence in model._sequences([QUESTIONS[0]], [READ[0]]):
        routings = model(**collate(model.tokenizer, [sequence.window]), **row.tensors()).routings
        total += torch.stack([r.logits_SE.softmax(dim=1).sum(dim=0) for r in routings]).detach()
        tokens += len(sequence.window)
    assert np.allclose(route_LE, (total / tokens).numpy(), atol=1e-5)
    assert not np.allclose(route_LE, model.route(QUESTIONS[0], READ[0], None), atol=1e-4)


# -- answering from an index --------------------------------------------------------------------------------------


class FakeIndex:
    """Returns the same ranking for all; remembers what it was asked."""

    def __init__(self, digest: str = "ab" * 32) -> None:
        self.asked: list[tuple[list[str], int]] = []
        self.ranked = some_neighbours(1, n=5)
        width = self.ranked.embeddings_BNR.shape[2]
        self.manifest = SimpleNamespace(encoder=SimpleNamespace(id="other", digest=digest, width=width))

    def neighbours(self, questions: Sequence[str], n: int) -> Neighbours:
        self.asked.append((list(questions), n))
        n = min(n, 5)
        row = self.ranked
        ids = [f"p{i}" for i in range(n)]
        one = Neighbours(row.embeddings_BNR[:, :n], row.scores_BN[:, :n], row.mask_BN[:, :n], [ids])
        return one.rows([0] * len(questions))

    def passages(self, ids: Sequence[str]) -> list[Passage]:
        return [PASSAGES[int(name[1:])] for name in ids]


@pytest.mark.parametrize(("passages", "seen"), [(2, 4), (4, 2), (3, 3), (2, 0)])
def test_answer_reads_the_best_and_shows_the_gate_its_own(
    model: RagmoeBertForQuestionAnswering, passages: int, seen: int
) -> None:
    index = FakeIndex()
    got = model.answer(QUESTIONS, index, passages=passages, neighbours=seen)
    assert index.asked == [(QUESTIONS, max(passages, seen))]
    ranked = index.ranked
    shown = Neighbours(ranked.embeddings_BNR[:, :seen], ranked.scores_BN[:, :seen], ranked.mask_BN[:, :seen])
    want = model.read(QUESTIONS, [PASSAGES[:passages]] * 4, shown.rows([0] * 4) if seen else None)
    assert all(map(close, got, want))


def test_answer_shows_as_many_neighbours_as_it_was_trained_with(make: Make) -> None:
    index = FakeIndex()
    make(neighbours=4).answer(QUESTIONS, index, passages=2)
    assert index.asked[0][1] == 4


def test_an_index_of_another_encoder_is_refused(make: Make) -> None:
    trained = {"id": "minilm", "digest": "ab" * 32}
    make(encoder=trained).answer(QUESTIONS[:1], FakeIndex())
    with pytest.raises(
        ModelError, match=r"trained on embeddings of minilm \(abab.*holds those of other \(cdcd"
    ) as error:
        make(encoder=trained).answer(QUESTIONS[:1], FakeIndex("cd" * 32))
    assert "ragmoe index build SOURCE --encoder minilm --out DIR" in str(error.value)
    make(encoder=trained, gate="token").answer(QUESTIONS[:1], FakeIndex("cd" * 32))


# -- what does not fit --------------------------------------------------------------------------------------------


def test_lists_of_different_lengths(model: RagmoeBertForQuestionAnswering) -> None:
    with pytest.raises(ValueError, match="4 questions, but passages for 1"):
        model.read(QUESTIONS, READ[:1])
    with pytest.raises(ValueError, match="4 questions, but neighbours for 5"):
        model.read(QUESTIONS, READ, some_neighbours(5))
    with pytest.raises(ValueError, match="4 questions, but domains for 2"):
        model.read(QUESTIONS, READ, domains=["a", "b"])


def test_without_a_tokenizer(make: Make) -> None:
    reader = make()
    reader.tokenizer = None
    with pytest.raises(ModelError, match=r"has no tokenizer: set model\.tokenizer"):
        reader.read(QUESTIONS[:1], READ[:1])


def test_the_tokenizer_beside_a_bundle_is_found(make: Make, tmp_path: Any) -> None:
    reader = make()
    reader.tokenizer.save_pretrained(tmp_path)
    reader.save_pretrained(tmp_path)
    again = RagmoeBertForQuestionAnswering.from_pretrained(tmp_path)
    assert again.read(QUESTIONS, READ) == reader.read(QUESTIONS, READ)


def test_it_is_found_from_elsewhere_too(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="bare has no tokenizer that could be opened"):
        load(tmp_path / "bare").read(QUESTIONS, READ)
    reader = make()
    reader.tokenizer.save_pretrained(tmp_path / "here")
    reader.save_pretrained(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    again = load("here")
    monkeypatch.chdir(tmp_path / "bare")
    assert again.read(QUESTIONS, READ) == reader.read(QUESTIONS, READ)


def test_sequences_longer_than_the_model(make: Make) -> None:
    with pytest.raises(ModelError, match="max_length is 200, but the model has 128 positions"):
        make(max_length=200).read(QUESTIONS[:1], READ[:1])


def test_reading_leaves_training_mode(make: Make) -> None:
    reader = make(gate_noise=5.0, token_dropout=0.5).train()
    row = some_neighbours(1)
    assert reader.read(QUESTIONS[:1], READ[:1], row) == reader.read(QUESTIONS[:1], READ[:1], row)


def test_batches_are_small_on_a_processor(model: RagmoeBertForQuestionAnswering) -> None:
    text = "the river city open " * 40
    read = [Passage(f"p{i}", text, "t", "d", "doc") for i in range(20)]
    sizes = [batch["input_ids"].numel() for batch in model.batches(["who"], [read])]
    assert len(sizes) > 1 and max(sizes) <= 2048 < sum(sizes)
    assert len(list(model.batches(["who"], [read], batch_tokens=100_000))) == 1
