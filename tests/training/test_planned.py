"""A training file is planned as it is trained: the same parameters, without weights, questions or an index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_decoder import byte_tokenizer, tiny_llama

from ragmoe import ConfigError, ModelError, UsageError
from ragmoe.models.initialising import init
from ragmoe.models.plan import activation_bytes, plan, read_layout
from ragmoe.training import load_config, prepare, train
from ragmoe.training.describe import describe

Config = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("what", ["all", "gate", "gate+experts", "lora"])
def test_parameters_are_those_of_the_run(config: Config, what: str) -> None:
    content = config(**{"train.what": what, "model.top_k": 3})
    found = plan(content)
    run = prepare(load_config(content))
    assert found.parameters == run.parameters
    assert (found.batch, found.length, found.dtype) == (4 * 2, 64, "fp32")
    held = sum(p.numel() for p in (run.adapted or run.model).parameters())
    trained = found.parameters["trained"]
    m = found.memory
    assert (m.weights, m.gradients, m.moments) == (4 * held, 4 * trained, 8 * trained)


def test_trained_is_what_gets_a_gradient(config: Config) -> None:
    run = prepare(load_config(config(**{"train.what": "lora", "model.top_k": 4})))
    run.model(**run.collator([run.dataset[at] for at in range(2)])).loss.backward()
    moved = [p.numel() for p in run.model.parameters() if p.grad is not None]
    assert run.parameters["trained"] == sum(moved)


@pytest.mark.parametrize("change", [{"train.what": "lora"}, {"train.gradient_checkpointing": True}, {}])
def test_a_dry_run_counts_activations_as_the_plan_does(config: Config, change: dict[str, Any]) -> None:
    """Also with adapters in the model; and it knows of checkpointing."""
    content = config(**change, **{"train.batch_size": 64, "raft.max_length": 128, "model.max_length": 128})
    run = prepare(load_config(content))
    report = describe(run)
    longest = report["longest_batch"]
    planned = plan(content, batch=longest["sequences"], length=longest["tokens"]).memory
    expected = planned.checkpointed if "train.gradient_checkpointing" in change else planned.activations
    assert report["memory_gib"]["activations"] * 2**30 == pytest.approx(expected, abs=0.01 * 2**30)
    tokens = longest["sequences"] * longest["tokens"]
    assert activation_bytes(read_layout(run.model), tokens) == pytest.approx(planned.activations, rel=0.01)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer(chat=True).save_pretrained(folder)
    return folder


SPARSE = {"gate": "retrieval", "experts": 4, "expert_rank": 8, "gate_width": 8}


@pytest.mark.parametrize("what", ["all", "gate", "gate+experts", "lora"])
@pytest.mark.parametrize("documents", [True, False])
def test_of_a_language_model_too(config: Config, llama: Path, world: Path, what: str, documents: bool) -> None:
    given: dict[str, Any] = {"base": str(llama), "model": SPARSE, "train.what": what, "data.calibration_share": 0.0}
    if documents:
        given |= {"data.questions": [], "data.documents": [str(world / "corpus.jsonl")]}
        given["language"] = {"chunk_tokens": 24, "context_tokens": 8, "neighbours": 4}
    else:
        given |= {"raft.max_length": 900, "data.unanswerable_share": 0.0}
    content = config(**given)
    found, run = plan(content), prepare(load_config(content))
    assert found.parameters == run.parameters and found.experts == 4
    assert (found.batch, found.length, found.dtype) == (4, 32 if documents else 900, "fp32")
    held = sum(p.numel() for p in (run.adapted or run.model).parameters())
    assert (found.memory.weights, found.memory.gradients) == (4 * held, 4 * found.parameters["trained"])


def test_of_a_language_model_as_it_is(config: Config, llama: Path, tmp_path: Path) -> None:
    content = config(**{
        "base": str(llama), "model": {}, "raft.max_length": 900, "data.calibration_share": 0.0,
        "data.unanswerable_share": 0.0,
    })  # fmt: skip
    assert plan(content).parameters == prepare(load_config(content)).parameters
    init(llama, out=tmp_path / "bundle", experts=4, expert_rank=8, neighbour_width=16)
    assert plan({**content, "base": str(tmp_path / "bundle")}).experts == 4
    with pytest.raises(ConfigError, match="top_k is 9"):
        plan({**content, "model": {**SPARSE, "top_k": 9}})


def test_an_index_that_is_not_built_yet(config: Config, tmp_path: Path) -> None:
    built = plan(config())
    later = plan(config(**{"data.index": str(tmp_path / "later")}))
    assert any("There is no index at" in note for note in later.notes)
    assert not any("There is no index at" in note for note in built.notes)
    # A tiny stub encoder is narrower than the usual one, and keys and values of the gates are made from its embeddings.
    assert later.parameters["total"] > built.parameters["total"]


def test_a_file_with_overrides_and_a_bundle_to_train_on(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config(**{"train.steps": 1})))
    assert plan(path, ["model.experts=8"]).experts == 8
    train(load_config(path), out=tmp_path / "bundle")
    on = [f"base={tmp_path / 'bundle'}", "train.what=gate", "model.gate=retrieval+memory"]
    assert plan(path, on).parameters == prepare(load_config(path, on)).parameters
    with pytest.raises(ModelError, match=r"model\.experts is 8, but the bundle"):
        plan(path, [*on, "model.experts=8"])


def test_what_training_would_refuse(config: Config) -> None:
    with pytest.raises(UsageError, match=r"unknown key 'train\.stepz'"):
        plan(config(), ["train.stepz=1"])
    with pytest.raises(ConfigError, match="max_length is 500, but the base has 128 positions"):
        plan(config(**{"raft.max_length": 500}))
    with pytest.raises(ConfigError, match="they go together"):
        plan(config(**{"train.what": "new_expert"}))
    with pytest.raises(ConfigError, match=r"train\.what is 'xlora', .*\nragmoe train FILE --dry-run"):
        plan(config(**{"train.what": "xlora"}))
    with pytest.raises(ModelError, match="LoRA experts lie inside a dense network"):
        plan(config(), expert_parallel=2)
