"""What a reader keeps of what it has read: the same answers, never somebody else's, and no more than allowed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tiny_models import Make, some_neighbours
from torch.nn import functional as F

from ragmoe import ModelError, Neighbours, OutputCache, Passage, RoutingStatistics
from ragmoe.models import RagmoeBertForQuestionAnswering as Reader
from ragmoe.models.output_cache import sequence_keys

QUESTIONS = ["who is at the clinic?", "where is the café?"]
PASSAGES = [
    Passage("a", "The clinic by the river, open since 1912."),
    Passage("b", "A bank. " * 20 + "He left."),
    Passage("c", "a zebra"),
]
READ = [PASSAGES[:2], PASSAGES[1:]]


@pytest.fixture
def model(make: Make) -> Reader:
    reader = make(max_answer_tokens=6, gate="retrieval+memory")
    reader.output_cache = OutputCache(max_entries=1000)
    return reader


@pytest.fixture
def neighbours() -> Neighbours:
    votes_BNLE = torch.rand(2, 3, 2, 4).softmax(dim=-1)
    return replace(some_neighbours(2), votes_BNLE=votes_BNLE)


def misses(model: Reader, read: Callable[[], Any]) -> int:
    """How many sequences were read that the cache did not know."""
    before = model.output_cache.misses
    read()
    return model.output_cache.misses - before


# -- the cache by itself ----------------------------------------------------------------------------------------------


class Computing:
    """Doubles the numbers that it is asked for, and remembers them."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers, self.asked = numbers, []

    def __call__(self, places: list[int]) -> list[int]:
        self.asked += [self.numbers[place] for place in places]
        return [2 * self.numbers[place] for place in places]


def ask(cache: OutputCache, *numbers: int) -> list[int]:
    """What had to be computed."""
    compute = Computing(list(numbers))
    assert cache.values(list(numbers), compute) == [2 * number for number in numbers]
    return compute.asked


def test_the_least_recently_used_goes() -> None:
    cache = OutputCache(max_entries=3)
    assert ask(cache, 1, 2, 1, 3) == [1, 2, 3]
    assert ask(cache, 1, 2) == [] and len(cache) == 3
    assert ask(cache, 4) == [4] and cache.evictions == 1
    assert ask(cache, 1, 2, 4) == []
    assert ask(cache, 3) == [3]
    assert cache.summary() == {
        "entries": 3, "max_entries": 3, "hits": 6, "misses": 5, "evictions": 2, "hit_rate": 6 / 11,
    }  # fmt: skip
    cache.clear()
    assert (len(cache), cache.summary()["hit_rate"]) == (0, None)


def test_more_at_once_than_there_is_room_for() -> None:
    cache = OutputCache(max_entries=2)
    assert ask(cache, *range(9), *range(9)) == list(range(9))
    assert (len(cache), cache.evictions) == (2, 7)
    assert ask(cache, 8, 0, 1, 7) == [0, 1]


def test_what_fails_is_not_kept() -> None:
    cache = OutputCache()

    def fail(places: list[int]) -> list[int]:
        raise RuntimeError("out of coal")

    with pytest.raises(RuntimeError, match="out of coal"):
        cache.values([1], fail)
    assert ask(cache, 1) == [1]


def test_room_for_nothing() -> None:
    with pytest.raises(ModelError, match="max_entries is 0: expected at least 1"):
        OutputCache(max_entries=0)


def test_threads() -> None:
    cache, wrong = OutputCache(max_entries=5), []

    def work(seed: int) -> None:
        draw = np.random.default_rng(seed)
        for _ in range(200):
            numbers = draw.integers(0, 9, size=4).tolist()
            if cache.values(numbers, Computing(numbers)) != [2 * number for number in numbers]:
                wrong.append(numbers)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache) == 5 and cache.hits + cache.misses == 3 * 200 * 4


# -- a reader with a cache --------------------------------------------------------------------------------------------


