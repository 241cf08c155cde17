"""Training itself: what moves, exact resume, gradient accumulation, learning rates, load-best."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from killing import killed_at
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from ragmoe import BundleError, ConfigError, DataError, ModelError, RagmoeError, load
from ragmoe.bundle import is_bundle, read_bundle, read_map
from ragmoe.bundle.experts import LOAD
from ragmoe.moe import fetch_sums
from ragmoe.training import RagmoeTrainer, TrainingConfig, calibration, load_config, prepare, train
from ragmoe.training import run as run_module
from ragmoe.training.folder import is_finished, last_checkpoint
from ragmoe.training.stopping import StopCallback
from ragmoe.training.trainer import part_of

Config = Callable[..., dict[str, Any]]


def start_of(config: dict[str, Any]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in prepare(load_config(config)).model.state_dict().items()}


def tensors(folder: Path) -> dict[str, Tensor]:
    return load(folder).state_dict()


def test_a_run_leaves_a_bundle_its_configuration_and_its_history(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "ENOUGH", 2)
    result = train(config(), out=tmp_path / "run")
    model = load(result.bundle)
    assert model.config.encoder == {"id": "stub-0", "digest": model.config.encoder["digest"]}
    assert model.config.no_answer_threshold != 0.0
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in history] == [1, 2, 3, 4]
    assert all(len(record["load"]) == len(model.sparse_layers) for record in history)
    assert sum(history[0]["load"][0]) == pytest.approx(1.0, abs=1e-4)
    assert load_config(tmp_path / "run" / "training.yaml") == load_config(config())
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert sum(result.learned_from.values()) == 36 and result.learned_from["left_out"] == 0


@pytest.mark.parametrize(("log_every", "steps"), [(2, [2, 3]), (10, [3])])
def test_the_last_steps_are_recorded_too(config: Config, tmp_path: Path, log_every: int, steps: list[int]) -> None:
    bundle = train(config(**{"train.steps": 3, "log_every": log_every}), out=tmp_path / "run").bundle
    lines = (bundle / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == steps
    assert len(read_map(bundle).extra[LOAD]) == 4


@pytest.mark.parametrize("what", ["gate", "experts", "gate+experts", "all"])
def test_only_what_is_trained_moves(config: Config, tmp_path: Path, what: str) -> None:
    content = config(**{"train.what": what})
    before = start_of(content)
    after = tensors(train(content, out=tmp_path / "run").bundle)
    moved = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head", *({"gate", "experts", "base"} if what == "all" else what.split("+"))}


@pytest.mark.parametrize("expert_kind", ["lora", "ffn"])
def test_bf16_trains_on_any_machine(config: Config, tmp_path: Path, expert_kind: str) -> None:
    changes = {"train.precision": "bf16", "model.expert_kind": expert_kind, "model.gate": "retrieval"}
    if expert_kind == "ffn":
        changes["model.expert_rank"] = None
    result = train(config(**changes, **{"train.steps": 2}), out=tmp_path / "run")
    assert result.loss is not None and math.isfinite(result.loss)
    assert json.loads((tmp_path / "run" / "started.json").read_text())["bf16"] is True
    # Autocast works on copies: what is kept, and saved, stays in full precision.
    assert {x.dtype for x in load(result.bundle).parameters()} == {torch.float32}


def test_an_adapter_can_be_started_from(config: Config, tmp_path: Path) -> None:
    dense = {
        "model": {"sparse_layers": [], "max_length": 64, "stride": 8},
        "train.what": "lora",
        "train.lora": {"rank": 4},
    }
    content = config(**dense)
    before = start_of({**content, "train": {**content["train"], "what": "all"}})
    first = train(content, out=tmp_path / "dense")
    trained = load(first.bundle)
    moved = {name for name, x in trained.state_dict().items() if not torch.equal(x, before[name])}
    assert {part_of(name) for name in moved} == {"head", "base"}
    assert not any("embeddings" in name or "LayerNorm" in name for name in moved)

    sparse = prepare(load_config(config(start=str(first.adapter)))).model.eval()
    assert sparse.sparse_layers
    run = prepare(load_config(content))
    batch = run.collator([run.dataset[0]])
    with torch.no_grad():
        want, got = trained(**batch).start_logits, sparse(**batch).start_logits
    # The adapter is kept in fp16 and comes back within its rounding; upcycling to untrained LoRA experts adds nothing.
    torch.testing.assert_close(got, want, atol=2e-2, rtol=1e-2)


def test_a_killed_run_resumes_to_the_same_model(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = config(**{"train.steps": 6, "checkpoint_every": 2, "model.token_dropout": 0.3, "train.dropout": 0.1})
    whole = train(content, out=tmp_path / "whole")

    with killed_at(6):
        train(content, out=tmp_path / "killed")
    monkeypatch.setattr("ragmoe.index.folder.load_encoder", lambda name: pytest.fail("retrieved again"))
    with pytest.raises(ConfigError, match="did not finish") as caught:
        train(content, out=tmp_path / "killed")
    assert "pass --resume to go on from the last checkpoint, or --overwrite" in str(caught.value)
    resumed = train(content, out=tmp_path / "killed", resume=True)
    assert resumed.loss is None and resumed.seconds is None
    a, b = tensors(whole.bundle), tensors(resumed.bundle)
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [(folder / "history.jsonl").read_text().splitlines() for folder in (whole.bundle, resumed.bundle)]
    assert [json.loads(line)["loss"] for line in lines[0]] == [json.loads(line)["loss"] for line in lines[1]]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_a_run_after_its_step(
    config: Config, tmp_path: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    class Sends(Recorder):
        def stage(self, name: str, done: int, total: int) -> None:
            if (name, done) == ("training", 1):
                signal.raise_signal(number)

    content, before = config(**{"checkpoint_every": 100, "log_every": 2, "train.steps": 2}), signal.getsignal(number)
    with pytest.raises(error) as caught:
        train(content, out=tmp_path / "run", show=Sends())
    assert error is KeyboardInterrupt or caught.value.code == 143
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert json.loads((tmp_path / "run" / "history.jsonl").read_text())["step"] == 1
    assert signal.getsignal(number) is before
    if error is SystemExit:
        train(content, out=tmp_path / "run", resume=True, show=(again := Recorder()))
        assert "going on after step 1" in again.lines


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_stops_at_once() -> None:
    stop = StopCallback()

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        assert stop.came == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt), stop.listening():
        twice()


class Recorder:
    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.lines: list[str] = []

    def stage(self, name: str, done: int, total: int) -> None:
        self.stages.append((name, done, total))

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_without_a_checkpoint_there_is_nothing_to_resume(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, said = config(**{"train.steps": 2}), "left no checkpoint"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    first = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(content, out=tmp_path / "run", resume=True, show=first)
    assert not any(said in line for line in first.lines)
    for changes in ({}, {"seed": 5}):
        with pytest.raises(ConfigError) as caught:
            train({**content, **changes}, out=tmp_path / "run", resume=bool(changes))
        assert "pass --overwrite to start again" in str(caught.value) and "--resume" not in str(caught.value)
        assert changes or said in str(caught.value)
    again = Recorder()
    resumed = train(content, out=tmp_path / "run", resume=True, show=again)
    assert said in again.lines[1] and again.lines[2].startswith("step 1/2")
    a, b = tensors(resumed.bundle), tensors(train(content, out=tmp_path / "whole").bundle)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_preparing_tells_how_far_it_is(config: Config, tmp_path: Path) -> None:
    shown = Recorder()
    run = prepare(load_config(config()), cache=tmp_path, show=shown)
    total = len(run.dataset.questions) + len(run.held)
    assert shown.stages == [("retrieving neighbours", 0, total), ("retrieving neighbours", total, total)]


def test_a_killed_adapter_run_resumes_too(config: Config, tmp_path: Path) -> None:
    content = config(**{"train.what": "lora", "train.steps": 4, "checkpoint_every": 2, "train.lora": {"rank": 4}})
    whole = train(content, out=tmp_path / "whole")
    run = _until(content, tmp_path / "killed", 2)
    assert run
    resumed = train(content, out=tmp_path / "killed", resume=True)
    a, b = tensors(whole.bundle), tensors(resumed.bundle)
    assert all(torch.equal(a[name], b[name]) for name in a)


def _until(content: dict[str, Any], out: Path, step: int) -> bool:
    """Run up to a checkpoint and lose what comes after it."""
    kept = run_module._save
    try:
        run_module._save = lambda run, folder: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            train(content, out=out)
    finally:
        run_module._save = kept
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.rpartition("-")[2]) > step:
            shutil.rmtree(folder)
    return (out / "checkpoints" / f"checkpoint-{step}").is_dir()


def test_accumulation_does_not_change_a_step(config: Config, tmp_path: Path) -> None:
    """The answer loss and all its gradients; the losses of a batch's routing have a scope of their own."""

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    found: list[dict[str, Tensor]] = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        made = load_config(
            config(
                **{
                    "train.steps": 1,
                    "train.clip": 1e6,
                    "model.balance_loss": 0.0,
                    "model.z_loss": 0.0,
                    "raft.gold_probability": 0.5,
                    "train.batch_size": batch_size,
                    "train.accumulation": accumulation,
                }
            )
        )
        trainer = _trainer(prepare(made), made, tmp_path / str(accumulation))
        trainer.add_callback(Gradients())
        trainer.train()
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=2e-6, rtol=1e-4, msg=name)


