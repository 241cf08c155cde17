"""Training a generator by ``train``: it learns, resumes exactly, and a step is the same however it is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import killed_at
from one_step import DECODER, Step, ready, two_ranks
from safetensors.torch import load_file, save_file
from tiny_decoder import byte_tokenizer, tiny_llama
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback

from ragmoe import ConfigError, DataError, Index, ModelError
from ragmoe.generation import Generator
from ragmoe.training import load_config, prepare, train
from ragmoe.training import run as run_module
from ragmoe.training.describe import describe
from ragmoe.training.folder import is_finished
from ragmoe.training.generator import GeneratorRun, GeneratorTrainer

Config = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def content(config: Config, base: Path) -> Config:
    def make(**changes: Any) -> dict[str, Any]:
        given = {
            "base": str(base), "model": {}, "raft.max_length": 480, "raft.passages": 1, "raft.gold_probability": 1.0,
            "generate": {"no_context": 0.2, "max_answer_tokens": 24}, "train.batch_size": 2,
            "train.learning_rate": 5e-3, "train.steps": 6, "data.calibration_share": 0.0,
        }  # fmt: skip
        return config(**{**given, **changes})

    return make


class Stop:
    """Stops a run after a step, as a user would."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.lines = at, []

    def stage(self, name: str, done: int, total: int) -> None:
        if name == "training" and done == self.at:
            raise KeyboardInterrupt

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_it_learns_and_is_saved_as_a_generator(content: Config, world: Path, tmp_path: Path) -> None:
    result = train(content(**{"train.steps": 12}), out=tmp_path / "out")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert result.learned_from == {"fitted": 36, "held_out": 0, "left_out": 0} and result.adapter is None
    total = result.parameters["total"]
    assert result.parameters == {"total": total, "active": total, "trained": total}
    made = Generator.load(tmp_path / "out")
    assert (made.style.without_gold, made.style.max_length, made.style.max_answer_tokens) == ("refuse", 480, 24)
    index = Index.open(world / "index")
    answer = made.answer(["who keeps the ferry?"], index, passages=1)[0]
    assert 0 <= answer.score <= 1 and set(answer.cited) <= set(index.passage_ids)
    with pytest.raises(ConfigError, match="holds a finished run"):
        train(content(**{"train.steps": 12}), out=tmp_path / "out", resume=True)


def test_a_stopped_run_goes_on_as_if_it_had_not(content: Config, tmp_path: Path) -> None:
    given = content(checkpoint_every=2)
    train(given, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(given, out=tmp_path / "torn", show=Stop(5))
    train(given, out=tmp_path / "torn", resume=True)
    whole, torn = (Generator.load(tmp_path / name).state_dict() for name in ("whole", "torn"))
    assert whole.keys() == torn.keys() and all(torch.equal(whole[name], torn[name]) for name in whole)
    before = Generator.load(given["base"]).state_dict()
    assert not all(torch.equal(whole[name], before[name]) for name in whole)


@pytest.mark.parametrize("what", ["all", "lora"])
def test_a_mixture_of_experts_as_it_is_goes_on_with_its_experts(content: Config, tmp_path: Path, what: str) -> None:
    """Its own format has a file name for each expert's tensor, where the model that is trained has fused ones."""
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, pad_token_id=0)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    changes = {"base": str(tmp_path / "base"), "train.what": what, "train.steps": 4}
    given = content(**changes, checkpoint_every=2)
    train(given, out=tmp_path / "whole")
    with killed_at(4):
        train(given, out=tmp_path / "torn")
    train(given, out=tmp_path / "torn", resume=True)
    whole, torn = (Generator.load(tmp_path / name).state_dict() for name in ("whole", "torn"))
    assert whole.keys() == torn.keys() and all(torch.equal(whole[name], torn[name]) for name in whole)


def test_a_checkpoint_that_lacks_a_tensor_is_not_gone_on_from(content: Config, tmp_path: Path) -> None:
    given = content(checkpoint_every=2)
    with killed_at(4):
        train(given, out=tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"checkpoint-2 is no checkpoint of this model: it lacks model\.norm\.weight"):
        train(given, out=tmp_path / "run", resume=True)