def test_answers_are_the_same_bit_for_bit(model: Reader, neighbours: Neighbours) -> None:
    first = model.read(QUESTIONS, READ, neighbours)
    sequences = model.output_cache.misses
    assert sequences == len(model._sequences(QUESTIONS, READ)) > 4
    assert model.read(QUESTIONS, READ, neighbours) == first
    # In another order each finds its own.
    turned = model.read(QUESTIONS[::-1], READ[::-1], neighbours.rows([1, 0]))
    assert turned == first[::-1]
    assert model.output_cache.misses == sequences and model.output_cache.hits == 2 * sequences
    model.output_cache = None
    assert model.read(QUESTIONS, READ, neighbours) == first


def test_beside_others_it_is_read_as_if_alone(model: Reader, neighbours: Neighbours) -> None:
    """One sequence a batch: then no batch changes its size, and nothing the last digits."""
    model.read(QUESTIONS[:1], [PASSAGES[:1]], neighbours.rows([0]), batch_tokens=1)
    got = model.read(QUESTIONS, READ, neighbours, batch_tokens=1)
    assert model.output_cache.hits == 1
    model.output_cache = None
    assert got == model.read(QUESTIONS, READ, neighbours, batch_tokens=1)


def test_the_same_twice_at_once_is_read_once(model: Reader, neighbours: Neighbours) -> None:
    one, two = model.read([QUESTIONS[0]] * 2, [READ[0]] * 2, neighbours.rows([0, 0]))
    assert one == two and model.output_cache.hits == model.output_cache.misses > 0


@pytest.mark.parametrize(
    "change",
    [
        {"scores_BN": lambda x: x + 0.01},
        {"embeddings_BNR": lambda x: F.normalize(x + 0.01, dim=-1)},
        {"votes_BNLE": lambda x: x.flip(-1)},
    ],
    ids=["scores", "embeddings", "votes"],
)
def test_other_neighbours_are_another_output(model: Reader, neighbours: Neighbours, change: dict[str, Any]) -> None:
    model.read(QUESTIONS, READ, neighbours)
    (name, changed), all_of_them = next(iter(change.items())), model.output_cache.misses
    other = replace(neighbours, **{name: changed(getattr(neighbours, name))})
    assert misses(model, lambda: model.read(QUESTIONS, READ, other)) == all_of_them
    kept = torch.tensor([[True, True, True], [True, True, False]])
    # The first question's are as they were.
    of_second = sum(s.question == 1 for s in model._sequences(QUESTIONS, READ))
    assert misses(model, lambda: model.read(QUESTIONS, READ, neighbours.masked(kept))) == of_second
    assert misses(model, lambda: model.read(QUESTIONS, READ, None)) == all_of_them


def test_a_gate_that_sees_none_does_not_ask_for_them(make: Make, neighbours: Neighbours) -> None:
    model = make(gate="token")
    model.output_cache = OutputCache()
    want = model.read(QUESTIONS, READ, neighbours)
    assert misses(model, lambda: model.read(QUESTIONS, READ, neighbours.rows([1, 0]))) == 0
    assert model.read(QUESTIONS, READ, None) == want and model.output_cache.misses == len(model.output_cache)


def weights(model: Reader) -> None:
    with torch.no_grad():
        model.qa_outputs.bias.add_(1.0)