def test_each_part_has_its_rate(config: Config, tmp_path: Path) -> None:
    made = load_config(config(**{"train.gate_learning_rate": 1e-2, "train.experts_learning_rate": 2e-2}))
    run = prepare(made)
    trainer = _trainer(run, made, tmp_path / "unused")
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in run.model.named_parameters()}
    rates = {part_of(names[id(p)]): group["lr"] for group in groups for p in group["params"]}
    assert rates == {"base": 1e-3, "gate": 1e-2, "experts": 2e-2, "head": 1e-3}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert not any("bias" in name or "LayerNorm" in name or "null_key" in name for name in decayed)
    assert sum(len(group["params"]) for group in groups) == len(list(run.model.parameters()))


def _trainer(run: Any, made: TrainingConfig, out: Any) -> RagmoeTrainer:
    return RagmoeTrainer(
        model=run.model,
        args=run_module._arguments(made, Path(out), bf16=False),
        train_dataset=run.dataset,
        data_collator=run.collator,
        optimiser=made.train,
    )


def test_the_best_checkpoint_is_loaded_with_its_experts(config: Config, tmp_path: Path) -> None:
    made = load_config(config())
    run = prepare(made)
    trainer = _trainer(run, made, tmp_path)
    trainer.save_model(str(tmp_path / "best"))
    wanted = {name: x.clone() for name, x in run.model.state_dict().items()}
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    trainer.state.best_model_checkpoint = str(tmp_path / "best")
    trainer._load_best_model()
    assert all(torch.equal(x, wanted[name]) for name, x in run.model.state_dict().items())


