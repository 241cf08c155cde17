"""Likelihoods against the plain computation, one sequence at a time."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_decoder import tiny_llama

from ragmoe import Neighbours
from ragmoe.generation.likelihood import log_likelihoods


def pairs(n: int) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(3)

    def some(low: int) -> list[int]:
        return [draw.randrange(3, 250) for _ in range(draw.randint(low, 30))]

    return [(some(1), some(0)) for _ in range(n)]


@pytest.mark.parametrize("batch_tokens", [1, 90, 8192])
def test_each_is_what_it_is_alone(batch_tokens: int) -> None:
    model, given = tiny_llama(), pairs(12)
    # Of one, what the model itself would say.
    with torch.no_grad():
        said = model.generate(torch.tensor([given[0][0]]), max_new_tokens=4, do_sample=False)
    given[0] = (given[0][0], said[0, len(given[0][0]) :].tolist())
    found = log_likelihoods(model, given, batch_tokens=batch_tokens)
    for (before, after), likelihood in zip(given, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
        places = range(len(before) - 1, len(before) + len(after) - 1)
        alone = sum(logits[at, token].item() for at, token in zip(places, after, strict=True))
        assert likelihood.nats == pytest.approx(alone, rel=1e-4) and likelihood.tokens == len(after)
        assert likelihood.greedy == all(int(logits[at].argmax()) == t for at, t in zip(places, after, strict=True))
    assert found[0].greedy and not all(likelihood.greedy for likelihood in found)


def test_a_beginning_is_needed() -> None:
    with pytest.raises(ValueError, match="a beginning is empty"):
        log_likelihoods(tiny_llama(), [([], [3])])


def test_neighbours_go_with_their_pair_and_only_where_they_are_seen() -> None:
    model, given = tiny_llama(), pairs(5)
    rows = Neighbours(torch.arange(5.0).view(5, 1, 1), torch.ones(5, 1), torch.ones(5, 1).bool(), [["p"]] * 5)
    plain = log_likelihoods(model, given, rows)
    seen = {}
    forward = model.forward

    def watching(input_ids: torch.Tensor, neighbour_embeddings: torch.Tensor, **rest: torch.Tensor) -> object:
        assert set(rest) == {"attention_mask", "neighbour_scores", "neighbour_mask"}
        for ids, row in zip(input_ids.tolist(), neighbour_embeddings, strict=True):
            seen[tuple(ids)] = row.item()
        return forward(input_ids, attention_mask=rest["attention_mask"])

    model.gate_sees_neighbours, model.forward = True, watching
    assert log_likelihoods(model, given, rows) == plain
    for number, (before, after) in enumerate(given):
        whole = [*before, *after]
        assert [value for ids, value in seen.items() if list(ids[: len(whole)]) == whole] == [number]


def test_logits_are_made_where_something_is_judged() -> None:
    model = tiny_llama()
    made: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, y: made.append(y.shape[1]))
    long = [([*range(3, 60)], [7, 8, 9]), ([*range(3, 58)], [7])]
    found = log_likelihoods(model, long)
    # Of 60 positions those that predict the answers: one before 55, three before 57 and on.
    assert made == [4] and [likelihood.tokens for likelihood in found] == [3, 1]
    assert log_likelihoods(model, [([3, 4], [])])[0].tokens == 0