CHANGES: dict[str, Callable[[Reader], Any]] = {
    "weights": weights,
    "experts held back": lambda model: model.set_available_experts([0, 1]),
    "configuration": lambda model: setattr(model.config, "max_answer_tokens", 2),
    "precision": lambda model: model.to(torch.bfloat16),
    "balance bias": lambda model: model.moe_layers[0].gate.balance_bias.add_(1.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_reads_anew(model: Reader, neighbours: Neighbours, name: str) -> None:
    model.read(QUESTIONS, READ, neighbours)
    sequences = model.output_cache.misses
    CHANGES[name](model)
    got: list[Any] = []
    assert misses(model, lambda: got.extend(model.read(QUESTIONS, READ, neighbours))) == sequences
    model.output_cache = None
    assert got == model.read(QUESTIONS, READ, neighbours)


def test_adapters_that_are_switched_off_or_scaled_are_another_model(model: Reader, neighbours: Neighbours) -> None:
    inject_adapter_in_model(LoraConfig(target_modules=["query"], init_lora_weights=False), model)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    found = [model.read(QUESTIONS, READ, neighbours)]
    sequences = model.output_cache.misses
    for change in (
        lambda: layer.enable_adapters(False),
        lambda: layer.enable_adapters(True),
        lambda: layer.scale_layer(3.0),
    ):
        change()
        found.append(model.read(QUESTIONS, READ, neighbours))
    assert found[2] == found[0] != found[1] and found[3] != found[0]
    assert model.output_cache.misses == 3 * sequences


def test_autocast_is_another_output(model: Reader, neighbours: Neighbours) -> None:
    plain = model.read(QUESTIONS, READ, neighbours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.read(QUESTIONS, READ, neighbours)
    assert rough != plain == model.read(QUESTIONS, READ, neighbours)
    assert model.output_cache.misses == 2 * model.output_cache.hits


def test_the_same_model_loaded_again_finds_what_the_first_has_read(make: Make, tmp_path: Any) -> None:
    from ragmoe import load

    make().save_pretrained(tmp_path)
    make().tokenizer.save_pretrained(tmp_path)
    cache, found = OutputCache(), some_neighbours(2)
    want = None
    for settings in ({}, {}, {"resident_experts": 1}):
        model = load(tmp_path, **settings)
        model.output_cache = cache
        got = model.read(QUESTIONS, READ, found)
        assert want is None or got == want
        want = got
    assert cache.misses == len(cache) and cache.hits == 2 * len(cache)
    # Bringing other experts in is no change of the weights.
    assert misses(model, lambda: model(input_ids=torch.tensor([[5, 6, 7]]))) == 0
    assert misses(model, lambda: model.read(QUESTIONS, READ, found)) == 0


def test_routing_is_counted_as_without_a_cache(model: Reader, neighbours: Neighbours) -> None:
    found, cache = [], OutputCache()
    for model.output_cache in (None, cache, cache):
        statistics = RoutingStatistics(model.sparse_layers, model.config.experts)
        model.read(QUESTIONS, READ, neighbours, statistics=statistics, domains=["law", "bank"])
        found.append(statistics)
    assert cache.hits == cache.misses > 0
    for other in found[1:]:
        assert other.domains == found[0].domains and np.array_equal(other.counts_DLE, found[0].counts_DLE)
        assert other.summary() == found[0].summary()
    # Also where nobody counted the first time.
    model.output_cache = OutputCache()
    model.read(QUESTIONS, READ, neighbours)
    later = RoutingStatistics(model.sparse_layers, model.config.experts)
    assert (
        misses(model, lambda: model.read(QUESTIONS, READ, neighbours, statistics=later, domains=["law", "bank"])) == 0
    )
    assert later.summary() == found[0].summary()


def test_keys_hold_everything_and_nothing_runs_together(model: Reader, neighbours: Neighbours) -> None:
    sequences = [(s.question, s.window) for s in model._sequences(QUESTIONS, READ)]
    device = torch.device("cpu")
    keys = sequence_keys(model, sequences, neighbours, device)
    assert len(set(keys)) == len(sequences) == len({tuple(w.input_ids) for _, w in sequences})
    assert keys == sequence_keys(model, sequences, neighbours, device)
    _, window = sequences[0]
    other = [
        replace(window, context_start=window.context_start - 1),
        replace(window, offsets=window.offsets[:-1]),
        replace(window, input_ids=[*window.input_ids[:-1], 7]),
        replace(window, input_ids=[*window.input_ids, 0]),
    ]
    changed = sequence_keys(model, [(0, w) for w in other], neighbours, device)
    assert not {*changed} & {*keys} and len(set(changed)) == len(other)
    assert sequence_keys(model, [(1, window)], neighbours, device)[0] != keys[0]
    assert sequence_keys(model, sequences[:1], None, device)[0] != keys[0]