def test_the_balance_bias_moves_once_a_step(config: Config, tmp_path: Path) -> None:
    content = config(
        **{"train.balance_bias_rate": 0.25, "train.steps": 3, "train.accumulation": 2, "train.batch_size": 2}
    )
    model = load(train(content, out=tmp_path / "run").bundle)
    for layer in model.moe_layers:
        steps = (layer.gate.balance_bias / 0.25).tolist()
        # Three steps of one each, up or down.
        assert all(step in (-3, -1, 1, 3) for step in steps)


@pytest.mark.parametrize(("rate", "fetches"), [(0.0, 2), (0.25, 4)])
def test_routing_is_fetched_once_a_line_or_where_gates_are_balanced_once_a_step(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, fetches: int
) -> None:
    found: list[float] = []

    def fetch(sums_BX: Tensor, layers: int) -> Any:
        found.append(sums_BX[0, 0].item())
        return fetch_sums(sums_BX, layers)

    monkeypatch.setattr("ragmoe.training.trainer.fetch_sums", fetch)
    changes = {"train.balance_bias_rate": rate, "train.accumulation": 2, "train.batch_size": 2, "log_every": 2}
    made = load_config(config(**changes))
    run = prepare(made)
    run_module._trainer(run, tmp_path, bf16=False, show=None).train()
    tokens = sum(int(run.collator([run.dataset[at]])["attention_mask"].sum()) for at in range(16))
    assert len(found) == fetches and sum(found) == tokens
    records = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    assert all(sum(load) == pytest.approx(1.0, abs=1e-4) for record in records for load in record["load"])


