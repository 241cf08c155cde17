"""The speed benchmarks run at tiny sizes and write the shape that others read. Nothing here looks at the clock."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import _timing
import answer
import gate_overhead
import moe_layer
import pytest
import torch
from _device_layer import device_rows
from _layers import Case, check_equal, full, gated
from _result import row
from stub_encoder import StubEncoder
from tiny import save_tiny_bert
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from ragmoe.index import BuildOptions, Index, build_index
from ragmoe.models import RagmoeBertForQuestionAnswering

WORDS = ("river", "clinic", "bank", "archive", "law", "zebra")
KEYS = ["case", "metric", "value", "unit", "baseline", "ratio", "target", "ok"]
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a benchmark and gives the rows it wrote, checked for their shape."""

    def call(script: ModuleType, *words: str) -> list[dict[str, Any]]:
        out, name = tmp_path / "new" / "result.json", script.__name__
        monkeypatch.setattr(script, "keep_freed_memory", lambda: None)
        monkeypatch.setattr(sys, "argv", [name, "--smoke", "--rounds", "1", "--out", str(out), *words])
        script.main()
        content = json.loads(out.read_text())
        assert list(content) == ["bench", "machine", "rows"] and content["bench"] == name
        for line in content["rows"]:
            assert list(line) == KEYS
            assert line["value"] > 0 and line["ratio"] == pytest.approx(line["value"] / line["baseline"], rel=0.05)
            assert line["ok"] is (None if line["target"] is None else line["ratio"] >= line["target"])
        assert out.with_suffix(".md").read_text().startswith("# ")
        return content["rows"]

    return call


def test_moe_layer(run: Run) -> None:
    rows = run(moe_layer)
    cases = {r["case"]: [] for r in rows}
    for r in rows:
        cases[r["case"]].append(r["metric"])
    assert [len(metrics) for metrics in cases.values()] == [10, 4, 2]
    assert "gated experts to transformers' block, forward+backward" in cases["D=32 H=64 E=8 K=2 S=24 fp32 cpu"]
    assert cases["D=32 H=64 E=64 K=2 S=24 fp32 cpu"][0] == "64 experts to 8, forward"


def test_only_some_cases(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert {r["case"] for r in run(moe_layer, "--only", "H=16 .*bf16")} == {"D=32 H=16 E=8 K=2 S=24 bf16 cpu"}
    assert capsys.readouterr().err == "D=32 H=16 E=8 K=2 S=24 bf16 cpu\n"


def test_gate_overhead(run: Run) -> None:
    rows = run(gate_overhead)
    assert [r["metric"] for r in rows] == ["forward", "forward+backward"] * 3 + ["step"]
    assert {r["target"] for r in rows} == {1 / 1.03, 1 / 1.05}


@pytest.fixture
def _tiny_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = save_tiny_bert(tmp_path / "bert")
    corpus, tokenizer = tmp_path / "corpus.jsonl", AutoTokenizer.from_pretrained(base)
    # This tokenizer spells most words, so that texts are short.
    lines = [{"id": f"p{i}", "text": f"The {word} of the city is open.", "domain": "d"} for i, word in enumerate(WORDS)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def index(folder: Path) -> Index:
        build_index(BuildOptions((str(corpus),), folder / "index", encoder=StubEncoder()))
        return Index.open(folder / "index", encoder=StubEncoder())

    def reader(folder: Path) -> RagmoeBertForQuestionAnswering:
        settings = {"gate": "retrieval", "experts": 4, "expert_rank": 8, "neighbour_width": 64, "max_length": 128}
        model = RagmoeBertForQuestionAnswering.from_dense(base, **settings)
        model.tokenizer = tokenizer
        return model

    def dense() -> answer.HuggingFaceReader:
        return answer.HuggingFaceReader(BertForQuestionAnswering(BertConfig.from_pretrained(base)), tokenizer)

    for name, make in (("make_index", index), ("make_reader", reader), ("make_dense", dense)):
        monkeypatch.setattr(answer, name, make)
    monkeypatch.setattr(answer, "MAX_LENGTH", 128)
    monkeypatch.setattr(answer, "STRIDE", 32)


@pytest.mark.usefixtures("_tiny_answers")
def test_answer(run: Run) -> None:
    rows = run(answer)
    assert [r["metric"] for r in rows] == ["answer", "search alone", "reading alone"] * 4
    assert [r["target"] for r in rows] == [1.0, None, None] * 4
    assert [r["case"] for r in rows[:6:3]] == [
        "3 questions, all in one call; one passage at a time",
        "3 questions, all in one call; 32 passages at a time",
    ]


def test_the_baseline_reader_finds_the_best_span_of_all_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "MAX_LENGTH", 24)
    monkeypatch.setattr(answer, "STRIDE", 4)
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bert(tmp_path))
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("river", "zebra", "who", "bank")}

    class Model(nn.Module):
        """Starts at every river, ends at every zebra; the question's own words score best of all."""

        def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            asked = 9.0 * (input_ids == ids["who"])
            start, end = (5.0 * (input_ids == ids[word]) + asked for word in ("river", "zebra"))
            return SimpleNamespace(start_logits=start, end_logits=end + 2.0 * (input_ids == ids["bank"]))

    reader = answer.HuggingFaceReader(Model(), tokenizer)
    filler = "the city open clinic " * 9
    long = f"{filler} the river the zebra {filler}"
    backwards = "zebra the river what bank"
    assert reader.answer(["who", "who"], [[backwards, long], [backwards]], 2) == ["river the zebra", "river what bank"]


def test_equal_layers_and_those_that_are_not() -> None:
    case = Case(16, 32, 4, 2, 12, "fp32")
    contenders, x = full(case) | gated(case), case.input()
    check_equal(case, contenders, x)
    with torch.no_grad():
        contenders["transformers"].module.gate.weight.data = torch.randn(4, 16)  # type: ignore[union-attr]
        with pytest.raises(AssertionError):
            check_equal(case, {**contenders, "gated": full(case)["ours"]}, x)


def test_the_layer_of_a_device() -> None:
    rows = device_rows(_timing.Clock(1, 0.0), Case(16, 8, 4, 2, 12, "bf16"), side=16)
    assert [(r["metric"], r["target"]) for r in rows] == [
        ("grouped_mm to a dense product, forward", 0.24),
        ("grouped_mm to a dense product, forward+backward", 0.24),
    ]


def test_runs_take_turns() -> None:
    order: list[str] = []
    turns = ["".join(random.Random(turn).sample("abc", 3)) for turn in range(3)]
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    medians = _timing.Clock(rounds=9, seconds=-1.0).medians(runs)
    # Once each that does not count; then three rounds, which no lack of time cuts short.
    assert "".join(order) == "abc" + "".join(turns) and len(set(turns)) > 1
    assert set(medians) == {"a", "b", "c"}
    order.clear()
    _timing.Clock(rounds=5, seconds=60.0).medians(runs)
    assert len(order) == 6 * 3


def test_rows() -> None:
    assert row("c", "m", 3.0, baseline=4.0, target=0.7, unit="GFLOP/s") == {
        "case": "c", "metric": "m", "value": 3.0, "unit": "GFLOP/s", "baseline": 4.0, "ratio": 0.75, "target": 0.7,
        "ok": True,
    }  # fmt: skip
    assert row("c", "m", 3.0, baseline=4.0, target=0.8)["ok"] is False
    assert row("c", "m", 3.0, baseline=None, target=None)["ratio"] is None
