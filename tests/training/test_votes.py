"""Gates that count votes: what they are told of where there are none, and what trained bundles go on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stub_encoder import StubEncoder
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments

from ragmoe import Index, ModelError, load
from ragmoe.corpus import read_questions
from ragmoe.evaluation.annotate import annotate
from ragmoe.index import BuildOptions, build_index
from ragmoe.training import load_config, prepare, train
from ragmoe.training.adding import new_expert_config

Config = Callable[..., dict[str, Any]]
NAMED = ["river", "market", "third", "fourth"]


class Told:
    """Where progress is shown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, name: str, done: int, total: int) -> None:
        pass

    def line(self, text: str) -> None:
        self.lines.append(text)


def model(**settings: Any) -> dict[str, Any]:
    small = {"experts": 4, "expert_rank": 8, "gate_width": 8, "max_length": 64, "stride": 8}
    return {**small, "gate": "memory", **settings}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (None, "the experts are unnamed, the domains market, river. Until `ragmoe index annotate` has recorded some"),
        (["a", "b", "c", "d"], "the experts are a, b, c, d, the domains market, river"),
        (NAMED, None),
    ],
)
def test_a_gate_that_nobody_votes_in_is_told(config: Config, names: list[str] | None, told: str | None) -> None:
    shown = Told()
    prepare(load_config(config(model=model(expert_names=names))), show=shown)
    assert [line for line in shown.lines if "votes for an expert" in line and (told is None or told in line)] == (
        [] if told is None else [line for line in shown.lines if "votes" in line]
    )
    assert any("votes" in line for line in shown.lines) == (told is not None)


def test_a_loss_that_learns_from_votes_wants_some(config: Config) -> None:
    with pytest.raises(ModelError, match=r"the loss 'votes' learns from votes, and no passage of .* votes") as caught:
        prepare(load_config(config(model=model(losses={"votes": 0.1}))))
    assert caught.value.hint == "name the experts after the domains: model.expert_names=[...]"
    prepare(load_config(config(model=model(losses={"votes": 0.1}, expert_names=NAMED))))


def test_what_was_recorded_with_the_base_is_said_to_stay_behind(world: Path, config: Config, tmp_path: Path) -> None:
    first = train(config(model=model()), out=tmp_path / "first").bundle
    shown = Told()
    again = config(base=str(first), model={}, **{"train.what": "experts"})
    train(again, out=tmp_path / "second", show=shown)
    assert not any("not carried over" in line for line in shown.lines)
    index = Index.open(world / "index", encoder=StubEncoder())
    recorded = annotate(load(first), index, read_questions(world / "questions.jsonl"))
    path = recorded.save(index)
    try:
        train(again, out=tmp_path / "third", show=shown)
    finally:
        path.unlink()
    (line,) = [line for line in shown.lines if "not carried over" in line]
    assert f"recorded with {first} is not carried over" in line and f"ragmoe index annotate {index.folder}" in line


@pytest.mark.parametrize("what", ["all", "experts"])
def test_a_trained_gate_goes_on_with_the_encoder_it_knows(
    world: Path, config: Config, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(config(), out=tmp_path / "first").bundle
    build_index(BuildOptions((str(world / "corpus.jsonl"),), tmp_path / "index", encoder=StubEncoder(5)))
    other = config(base=str(first), model={}, **{"data.index": str(tmp_path / "index"), "train.what": what})
    with pytest.raises(ModelError, match=r"trained on embeddings of stub-0 .* the index holds those of stub-5"):
        train(other, out=tmp_path / "second")
    # A gate that is thrown away has learned nothing that counts.
    monkeypatch.setattr("ragmoe.index.folder.load_encoder", lambda name: StubEncoder(5))
    if what == "all":
        prepare(load_config({**other, "model": {"gate": "token"}}))


def test_a_reader_is_evaluated_by_transformers_trainer(config: Config, tmp_path: Path) -> None:
    run = prepare(load_config(config()))
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, report_to=[], label_names=["start_positions", "end_positions"]
    )
    rows = Subset(run.dataset, range(3))
    trainer = Trainer(
        run.model,
        arguments,
        data_collator=run.collator,
        eval_dataset=rows,
        compute_metrics=lambda found: {"finite": float(np.isfinite(found.predictions[0]).all())},
    )
    assert trainer.evaluate()["eval_finite"] == 1.0
    start, end = trainer.predict(rows).predictions
    assert start.shape == end.shape and len(start) >= 3


def test_a_new_expert_is_asked_as_the_bundle_was(world: Path, config: Config, tmp_path: Path) -> None:
    bundle = train(config(**{"data.question_field": "question_raw"}), out=tmp_path / "bundle").bundle
    given = {"index": world / "index", "questions": [str(world / "questions.jsonl")]}
    assert new_expert_config(bundle, "third", **given).data.question_field == "question_raw"
    own = new_expert_config(bundle, "third", overrides=["data.question_field=question"], **given)
    assert own.data.question_field == "question"
