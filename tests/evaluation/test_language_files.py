"""The committed experiments with language models learn from train alone, and compare models of the same active size."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ragmoe.evaluation.experiment import LanguageExperiment, load_experiment
from ragmoe.index.recipe import read_recipe
from ragmoe.training.config import TrainingConfig, load_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "eval" / "experiments"
EXPERIMENTS = ("lm_domains", "lm_long", "lm_late_start", "lm_late")
# Marks of the three splits, which the made documents consist of, each a word of its own.
SPLITS = {"train": "alder", "valid": "zyxqu", "test": "wvujk"}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Domains with three splits, as the experiments find them."""
    monkeypatch.setenv("RAGMOE_DATA", str(tmp_path / "data"))
    for domain in corpus().DOMAINS:
        folder = tmp_path / "data" / domain
        folder.mkdir(parents=True)
        for split, word in SPLITS.items():
            rows = [
                {"id": f"{domain}-{split}-{i}", "text": f"{word} {domain} " * 40, "domain": domain} for i in range(9)
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def corpus() -> ModuleType:
    """eval/experiments/lm_corpus.py as a module."""
    spec = importlib.util.spec_from_file_location("lm_corpus", FOLDER / "lm_corpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def opened(name: str) -> LanguageExperiment:
    found = load_experiment(FOLDER / f"{name}.yaml")
    assert isinstance(found, LanguageExperiment)
    return found


def trained(name: str) -> Iterator[tuple[str, TrainingConfig]]:
    found = opened(name)
    return ((arm, found.training(arm, 0, ROOT / "indexes" / "lm")) for arm in found.arm_names)


def test_only_train_is_learned_from_and_only_valid_is_measured(data: Path) -> None:
    learned = [load_config(FOLDER / "lm_base.yaml")] + [config for name in EXPERIMENTS for _, config in trained(name)]
    for config in learned:
        sources = [*config.data.documents, *config.data.replay]
        assert len(config.data.documents) in (1, 6)
        assert {Path(source).name for source in sources} == {"train.jsonl"}
        if config.new_expert is not None:
            assert {Path(source).name for source in config.new_expert.unseen} == {"valid.jsonl"}
            assert not config.new_expert.others
    for name in EXPERIMENTS:
        measured = [source for sources in opened(name).settings.values() for source in sources]
        assert len(measured) == len(set(measured)) >= 5
        assert {Path(source).name for source in measured} == {"valid.jsonl"}
    assert [Path(source).name for source in read_recipe(ROOT / "indexes" / "lm.yaml").sources] == ["datastore.jsonl"]


def test_what_is_made_for_them_comes_from_train(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, out = corpus(), tmp_path / "lm"
    modules = [(f"m{i}.py", f"# module {i}\n" + "value = 1\n" * 300) for i in range(40)]
    monkeypatch.setattr(module, "modules", lambda: iter(modules))
    monkeypatch.setattr(module, "VALID_BYTES", 20_000)
    monkeypatch.setattr("sys.argv", ["lm_corpus.py", "--data", str(data), "--out", str(out)])
    module.main()

    def rows(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    code = {split: {row["id"] for row in rows(out / "code" / f"{split}.jsonl")} for split in ("train", "valid")}
    assert code["train"] and code["valid"] and not code["train"] & code["valid"]
    stored = rows(out / "datastore.jsonl")
    known = code["train"] | {f"{domain}-train-{i}" for domain in module.DOMAINS for i in range(9)}
    assert stored and {row["id"] for row in stored} < known
    vocabulary = json.loads((out / "start" / "tokenizer.json").read_text())["model"]["vocab"]
    # A word that is learned from is a token of its own, one of the other splits is none.
    assert [any(word in token for token in vocabulary) for word in SPLITS.values()] == [True, False, False]
    assert "M parameters" in capsys.readouterr().out


@pytest.mark.parametrize("experiment", ["lm_domains", "lm_long", "lm_late_start"])
def test_arms_have_the_same_active_size(
    data: Path, tmp_path: Path, experiment: str, small_start: Callable[[Path], int]
) -> None:
    """By what they are made of, before they are trained: within 2 % of each other, LoRA and full experts apart."""
    from ragmoe.models.initialising import make

    base = small_start(tmp_path / "start")
    assert 5_000_000 <= base <= 15_000_000
    active: dict[str, dict[str, int]] = {"lora": {}, "ffn": {}}
    for arm, config in trained(experiment):
        if arm in opened(experiment).untrained_arms:
            continue
        given = {"neighbour_width": 384, **{key: value for key, value in config.model.items() if value is not None}}
        model = make(tmp_path / "start", seed=0, **given).model
        active[given["expert_kind"]][arm] = model.parameter_counts()["active"]
    assert len(active["lora"]) >= 2 and (experiment != "lm_domains" or len(active["ffn"]) == 5)
    for of_kind in active.values():
        assert not of_kind or max(of_kind.values()) <= 1.02 * min(of_kind.values()), of_kind


@pytest.fixture
def small_start(data: Path) -> Callable[[Path], int]:
    """Writes the random base that all begin with, and says how many parameters it has."""

    def start(folder: Path) -> int:
        from transformers import AutoModelForCausalLM

        corpus().write_start(folder, [data / "legal" / "train.jsonl"])
        return int(AutoModelForCausalLM.from_pretrained(folder).num_parameters())

    return start


def test_the_base_sees_no_text_more_than_four_times(data: Path) -> None:
    base = load_config(FOLDER / "lm_base.yaml")
    for _, config in (*trained("lm_domains"), *trained("lm_long")):
        seen = sum(
            run.train.steps * run.train.batch_size * run.language.chunk_tokens
            for run in (base, config)
            if run.language is not None
        )
        # Six million words, of at least a token each.
        assert seen <= 4 * 6_000_000
