"""Routing losses under gradient accumulation: which steps are the same however they are cut, and what it takes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step import BATCH, CHANGES, NAMES, READER, TOKENS, Step, disturb, ready, two_ranks

from ragmoe import ConfigError, ModelError
from ragmoe.training import train
from ragmoe.training.run import Run
from ragmoe.training.totals import step_sums

Config = Callable[..., dict[str, Any]]
CUTS = [(2, 2), (1, 4)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(config: Config) -> Run:
    return ready(config(**CHANGES))


def test_with_the_scope_global_a_step_is_the_same_however_it_is_cut(made: Run, tmp_path: Path) -> None:
    whole = Step(made, tmp_path, 4, 1, BATCH, loss_scope="global")
    # A batch that is a whole step costs no other pass.
    assert whole.told == [None]
    for cut in CUTS:
        step = Step(made, tmp_path, *cut, BATCH, loss_scope="global")
        whole.assert_equals(step, "answer", "balance", "gshard", "importance", "uniform", "domain")
        assert len(step.told) == cut[1] and len({id(told) for told in step.told}) == 1
        assert step.told[0].tokens.item() == step.tokens == whole.tokens


def test_with_the_scope_micro_each_part_is_judged_by_itself(made: Run, tmp_path: Path) -> None:
    whole, cut = (Step(made, tmp_path, *sizes, BATCH) for sizes in ((4, 1), (1, 4)))
    with pytest.raises(AssertionError):
        whole.assert_equals(cut)
    # What is balanced in each part is balanced as a whole, but not the other way about.
    for name in ("balance_loss", "importance_loss", "uniform_loss", "domain_loss"):
        assert cut.log[name] > whole.log[name] * 1.005, name
    assert cut.told[0].sums == {}
    assert cut.log["answer_loss"] == pytest.approx(whole.log["answer_loss"], rel=1e-5)


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_means_over_tokens_are_exact_with_either_scope(made: Run, tmp_path: Path, scope: str) -> None:
    losses = {**TOKENS, "context": 5.0}
    whole = Step(made, tmp_path, 4, 1, losses, loss_scope=scope)
    assert whole.log["context_loss"] > 0
    for cut in CUTS:
        step = Step(made, tmp_path, *cut, losses, loss_scope=scope)
        whole.assert_equals(step, "answer", "z", "diversity", "context")
        # No loss asks for sums: there was no other pass.
        assert step.told[0].sums == {}


def test_both_passes_draw_the_same(made: Run, tmp_path: Path) -> None:
    """Noise of the gates and dropout: what the losses are told of the step is what they then see of it."""
    step = Step(made, tmp_path, 2, 2, BATCH, loss_scope="global", noisy=True)
    told = step.told[0].sums
    assert sorted(told) == sorted(BATCH)
    for name, sums in told.items():
        torch.testing.assert_close(sum(of_part[name] for of_part in step.sums), sums)


def test_in_bf16_the_pass_before_takes_no_gradient_away(made: Run, tmp_path: Path) -> None:
    plain, told = (Step(made, tmp_path, 2, 2, BATCH, loss_scope=s, precision="bf16") for s in ("micro", "global"))
    assert told.gradients.keys() == plain.gradients.keys()
    assert all(x.isfinite().all() for x in told.gradients.values())
    assert [name for name, x in plain.gradients.items() if x.any() and not told.gradients[name].any()] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_step_of_two_ranks_is_the_same_too(config: Config, made: Run, tmp_path: Path) -> None:
    whole = Step(made, tmp_path, 4, 1, READER, loss_scope="global")
    for found in two_ranks(config(**CHANGES), tmp_path):
        assert (found["parts"], found["tokens"].item()) == (2, whole.tokens)
        assert found["gradients"].keys() == whole.gradients.keys()
        for name, gradient in whole.gradients.items():
            torch.testing.assert_close(found["gradients"][name], gradient, atol=5e-6, rtol=1e-3, msg=name)


def test_a_pass_leaves_the_random_numbers_as_they_were(made: Run) -> None:
    model = copy.deepcopy(made.model).train()
    disturb(model)
    batch = made.collator([made.dataset[0], made.dataset[1]])
    before = torch.get_rng_state()
    sums = step_sums(model, model.config, [batch, batch], CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(sums["domain"], 2 * step_sums(model, model.config, [batch], CPU)["domain"], rtol=1e-3)
    assert sorted(sums) == ["domain", "load_balance"]
    assert sums["domain"].shape == (2, 4, 4) and not any(x.requires_grad for x in sums.values())


def test_further_losses_are_learned_by_and_written_down(config: Config, tmp_path: Path) -> None:
    losses = {"context": 1.0, "diversity": 0.1, "domain": 1.0, "uniform": 0.0}
    changes = {"model.losses": losses, "model.expert_names": NAMES, "train.accumulation": 2, "train.batch_size": 2}
    changes["train.steps"] = 2
    result = train(config(**changes, **{"train.loss_scope": "global"}), out=tmp_path / "run")
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert len(history) == result.steps == 2
    for record in history:
        assert {"answer_loss", "balance_loss", "z_loss"} | {f"{name}_loss" for name in losses} <= record.keys()
    # At first the gate ignores the neighbours: ln 2 for each token whose question has some.
    assert 0 < history[0]["context_loss"] <= 0.6932
    assert history[0]["domain_loss"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"model.losses": {"domain": 1.0}, "model.expert_names": ["a", "b", "c", "d"]},
            ModelError,
            "nothing that is learned from belongs to one that an expert is named after; the experts are a, b, c, d",
        ),
        (
            {"model.losses": {"context": 1.0}, "train.batch_size": 1},
            ConfigError,
            "a step has 1 question, but the loss 'context' compares two",
        ),
        ({"model.losses": {"switch": 1.0}}, ConfigError, "there is no routing loss 'switch'; there are: "),
        ({"train.loss_scope": "all"}, ConfigError, "train.loss_scope: Input should be 'micro' or 'global'"),
    ],
)
def test_what_would_teach_nothing_is_refused(
    config: Config, tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as caught:
        train(config(**changes), out=tmp_path / "run")
    assert said in str(caught.value) and not (tmp_path / "run").exists()