class Gradients(TrainerCallback):
    """The gradients of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_step_is_the_same_however_it_is_cut(content: Config, tmp_path: Path) -> None:
    made = prepare(load_config(content()))
    examples = [made.dataset[at] for at in range(4)]
    learned = {int((made.collator([example])["labels"] != -100).sum()) for example in examples}
    # Answers of one length would hide how they are weighted.
    assert len(learned) > 1
    steps = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        changes = {"train.batch_size": size, "train.accumulation": parts, "train.steps": 1}
        gradients = Gradients()
        trainer = GeneratorTrainer(
            model=prepare(load_config(content())).model,
            args=run_module._arguments(load_config(content(**changes)), tmp_path / str(size), bf16=False),
            train_dataset=examples, data_collator=made.collator, callbacks=[gradients],
            optimiser=load_config(content(**changes)).train,
        )  # fmt: skip
        trainer.train()
        steps.append(gradients.found)
    for other in steps[1:]:
        for name, gradient in steps[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


# Experts that stand in the place of the one layer's feed-forward network.
SPARSE = {
    "model": {"gate": "retrieval", "experts": 4, "gate_width": 8},
    "train.batch_size": 4,
    "train.steps": 1,
    "train.clip": 1e6,
}


@pytest.mark.parametrize("cut", [(2, 2), (1, 4)])
def test_a_step_of_a_sparse_decoder_is_the_same_however_it_is_cut(
    cut: tuple[int, int], content: Config, tmp_path: Path
) -> None:
    """Answers of unequal length and routing losses that compare all of a step: each part has its own share of both."""
    made = ready(content(**SPARSE))
    whole, step = (Step(made, tmp_path, *sizes, DECODER, loss_scope="global") for sizes in ((4, 1), cut))
    assert whole.told == [None] and len(step.told) == cut[1] and step.learned == whole.learned
    whole.assert_equals(step, "balance", "gshard", "importance", "uniform", "z")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_step_of_two_ranks_is_the_same_too(content: Config, tmp_path: Path) -> None:
    given = content(**SPARSE)
    whole = Step(ready(given), tmp_path, 4, 1, DECODER, loss_scope="global")
    ranks = two_ranks(given, tmp_path)
    # As many tokens of answers on both would hide that each rank counts by its own.
    assert ranks[0]["learned"] != ranks[1]["learned"] and sum(found["learned"] for found in ranks) == whole.learned
    for found in ranks:
        assert (found["parts"], found["tokens"].item()) == (2, whole.tokens)
        assert found["gradients"].keys() == whole.gradients.keys()
        for name, gradient in whole.gradients.items():
            torch.testing.assert_close(found["gradients"][name], gradient, atol=5e-6, rtol=1e-3, msg=name)


def test_what_has_no_room_is_counted_and_told(content: Config, world: Path, tmp_path: Path) -> None:
    long = {"id": "long", "question": "why " * 60, "answers": ["no"], "answer_type": "yesno", "gold_ids": ["p0"]}
    rows = [*(world / "questions.jsonl").read_text().splitlines()[:6], json.dumps(long)]
    (tmp_path / "some.jsonl").write_text("\n".join(rows) + "\n")
    shown = Stop()
    made = prepare(load_config(content(**{"data.questions": [str(tmp_path / "some.jsonl")]})), show=shown)
    assert made.left_out == 1 and len(made.dataset.questions) == 6
    assert shown.lines == ["1 questions are left out: with their gold passage they exceed 480 tokens"]
    with pytest.raises(DataError, match="0 have an answer but no gold_ids, 36 do not fit into 100 tokens"):
        prepare(load_config(content(**{"raft.max_length": 100})))


def test_a_dry_run_shows_prompts_and_answers(content: Config) -> None:
    made = prepare(load_config(content()))
    assert isinstance(made, GeneratorRun)
    report = describe(made)
    assert report["learned_from"] == {"fitted": 36, "held_out": 0, "left_out": 0} and report["sparse_layers"] == []
    for row in report["first_batch"]:
        assert row["sequence"].endswith("\nAnswer:") and row["target"].endswith("</s>")
        assert "<pad>" not in row["sequence"] and row["target"] in report["text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "warm-start"}, "start is 'warm-start'"),
        ({"train.what": "xlora"}, "train.what is 'xlora'; for a causal language model expected one of: all, gate"),
        ({"train.what": "gate"}, "has no sparse layer"),
        ({"train.dropout": 0.1}, "train.dropout is set"),
        ({"data.calibration_share": 0.1}, "data.calibration_share is 0.1, but a causal language model has no"),
        ({"train.what": "new_expert", "new_expert": {"name": "a"}}, "data.documents is empty, which a causal"),
        ({"generate.max_answer_tokens": 480}, "max_answer_tokens is 480, of which max_length, 480, must be more"),
    ],
)
def test_what_does_not_fit_a_generator_is_refused(content: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(load_config(content(**changes)))


def test_a_reader_generates_nothing(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"generate is given, but the base .* is no causal language model"):
        prepare(load_config(config(generate={})))


def test_what_makes_it_a_model_is_written_last(
    content: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in between leaves a run that goes on, for a sparse decoder and for a plain one."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    sparse = {"gate": "token", "experts": 2, "expert_kind": "lora", "expert_rank": 8}
    for name, model, last in (("sparse", sparse, "_save_model"), ("plain", {}, "_save_words")):
        run = content(**{"model": model, "train.steps": 2, "checkpoint_every": 1})
        with monkeypatch.context() as patch:
            patch.setattr(Generator, last, killed)
            with pytest.raises(KeyboardInterrupt):
                train(run, out=tmp_path / name)
        assert not is_finished(tmp_path / name)
        train(run, out=tmp_path / name, resume=True)
        assert is_finished(tmp_path / name) and Generator.load(tmp_path / name).style.max_answer_tokens == 24


def test_gates_are_balanced_where_there_are_some_that_are_trained(content: Config, tmp_path: Path) -> None:
    frozen = {"model": SPARSE["model"], "train.what": "experts", "train.balance_bias_rate": 0.01}
    with pytest.raises(ConfigError, match=r"moves every gate, but train\.what is 'experts'"):
        train(content(**frozen), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="has no sparse layer to balance"):
        train(content(**{"train.balance_bias_rate": 0.01}), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("gate", "names", "error", "said"),
    [
        ("token", ["a", "b", "c", "d"], ConfigError, "which a language model's gate 'token' does not see"),
        ("retrieval", ["a", "b", "c", "d"], ModelError, "nothing that is learned from belongs to one that an expert"),
    ],
)
def test_a_loss_that_would_teach_nothing_is_refused(
    content: Config, gate: str, names: list[str], error: type[Exception], said: str
) -> None:
    model = {"gate": gate, "experts": 4, "expert_rank": 8, "expert_names": names, "losses": {"domain": 0.1}}
    with pytest.raises(error, match=said):
        prepare(load_config(content(model=model)))
