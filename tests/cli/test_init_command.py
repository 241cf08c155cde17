"""``ragmoe init``: what it says it did, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny_bert
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

from ragmoe import load, load_decoder

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_dense_model_is_upcycled(ragmoe: Any, llama: Path, tmp_path: Path) -> None:
    words = ["--base", llama, "--out", tmp_path / "out", "--experts", 4, "--top-k", 1, "--expert-rank", 8]
    code, out, _ = ragmoe("init", *words, "--neighbour-width", 16, "--layers", "0,2")
    assert code == 0
    model = load_decoder(tmp_path / "out")
    counts = model.parameter_counts()
    assert out.splitlines() == [
        f"{tmp_path / 'out'}: upcycling, llama to ragmoe_mixtral with 4 experts and the gate 'retrieval'",
        "layers changed (2 of 3): 0, 2",
        f"{counts['total']:,} parameters, {counts['active']:,} active for a token",
        f"in Python: ragmoe.load_decoder({str(tmp_path / 'out')!r}); after `import ragmoe.models.families` "
        "AutoModelForCausalLM opens it too",
        f"note: {llama} has no tokenizer, and so has {tmp_path / 'out'}",
    ]
    assert counts["active"] < counts["total"] == sum(p.numel() for p in model.parameters())
    config = model.config
    assert (config.experts, config.num_experts_per_tok, config.neighbour_width) == (4, 1, 16)


def test_copies_that_differ_say_by_how_much(ragmoe: Any, llama: Path, tmp_path: Path) -> None:
    words = ["--base", llama, "--out", tmp_path / "out", "--expert-kind", "ffn", "--init", "drop", "--amount", 0.25]
    code, out, _ = ragmoe("init", *words, "--seed", 3)
    assert code == 0 and "expert copies differ from the dense weights by up to " in out
    code, out, _ = ragmoe("init", *words[:3], tmp_path / "two", *words[4:], "--seed", 3, "--json")
    found = json.loads(out)
    assert found["how"] == "upcycling" and found["layers"] == [0, 1, 2] and found["deviation"] > 0.01
    assert found["parameters"]["active"] < found["parameters"]["total"] and found["to"] == "ragmoe_mixtral"


def test_a_mixture_has_its_gates_exchanged(ragmoe: Any, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4)).save_pretrained(tmp_path / "base")
    code, out, _ = ragmoe("init", "--base", tmp_path / "base", "--out", tmp_path / "out", "--gate", "memory")
    assert code == 0 and "gate exchange, mixtral to ragmoe_mixtral with 4 experts and the gate 'memory'" in out
    assert "layers changed (3 of 3): 0, 1, 2" in out and "no clusters yet" not in out
    code, out, _ = ragmoe("init", "--base", tmp_path / "base", "--out", tmp_path / "three", "--gate", "clusters")
    assert code == 0 and "its gates have no clusters yet, so no neighbour votes" in out.replace("\n", " ")
    code, _, err = ragmoe("init", "--base", tmp_path / "base", "--out", tmp_path / "two", "--experts", 8)
    assert code == 1 and "keeps its experts: experts cannot be chosen" in err.replace("\n", " ")


def test_a_bert_becomes_a_reader(ragmoe: Any, tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "bert")
    words = ["--base", tmp_path / "bert", "--out", tmp_path / "out", "--experts", 4, "--expert-rank", 8]
    code, out, err = ragmoe("init", *words, "--neighbour-width", 16)
    assert code == 0, err
    assert "upcycling, bert to ragmoe_bert with 4 experts" in out and "layers changed (2 of 4): 1, 3" in out
    assert load(tmp_path / "out").sparse_layers == [1, 3]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) > 20
    code, _, err = ragmoe("init", *words[:3], tmp_path / "two", "--init", "drop")
    assert code == 1 and "a reader's experts start by copy or noise" in err
    code, _, err = ragmoe("init", *words[:3], tmp_path / "two", "--amount", 0.1)
    assert code == 1 and "differ is 0.1, but copies are exact" in err.replace("\n", " ")
    words = ["--base", tmp_path / "bert", "--out", tmp_path / "two", "--expert-kind", "ffn", "--init", "noise"]
    assert ragmoe("init", *words)[0] == 0
    up = load(tmp_path / "two").moe_layers[0].experts.fused.up_proj
    assert not up[0].equal(up[1])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--layers", "first"], 2, "--layers first: expected all, or numbers such as 8,12,16"),
        (["--layers", ","], 1, "no layer was changed"),
        (["--layers", "7"], 1, "sparse_layers has [7], but the layers are 0 to 2"),
        (["--gate", "router"], 1, "there is no gate 'router'; there are: centroid,"),
        (["--expert-kind", "glu"], 1, "there is no expert kind of decoders 'glu'; there are: ffn, lora"),
        (["--experts", "0"], 1, "experts is 0: expected 1 or more"),
        (["--experts", "-1"], 1, "experts is -1: expected 1 or more"),
        (["--top-k", "0"], 1, "top_k is 0: expected 1 to 8"),
        (["--gate-width", "0"], 1, "gate_width is 0: expected 1 or more"),
        (["--neighbour-width", "-3"], 1, "neighbour_width is -3: expected 1 or more"),
        (["--init", "noise"], 1, "LoRA experts differ from the start"),
        (["model.gate=token"], 2, "model.gate=token: there is an option for that"),
        (["model.layers=[1]"], 2, "model.layers=[1]: there is an option for that"),
        (["model.sparse_layers=[1]"], 2, "model.sparse_layers=[1]: there is an option for that"),
        (["model.seed=3"], 2, "model.seed=3: there is an option for that"),
        (["model.losses.none=0.1"], 1, "none"),
        (["train.steps=3"], 2, "train.steps=3: expected a setting of the model"),
        (["model.group=3"], 1, "unknown settings group; there are"),
        (["--gate", "oracle"], 1, "model.common_experts=1 or model.top_k=1"),
    ],
)
def test_errors(ragmoe: Any, llama: Path, tmp_path: Path, words: list[str], code: int, said: str) -> None:
    found, out, err = ragmoe("init", "--base", llama, "--out", tmp_path / "out", *words)
    assert (found, out) == (code, "") and said in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_gates_get_the_settings_that_they_want(ragmoe: Any, llama: Path, tmp_path: Path) -> None:
    words = ["--base", llama, "--experts", 4, "--expert-rank", 8, "--neighbour-width", 16]
    code, _, err = ragmoe("init", *words, "--out", tmp_path / "a", "--gate", "hierarchical", "model.expert_groups=2")
    assert code == 0, err
    assert load_decoder(tmp_path / "a").config.expert_groups == 2
    named = ["model.expert_names=[law, bank, clinic, rest]", "model.common_experts=1"]
    code, _, err = ragmoe("init", *words, "--out", tmp_path / "b", "--gate", "oracle", *named)
    assert code == 0, err
    assert load_decoder(tmp_path / "b").expert_names == ["law", "bank", "clinic", "rest"]
    save_tiny_bert(tmp_path / "bert")
    words[1] = tmp_path / "bert"
    code, _, err = ragmoe("init", *words, "--out", tmp_path / "c", "model.vote_start=1", "--gate", "memory")
    assert code == 0, err
    assert load(tmp_path / "c").config.vote_start == 1.0


def test_a_reader_is_no_longer_than_its_base(ragmoe: Any, tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "bert")
    words = ["--base", tmp_path / "bert", "--experts", 4, "--expert-rank", 8]
    assert ragmoe("init", *words, "--out", tmp_path / "a")[0] == 0
    reader = load(tmp_path / "a")
    assert (reader.config.max_length, reader.config.stride) == (128, 32)
    assert ragmoe("init", *words, "--out", tmp_path / "c", "model.max_length=null")[0] == 0
    assert load(tmp_path / "c").config.max_length == 128
    code, _, err = ragmoe("init", *words, "--out", tmp_path / "d", "model.max_length=long")
    assert code == 1 and "max_length is 'long', but" in err
    code, _, err = ragmoe("init", *words, "--out", tmp_path / "b", "model.max_length=129")
    assert code == 1 and "max_length is 129, but" in err and "has 128 positions" in err.replace("\n", " ")


def test_a_bundle_is_no_base(ragmoe: Any, llama: Path, tmp_path: Path) -> None:
    words = ["--expert-rank", 8, "--neighbour-width", 16]
    assert ragmoe("init", "--base", llama, "--out", tmp_path / "a", *words)[0] == 0
    code, _, err = ragmoe("init", "--base", tmp_path / "a", "--out", tmp_path / "b", *words)
    assert code == 1 and "is a bundle already: its gates are 'retrieval'" in err.replace("\n", " ")
    assert not (tmp_path / "b").exists()


def test_a_file_in_the_place_of_the_bundle_is_seen_first(ragmoe: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    code, _, err = ragmoe("init", "--base", tmp_path / "none", "--out", tmp_path / "out")
    assert code == 1 and "out is a file; expected a folder" in err.replace("\n", " ")
    assert (tmp_path / "out").read_text() == "mine"


def test_what_is_no_checkpoint(ragmoe: Any, tmp_path: Path) -> None:
    code, _, err = ragmoe("init", "--base", tmp_path, "--out", tmp_path / "out")
    assert code == 1 and f"{tmp_path} is not a checkpoint" in err.replace("\n", "")
    assert ragmoe("init")[0] == 2
