"""From questions to batches: the order of a run, targets, windows, neighbours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from ragmoe import DataError, Index, Neighbours, Passage, Question
from ragmoe.corpus.types import Span
from ragmoe.training import load_config, prepare, retrieved
from ragmoe.training.config import DataConfig, RaftConfig
from ragmoe.training.data import RaftCollator, hold_out, load_questions, training_questions
from ragmoe.training.raft import Example
from ragmoe.training.retrieved import Retrieved
from ragmoe.training.run import Run

Config = Callable[..., dict[str, Any]]


@pytest.fixture
def run(config: Config) -> Run:
    return prepare(load_config(config(**{"train.steps": 20, "raft.gold_probability": 1.0})))


def test_every_question_is_shown_once_a_pass(run: Run) -> None:
    n = len(run.dataset.questions)
    # A pass may end within a bucket of batches, so whole passes are counted, not their borders.
    assert len(run.dataset) == 80
    shown = Counter(run.dataset.order)
    assert set(shown) == set(range(n))
    assert max(shown.values()) - min(shown.values()) <= 1


def test_the_order_is_fixed_by_the_seed_and_the_same_for_every_arm(config: Config) -> None:
    orders = [
        prepare(load_config(config(**{"model.gate": gate, "seed": seed}))).dataset.order
        for gate, seed in (("token", 0), ("retrieval", 0), ("token", 1))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_targets_are_the_answers(run: Run) -> None:
    tokenizer = run.collator.tokenizer
    seen = Counter()
    for at in range(24):
        example = run.dataset[at]
        batch = run.collator([example])
        assert batch["input_ids"].shape[0] == batch["start_positions"].numel() == 2
        for m in range(2):
            start, end = batch["start_positions"][0, m].item(), batch["end_positions"][0, m].item()
            if m != example.gold:
                assert start == end == 0
                seen["none"] += 1
            elif example.span is None:
                assert start == end == {"yes": 1, "no": 2, "maybe": 3}[example.question.answers[0]]
                seen["yesno"] += 1
            else:
                text = tokenizer.decode(batch["input_ids"][m, start - 4 : end - 3])
                assert text.replace(" ", "") == example.span.text
                assert batch["context_mask"][m, start - 4 : end - 3].all()
                seen["span"] += 1
    assert set(seen) == {"none", "yesno", "span"}


def test_an_unanswerable_question_reads_the_passage_it_was_asked_over(run: Run) -> None:
    place = next(i for i in range(len(run.dataset)) if not run.dataset.questions[run.dataset.order[i]].answers)
    example = run.dataset[place]
    assert example.question.context_ids[0] in [passage.id for passage in example.passages]
    assert not run.collator([example])["start_positions"].any()


@pytest.mark.parametrize("seed", range(12))
def test_a_window_of_a_long_passage_holds_the_answer(run: Run, seed: int) -> None:
    text = " ".join(["river"] * 150 + ["zebra"] + ["city"] * 150)
    passage = Passage("long", text)
    span = Span("long", text.index("zebra"), "zebra")
    question = Question("q", "where is the zebra?", ("zebra",), gold_ids=("long",), answer_spans=(span,))
    example = Example(question, [passage], 0, span, Neighbours.empty(1, 64), seed)
    collator = RaftCollator(run.collator.tokenizer, RaftConfig(passages=1, max_length=48))
    batch = collator([example])
    assert batch["input_ids"].shape[1] == 48
    start = batch["start_positions"].item() - 4
    assert collator.tokenizer.decode(batch["input_ids"][0, start]) == "zebra"


def test_too_few_distractors_are_filled_with_empty_passages(run: Run) -> None:
    passage = Passage("only", "the river is open")
    question = Question("q", "what is open?", ("river",), answer_spans=(Span("only", 4, "river"),))
    example = Example(question, [passage], 0, question.answer_spans[0], Neighbours.empty(1, 64), 0)
    batch = RaftCollator(run.collator.tokenizer, RaftConfig(passages=3, max_length=48))([example])
    assert batch["start_positions"].shape == (1, 3)
    assert not batch["context_mask"][1:].any()


def test_neighbours_depend_on_the_question_alone(world: Path, tmp_path: Path) -> None:
    index = Index.open(world / "index")
    found = Retrieved.of(index, ["who keeps the ferry?"], 4, None, tmp_path)
    direct = index.neighbours(["who keeps the ferry?"], 4)
    assert found.ids(0) == direct.passage_ids[0]
    row = found.neighbours(0, 4)
    torch.testing.assert_close(row.embeddings_BNR, direct.embeddings_BNR, atol=1e-3, rtol=0)
    torch.testing.assert_close(row.scores_BN, direct.scores_BN)


def test_retrieval_is_taken_from_the_cache_the_second_time(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index.open(world / "index")
    first = Retrieved.of(index, ["who keeps the map?"], 3, "bm25", tmp_path)
    monkeypatch.setattr(Index, "neighbours", lambda *a, **k: pytest.fail("retrieved again"))
    again = Retrieved.of(index, ["who keeps the map?"], 3, "bm25", tmp_path)
    np.testing.assert_array_equal(first.rows_QN, again.rows_QN)


def test_progress_of_retrieving(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieved, "_CHUNK", 2)
    index, texts, told = Index.open(world / "index"), [f"who keeps the {thing}?" for thing in "abcde"], []
    for _ in range(2):
        # The second time it comes from the cache.
        Retrieved.of(index, texts, 3, None, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]


def watched(index: Index, monkeypatch: pytest.MonkeyPatch, *, fails_at: int = -1) -> list[list[str]]:
    """The questions of each call that retrieves; the call of one number is stopped."""
    asked: list[list[str]] = []
    retrieve = index.neighbours

    def neighbours(texts: list[str], *args: Any, **kwargs: Any) -> Neighbours:
        if len(asked) == fails_at:
            raise KeyboardInterrupt
        asked.append(list(texts))
        return retrieve(texts, *args, **kwargs)

    monkeypatch.setattr(index, "neighbours", neighbours)
    return asked


def test_retrieving_that_was_stopped_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieved, "_CHUNK", 2)
    index, texts, told = Index.open(world / "index"), [f"who keeps the {thing}?" for thing in "abcde"], []
    asked = watched(index, monkeypatch, fails_at=1)
    with pytest.raises(KeyboardInterrupt):
        Retrieved.of(index, texts, 3, None, tmp_path)
    index = Index.open(world / "index")
    rest = watched(index, monkeypatch)
    found = Retrieved.of(index, texts, 3, None, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert asked == [texts[:2]] and rest == [texts[2:4], texts[4:]] and told == [(0, 3), (2, 3), (3, 3)]
    whole = Retrieved.of(Index.open(world / "index"), texts, 3, None, tmp_path / "other")
    np.testing.assert_array_equal(found.rows_QN, whole.rows_QN)
    np.testing.assert_array_equal(found.scores_QN, whole.scores_QN)


def test_a_full_disk_costs_only_retrieving_again(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"torn")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(retrieved, "save_file", full)
    assert Retrieved.of(Index.open(world / "index"), ["who keeps the map?"], 3, None, tmp_path).ids(0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_questions_are_retrieved_for_once_however_they_are_grouped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index.open(world / "index")
    asked = watched(index, monkeypatch)
    Retrieved.of(index, ["who keeps the map?", "who keeps the ferry?"], 3, "bm25", tmp_path)
    both = Retrieved.of(index, ["who tolls?", "who keeps the map?", "who tolls?"], 3, "bm25", tmp_path)
    assert asked == [["who keeps the map?", "who keeps the ferry?"], ["who tolls?"]]
    direct = index.neighbours(["who keeps the map?"], 3, retriever="bm25")
    assert both.ids(0) == both.ids(2) and both.ids(1) == direct.passage_ids[0]
    # Another number of neighbours, or another retriever, is another matter.
    asked.clear()
    Retrieved.of(index, ["who keeps the map?"], 2, "bm25", tmp_path)
    Retrieved.of(index, ["who keeps the map?"], 3, "dense", tmp_path)
    assert len(asked) == 2


def test_a_damaged_or_unwritable_cache_costs_only_retrieving_again(world: Path, tmp_path: Path) -> None:
    index = Index.open(world / "index")
    first = Retrieved.of(index, ["who keeps the map?"], 3, None, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-8])
    again = Retrieved.of(index, ["who keeps the map?"], 3, None, tmp_path / "cache")
    (tmp_path / "file").write_text("no folder")
    third = Retrieved.of(index, ["who keeps the map?"], 3, None, tmp_path / "file")
    for found in (again, third):
        np.testing.assert_array_equal(first.rows_QN, found.rows_QN)
    # What was damaged is whole again.
    assert Retrieved.of(index, ["who keeps the map?"], 3, None, tmp_path / "cache").ids(0) == first.ids(0)
    assert kept.stat().st_size > 0 and not list((tmp_path / "cache").rglob("*.part"))


def test_a_document_is_never_on_both_sides_of_the_calibration_slice(world: Path) -> None:
    questions = load_questions([str(world / "questions.jsonl")])
    fit, held = hold_out(questions, Index.open(world / "index"), 0.3, 100)
    assert fit and held and len(fit) + len(held) == len(questions)
    assert len(hold_out(questions, Index.open(world / "index"), 0.3, 2)[1]) == 2
    named = [{(q.gold_ids or q.context_ids)[0] for q in side} for side in (fit, held)]
    assert not named[0] & named[1]


def test_a_limit_does_not_depend_on_the_order_of_files(world: Path, tmp_path: Path) -> None:
    lines = (world / "questions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "q.jsonl").write_text("".join(reversed(lines)))
    ids = [{q.id for q in load_questions([str(f)], 5)} for f in (world / "questions.jsonl", tmp_path / "q.jsonl")]
    assert ids[0] == ids[1] and len(ids[0]) == 5


def test_no_question_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no question file matches .*none\*.jsonl"):
        load_questions([str(tmp_path / "none*.jsonl")])


def test_replayed_questions_make_up_their_share(world: Path, tmp_path: Path) -> None:
    own = load_questions([str(world / "questions.jsonl")])
    old = tmp_path / "old.jsonl"
    rows = [{"id": f"old-{i}", "question": "What was?", "answers": [], "domain": "old"} for i in range(4 * len(own))]
    old.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"questions": [str(world / "questions.jsonl")], "index": "unused", "replay": [str(old)]}
    mixed = training_questions(DataConfig(**config, replay_share=0.75))
    assert mixed[: len(own)] == own
    assert [q.domain for q in mixed[len(own) :]] == ["old"] * (3 * len(own))
    assert training_questions(DataConfig(**config, replay_share=0.01)) == own


def test_nothing_is_learned_from_twice_and_too_little_to_replay_is_told(world: Path, tmp_path: Path) -> None:
    own = load_questions([str(world / "questions.jsonl")])
    rows = (world / "questions.jsonl").read_text().splitlines()
    (tmp_path / "own.jsonl").write_text("\n".join(rows[:18]) + "\n")
    config = {"questions": [str(tmp_path / "own.jsonl")], "index": "unused", "replay": [str(world / "questions.jsonl")]}
    said: list[str] = []
    assert training_questions(DataConfig(**config, replay_share=0.5), said.append) == own and not said
    assert training_questions(DataConfig(**config, replay_share=0.9), said.append) == own
    assert said[0].startswith("what is replayed makes up 50% of what is learned from, not 90%")


def test_shuffled_neighbours_are_another_questions_and_always_the_same_ones(config: Config) -> None:
    plain = prepare(load_config(config(**{"raft.drop_all": 0.0, "raft.drop_each": 0.0})))
    shuffled = prepare(
        load_config(config(**{"raft.drop_all": 0.0, "raft.drop_each": 0.0, "raft.shuffle_neighbours": True}))
    )
    shown = shuffled.dataset.shown
    assert sorted(shown) == list(range(len(shown))) and all(place != other for place, other in enumerate(shown))
    assert plain.dataset.order == shuffled.dataset.order and plain.dataset.shown == list(range(len(shown)))
    for at in range(6):
        place, ids = shuffled.dataset.order[at], shuffled.dataset[at].neighbours.passage_ids[0]
        own = shuffled.dataset.retrieved.neighbours(shown[place], 4).passage_ids[0]
        assert ids == [name for name in own if name in ids] and len(ids) >= 3
        # What is read is the question's own, as without the shuffling.
        assert [p.id for p in shuffled.dataset[at].passages] == [p.id for p in plain.dataset[at].passages]


def test_gates_are_told_what_they_ask_for(config: Config) -> None:
    names = {"model.expert_names": ["river", "market", "a", "common"]}
    oracle = prepare(load_config(config(**names, **{"model.gate": "oracle", "model.common_experts": 1})))
    memory = prepare(load_config(config(**names, **{"model.gate": "memory"})))
    examples = [oracle.dataset[at] for at in range(4)]
    domains = [["river", "market"].index(example.question.domain) for example in examples]
    assert oracle.collator(examples)["question_domain"].tolist() == domains
    batch = memory.collator([memory.dataset[at] for at in range(4)])
    assert batch["neighbour_votes"].shape == (4, 4, 2, 4) and "question_domain" not in batch
    assert torch.equal(batch["neighbour_votes"].sum(dim=-1)[:, :, 0] > 0, batch["neighbour_mask"])


@pytest.mark.parametrize("gate", ["centroid", "ridge"])
def test_gates_in_closed_form_are_fitted_before_training(config: Config, gate: str) -> None:
    names = {"model.expert_names": ["river", "market", "a", "common"], "model.common_experts": 1}
    run = prepare(load_config(config(**names, **{"model.gate": gate})))
    fitted = [layer.gate for layer in run.model.moe_layers]
    assert all(gate.weight.any() for gate in fitted) and torch.equal(fitted[0].weight, fitted[1].weight)
    dataset = run.dataset
    right = [
        int(fitted[0].domain(dataset.retrieved.neighbours(place, 4))) == ["river", "market"].index(question.domain)
        for place, question in enumerate(dataset.questions)
    ]
    assert sum(right) / len(right) > 0.8


def test_an_answer_that_ends_in_a_character_without_a_token(run: Run) -> None:
    text = "the river is open until zebra city\u200d and the bank is the law"
    passage, start = Passage("joined", text), text.index("zebra")
    question = Question("q", "until when?", ("zebra city\u200d",), "span", ("joined",), "river")
    for answer, target in (("zebra city\u200d", "zebra city"), ("\u200d", None)):
        at = start if target else text.index(answer)
        span = Span("joined", at, answer)
        example = Example(question, [passage, Passage("", "")], 0, span, Neighbours.empty(1, 64), seed=0)
        batch = run.collator([example])
        first, last = batch["start_positions"][0, 0].item(), batch["end_positions"][0, 0].item()
        read = run.collator.tokenizer.decode(batch["input_ids"][0, first - 4 : last - 3]) if first else None
        assert read == target
