"""``ragmoe plan``: its tables, its JSON, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SMALL = """model_type: mixtral
vocab_size: 200
hidden_size: 64
intermediate_size: 160
num_hidden_layers: 3
num_attention_heads: 4
num_key_value_heads: 2
num_local_experts: 4
max_position_embeddings: 128
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def cells(out: str, label: str) -> list[str]:
    """What stands in the line of a table that begins so."""
    (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{label}  ")]
    return [cell for cell in line.strip().removeprefix(label).split("  ") if cell.strip()]


def test_the_tables(ragmoe: Any, small: Path) -> None:
    code, out, err = ragmoe("plan", small, "--dtype", "bf16", "--batch", 2, "--expert-parallel", 2)
    assert code == 0 and not err
    assert f"{small}: mixtral, 3 layers of width 64, 3 of them with 4 experts, 2 a token" in out.replace("\n", " ")
    total, routed = 432_320, 3 * 4 * 3 * 64 * 160
    assert cells(out, "all")[0].strip() == f"{total:,}"
    assert cells(out, "experts")[0].strip() == f"{routed:,}"
    assert cells(out, "active for a token")[0].strip() == f"{total - routed // 2:,}"
    assert "FLOPs of one token among 128" in out and "Memory of training in bf16, 2 x 128 tokens a batch" in out
    assert [cell.strip() for cell in cells(out, "weights")] == ["844 KiB", "844 KiB"]
    assert "Expert parallelism over 2 ranks" in out
    assert cells(out, "a token and layer, forward")[0].strip() == "256 B"


def test_json_has_it_all(ragmoe: Any, small: Path) -> None:
    code, out, _ = ragmoe("plan", small, "num_experts_per_tok=1", "--json")
    found = json.loads(out)
    assert code == 0 and found["top_k"] == 1 and found["communication"] is None
    assert found["parameters"]["active"] < found["parameters"]["total"] == 432_320
    memory, flops = found["memory"], found["flops"]
    state = memory["weights"] + memory["gradients"] + memory["moments"] + memory["master"]
    assert memory["training"] == state + memory["activations"]
    assert flops["forward"] == sum(flops["by_kind"].values()) and flops["backward"] == 2 * flops["forward"]


def test_a_bundle_says_what_a_question_costs(ragmoe: Any, make_bundle: Any) -> None:
    code, out, _ = ragmoe("plan", make_bundle("planned"))
    assert code == 0 and "ragmoe_bert, 2 layers of width 16" in out.replace("\n", " ")
    assert "Once a question, for its neighbours:" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (["hidden_sise=3"], 2, "error: the command: 'mixtral' has no field 'hidden_sise'; there are: "),
        (["--dtype", "fp8"], 2, "error: dtype is 'fp8': expected fp32 or bf16"),
        (["--length", "0"], 2, "error: length is 0: expected at least 1"),
        (["num_experts_per_tok=5"], 1, "error: a token takes 5 experts, but a layer has 4: expected 1 to 4"),
        (
            ["--expert-parallel", "3"],
            1,
            "error: 4 experts cannot be shared out over 3 ranks; numbers of ranks that fit",
        ),
        (["model_type=mixtrall"], 1, "hint: did you mean mixtral"),
    ],
)
def test_errors(ragmoe: Any, small: Path, words: list[str], exit_code: int, said: str) -> None:
    code, out, err = ragmoe("plan", small, *words)
    assert (code, out) == (exit_code, "") and said in err.replace("\n", " ")


def test_what_is_no_configuration(ragmoe: Any, tmp_path: Path) -> None:
    code, _, err = ragmoe("plan", tmp_path)
    assert code == 1 and "holds no config.json and is no bundle; it has nothing" in err
    assert "hint: ragmoe plan takes a training file, a bundle" in err.replace("\n", " ")
    assert ragmoe("plan")[0] == 2