def test_a_bundle_is_trained_on(config: Config, tmp_path: Path) -> None:
    first = train(config(), out=tmp_path / "first").bundle
    model = prepare(load_config(config(base=str(first), model={}))).model
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), tensors(first).values(), strict=True))
    with pytest.raises(Exception, match=r"model.experts is 8, but the bundle .* has 4"):
        prepare(load_config(config(base=str(first), model={"experts": 8})))
    with pytest.raises(ConfigError, match="expected no start"):
        prepare(load_config(config(base=str(first), start="warm-start", model={})))


def test_a_fitted_gate_is_fitted_again_where_it_is_trained_and_forgets_no_domain(
    config: Config, world: Path, tmp_path: Path
) -> None:
    domains = {"gate": "centroid", "experts": 3, "common_experts": 1, "expert_names": ["river", "market", "common"]}
    first = prepare(load_config(config(**{f"model.{name}": value for name, value in domains.items()}))).model
    first.tokenizer.save_pretrained(tmp_path / "base")
    first.save_pretrained(tmp_path / "base")
    rows = (world / "questions.jsonl").read_text().splitlines()[:9]
    (tmp_path / "river.jsonl").write_text("\n".join(rows) + "\n")
    changes = {"base": str(tmp_path / "base"), "model": {}, "data.questions": [str(tmp_path / "river.jsonl")]}
    (before, *_) = first.gates
    for what, again in (("experts", False), ("gate", True)):
        (gate, *_) = prepare(load_config(config(**changes, **{"train.what": what}))).model.gates
        assert torch.equal(gate.weight[0], before.weight[0]) is not again
        assert torch.equal(gate.weight[1], before.weight[1]) and torch.equal(gate.offset[1], before.offset[1])


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_too_few_questions_leave_the_threshold_that_there_is(config: Config, tmp_path: Path, share: float) -> None:
    made = load_config(config(**{"data.calibration_share": share, "train.steps": 1}))
    shown = Recorder()
    run = prepare(made, show=shown)
    run.model.config.no_answer_threshold = 0.186
    run.save(tmp_path)
    assert load(tmp_path).config.no_answer_threshold == 0.186
    assert "the no-answer threshold will not be calibrated: of " in shown.lines[0]


def test_a_bundle_may_get_another_gate_if_that_is_trained(config: Config, tmp_path: Path) -> None:
    first = train(config(**{"model.gate": "token"}), out=tmp_path / "first").bundle
    changed = {"base": str(first), "model": {"gate": "retrieval"}}
    done = train(config(**changed, **{"train.what": "gate", "train.steps": 1}), out=tmp_path / "second").bundle
    before, after = tensors(first), tensors(done)
    assert load(done).config.gate == "retrieval"
    assert all(torch.equal(after[name], x) for name, x in before.items() if part_of(name) in ("experts", "base"))
    with pytest.raises(ConfigError, match=r"model\.gate is changed, but train\.what is 'experts'"):
        prepare(load_config(config(**changed, **{"train.what": "experts"})))


def test_a_saved_model_that_answers_otherwise_is_an_error(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "largest_difference", lambda *a: 0.5)
    with pytest.raises(BundleError, match=r"differ from the trained model's by 5\.00e-01"):
        train(config(**{"train.steps": 1}), out=tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoints(config: Config, tmp_path: Path) -> None:
    steep = {"train.learning_rate": 1e25, "train.clip": 1e30, "train.warmup": 0.0, "checkpoint_every": 1}
    with pytest.raises(ModelError, match=r"not finite in step 2 .*; checkpoint-1 is kept") as caught:
        train(config(**steep), out=tmp_path / "run")
    assert "lower train.learning_rate" in caught.value.hint
    kept = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert all(torch.isfinite(x).all() for x in read_bundle(kept)[0].values())


def test_a_difference_that_is_no_number_is_one() -> None:
    class Says:
        def __init__(self, end: float) -> None:
            self.outputs = SimpleNamespace(start_logits=torch.zeros(2), end_logits=torch.tensor([0.0, end]))

        def eval(self) -> Says:
            return self

        float = cpu = eval

        def __call__(self) -> SimpleNamespace:
            return self.outputs

    assert math.isnan(run_module.largest_difference(Says(0.0), Says(math.nan), {}))


def test_a_finished_run_is_not_overwritten(config: Config, tmp_path: Path) -> None:
    train(config(**{"train.steps": 1}), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a finished run"):
        train(config(), out=tmp_path / "run")
    assert train(config(**{"train.steps": 2}), out=tmp_path / "run", overwrite=True).steps == 2


def test_a_folder_with_a_configuration_of_its_own_is_no_run(config: Config, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "thesis.txt").write_text("years of work")
    (tmp_path / "training.yaml").write_text(yaml.safe_dump(config()))
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds other things than a run: src, training\.yaml"):
            train(tmp_path / "training.yaml", out=tmp_path, overwrite=overwrite)


def test_only_what_a_run_has_left_is_overwritten(config: Config, tmp_path: Path) -> None:
    content, run = config(**{"train.steps": 1}), tmp_path / "run"
    train(config(**{"train.steps": 2, "train.what": "lora", "train.lora": {"rank": 4}}), out=run)
    (run / "notes.txt").write_text("my own")
    train(content, out=run, overwrite=True)
    train(content, out=tmp_path / "fresh")
    found, fresh = ({path.name for path in folder.iterdir()} for folder in (run, tmp_path / "fresh"))
    assert found == {*fresh, "notes.txt"}
    assert read_map(run).lineage[0].version == 1 and len(read_map(run).lineage) == 1


def test_two_processes_do_not_train_in_one_folder(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for ways in ({}, {"overwrite": True}, {"resume": True}):
        with FileLock(run / ".training.lock"), pytest.raises(ConfigError, match="another process is training there"):
            train(config(), out=run, **ways)
    train(config(**{"train.steps": 1}), out=run)
    assert not (run / ".training.lock").exists()


def test_a_run_is_one_process(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="2 processes were started"):
        train(config(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_of_several_gpus_one_is_used(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainingArguments.__post_init__

    def two(self: TrainingArguments) -> None:
        real(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", two)
    assert run_module._arguments(load_config(config()), tmp_path, bf16=False).n_gpu == 1


def test_looking_for_a_checkpoint_removes_none(tmp_path: Path) -> None:
    torn = tmp_path / "checkpoints" / "checkpoint-2"
    torn.mkdir(parents=True)
    assert last_checkpoint(tmp_path) is None and torn.is_dir()


def test_another_configuration_cannot_be_resumed(config: Config, tmp_path: Path) -> None:
    assert _until(config(checkpoint_every=2), tmp_path / "run", 2)
    with pytest.raises(ConfigError, match=r"in train\.steps \(4, now 9\), seed \(0, now 3\)"):
        train(config(**{"checkpoint_every": 2, "train.steps": 9, "seed": 3}), out=tmp_path / "run", resume=True)


def test_an_arm_can_start_from_the_dense_network_of_a_bundle(config: Config, tmp_path: Path) -> None:
    first = train(config(**{"train.steps": 2, "train.learning_rate": 1e-2, "model.gate": "token"}), out=tmp_path / "a")
    own = load(first.bundle)
    run = prepare(load_config(config(start=str(first.bundle), **{"model.gate": "retrieval", "model.experts": 2})))
    for name, x in run.model.state_dict().items():
        if ".moe." not in name:
            assert torch.equal(x, own.state_dict()[name]), name
    # Its experts and gates are new, and untrained LoRA experts change nothing.
    assert not any(layer.experts.up_b.any() for layer in run.model.moe_layers)
    full = train(
        config(**{"train.steps": 1, "model.expert_kind": "ffn", "model.expert_rank": None}), out=tmp_path / "b"
    )
    with pytest.raises(ModelError, match="full experts stand in the place of its dense networks"):
        prepare(load_config(config(start=str(full.bundle))))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"raft.max_length": 500}, "max_length is 500, but the base has 128 positions"),
        ({"model.gate": "nonsense"}, "there is no gate 'nonsense'; there are: "),
        ({"model.nonsense": 1}, "unknown model settings nonsense"),
        ({"model.expert_rank": 7}, "expected a positive multiple of 8"),
        ({"model.top_k": 9}, "top_k is 9: expected 1 to 4"),
        ({"model.sparse_layers": [7]}, "but the layers are 0 to 3"),
        ({"model.sparse_layers": [], "train.what": "gate"}, "the model has no sparse layer"),
        ({"start": "/nowhere"}, "holds no PEFT adapter"),
        ({"train.what": "experts", "train.balance_bias_rate": 0.1}, "moves every gate, but train.what is 'experts'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    config: Config, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RagmoeError) as caught:
        train(config(**changes), out=tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_questions_that_are_all_kept_aside_are_not_called_unfit(config: Config, world: Path, tmp_path: Path) -> None:
    # The passage p8 is among those that are kept aside, by its digest.
    rows = (world / "questions.jsonl").read_text().splitlines()
    (tmp_path / "one.jsonl").write_text("\n".join(row for row in rows if '"q8-' in row) + "\n")
    with pytest.raises(DataError, match=r"all 3 questions .* \(data\.calibration_share is 0\.2\)\ndata\.calibration"):
        prepare(load_config(config(**{"data.questions": [str(tmp_path / "one.jsonl")]})))


def test_a_base_in_its_own_folder_is_refused_and_stays(config: Config, tmp_path: Path) -> None:
    train(config(**{"train.steps": 1}), out=tmp_path / "run")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"base is .*run, which lies in .*run") as caught:
            train(config(base=str(tmp_path / "run"), model={}), out=tmp_path / "run", overwrite=overwrite)
        assert "name another folder" in caught.value.hint
    assert is_bundle(tmp_path / "run")


def test_a_kill_while_the_model_is_saved_loses_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map is there, but nobody has checked the model yet, and the checkpoints are not gone."""

    def killed(*_: Any) -> float:
        raise KeyboardInterrupt

    content = config(**{"train.steps": 2, "checkpoint_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "largest_difference", killed)
        with pytest.raises(KeyboardInterrupt):
            train(content, out=tmp_path / "run")
    assert is_bundle(tmp_path / "run") and not is_finished(tmp_path / "run")
    with pytest.raises(ConfigError, match="did not finish"):
        train(content, out=tmp_path / "run")
    train(content, out=tmp_path / "run", resume=True)
    train(content, out=tmp_path / "whole")
    assert is_finished(tmp_path / "run")
    got, want = (read_bundle(tmp_path / name)[0] for name in ("run", "whole"))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
