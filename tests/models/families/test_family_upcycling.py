"""Dense decoders become sparse ones: what stays the same, and by how much what is to differ differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import DENSE, NATIVE, R, native, prompts, shaken, some_neighbours
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertTokenizerFast, GPT2Config

from ragmoe import BundleError, ConfigError, ModelError, load, load_decoder
from ragmoe.experts import start_class
from ragmoe.models.initialising import init, make

SMALL = {"neighbour_width": R, "gate_width": 8, "experts": 4, "top_k": 2}


def dense(family: str, folder: Path, **settings: Any) -> Any:
    model = shaken(AutoModelForCausalLM.from_config(DENSE[family](**settings)))
    model.save_pretrained(folder)
    return model


def make_without_saving(folder: Path, **settings: Any) -> Any:
    sizes = (
        SMALL if (folder / "config.json").read_text().count("experts") == 0 else {"neighbour_width": R, "gate_width": 8}
    )
    return make(folder, **{**sizes, **settings})


def upcycled(folder: Path, **settings: Any) -> Any:
    return init(folder, out=folder / "out", **{**SMALL, **settings})


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("layers", [None, [1]])
def test_lora_experts_answer_exactly_what_the_dense_model_did(family: str, layers: Any, tmp_path: Path) -> None:
    want, x = dense(family, tmp_path), prompts()
    made = upcycled(tmp_path, expert_kind="lora", expert_rank=8, layers=layers)
    assert made.how == "upcycling" and made.layers == (layers or [0, 1]) and made.deviation == 0.0
    for model in (made.model, load_decoder(tmp_path / "out")):
        assert torch.equal(model(x, **some_neighbours().tensors()).logits, want(x).logits)
        mask = torch.ones_like(x)
        mask[0, :2] = 0
        kwargs = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(x, **some_neighbours().tensors(), **kwargs), want.generate(x, **kwargs))


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("layers", [None, [0]])
@pytest.mark.parametrize("tied", [False, True])
def test_copies_answer_what_the_dense_model_did(family: str, layers: Any, tied: bool, tmp_path: Path) -> None:
    want, x = dense(family, tmp_path, tie_word_embeddings=tied), prompts()
    made = upcycled(tmp_path, expert_kind="ffn", layers=layers)
    assert made.deviation == 0.0 and made.model.sparse_layers == made.layers
    model = load_decoder(tmp_path / "out")
    assert torch.allclose(model(x, **some_neighbours().tensors()).logits, want(x).logits, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    # Without the weights summing to one, copies together would say less than one network.
    assert model.config.normalise_weights


@pytest.mark.parametrize("way", ["noise", "drop"])
@torch.no_grad()
def test_experts_that_differ(way: str, tmp_path: Path) -> None:
    want, x = dense("llama", tmp_path), prompts()
    made = upcycled(tmp_path, expert_kind="ffn", init=way, amount=0.25)
    source = [want.model.layers[i].mlp for i in range(2)]
    deviation = 0.0
    for block, mlp in zip(made.model.moe_layers, source, strict=True):
        gate_EHD, up_EHD = block.experts.gate_up_proj.chunk(2, dim=1)
        copies = (gate_EHD, up_EHD, block.experts.down_proj)
        for fused, one in zip(copies, (mlp.gate_proj, mlp.up_proj, mlp.down_proj), strict=True):
            deviation = max(deviation, float((fused - one.weight).abs().max()))
            assert not torch.equal(fused[0], fused[1])
        if way == "drop":
            kept = [(gate_EHD == mlp.gate_proj.weight).all(dim=2), (up_EHD == mlp.up_proj.weight).all(dim=2),
                    (block.experts.down_proj == mlp.down_proj.weight).all(dim=1)]  # fmt: skip
            # A quarter of each expert's 64 hidden units, the same in its three matrices, others in other experts.
            assert all(torch.equal(kept[0], other) for other in kept[1:])
            assert (kept[0].sum(dim=1) == 48).all() and not torch.equal(kept[0][0], kept[0][1])
        else:
            spread = (gate_EHD - mlp.gate_proj.weight).std() / mlp.gate_proj.weight.std()
            assert spread == pytest.approx(0.25, rel=0.05)
    assert made.deviation == pytest.approx(deviation) and deviation > 0
    assert not torch.allclose(made.model(x).logits, want(x).logits, atol=1e-3)


def test_what_is_drawn_anew_has_the_mean_and_spread_of_what_went() -> None:
    gate_up, down = torch.randn(2, 2 * 400, 64) * 3 + 5, torch.randn(2, 64, 400) * 0.5 - 2
    start_class("drop")(1.0, torch.Generator().manual_seed(0)).apply(gate_up, down)
    assert gate_up.mean() == pytest.approx(5, abs=0.1) and gate_up.std() == pytest.approx(3, rel=0.05)
    assert down.mean() == pytest.approx(-2, abs=0.05) and down.std() == pytest.approx(0.5, rel=0.05)


def test_half_precision_stays_what_it_was(tmp_path: Path) -> None:
    dense("qwen3", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    want, x = AutoModelForCausalLM.from_pretrained(tmp_path), prompts()
    made = upcycled(tmp_path, expert_rank=8)
    assert made.model.dtype == torch.bfloat16 and made.model.gates[0].balance_bias.dtype == torch.float32
    again = load_decoder(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(x).logits, want(x).logits)


@pytest.mark.parametrize("family", NATIVE)
def test_gates_are_exchanged(family: str, tmp_path: Path) -> None:
    theirs, x = native(family), prompts()
    theirs.generation_config.max_new_tokens = 5
    theirs.save_pretrained(tmp_path)
    made = init(tmp_path, out=tmp_path / "out", gate="retrieval", neighbour_width=R, gate_width=8)
    assert made.how == "gate exchange" and made.layers == made.model.sparse_layers and len(made.notes) == 1
    ours = load_decoder(tmp_path / "out")
    assert torch.allclose(ours(x, **some_neighbours().tensors()).logits, theirs(x).logits, atol=1e-5)
    assert ours.generation_config.max_new_tokens == 5
    assert AutoConfig.from_pretrained(tmp_path / "out").architectures == [type(ours).__name__]


def test_a_gate_that_cannot_keep_the_old_one_says_so(tmp_path: Path) -> None:
    native("olmoe").save_pretrained(tmp_path)
    made = init(tmp_path, out=tmp_path / "out", gate="mlp")
    assert "the gate 'mlp' has no place for the one that was there and starts untrained: answers differ" in made.notes
    made = make_without_saving(tmp_path, gate="hierarchical", expert_groups=2)
    assert any(note.startswith("the gate 'hierarchical' has no place") for note in made.notes)
    assert not any("no place" in note for note in make_without_saving(tmp_path, gate="retrieval").notes)
    assert load_decoder(tmp_path / "out").config.gate == "mlp"


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """They would be drawn at random, others each time."""
    dense("llama", tmp_path).model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ModelError, match=r"lacks 1 weights of a language model.*lm_head"):
        make_without_saving(tmp_path / "headless", expert_rank=8)


def test_a_base_that_cannot_be_read_is_said_to_be(tmp_path: Path) -> None:
    dense("llama", tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"the weights of .* cannot be read: "):
        make_without_saving(tmp_path, expert_rank=8)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the weights of .* cannot be read: "):
        make_without_saving(tmp_path, expert_rank=8)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"is quantised \(gptq\)"):
        make_without_saving(tmp_path, expert_rank=8)


def test_sparse_layers_may_be_given_as_a_setting(tmp_path: Path) -> None:
    dense("llama", tmp_path)
    assert make_without_saving(tmp_path, expert_rank=8, sparse_layers=[1]).layers == [1]


@pytest.mark.parametrize("family", DENSE)
def test_a_gate_of_groups_is_taught_which_to_choose(family: str, tmp_path: Path) -> None:
    """Not where weights sum to one, for there the group's own probability cancels."""
    dense(family, tmp_path)
    settings = {"gate": "hierarchical", "expert_groups": 2, "experts": 4, "balance_loss": 0.0, "z_loss": 0.0}
    model = make_without_saving(tmp_path, expert_rank=8, **settings).model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.normal_(std=0.3)
    x = torch.randint(3, 64, (4, 12))
    model(x, labels=x).loss.backward()
    gradients = [p.grad.abs().max().item() for n, p in model.named_parameters() if n.endswith("inner.group.weight")]
    assert len(gradients) == 2 and min(gradients) > 1e-5
    with pytest.raises(ModelError, match=r"which cancels where weights sum to one as in ragmoe_.* with 'ffn'"):
        make_without_saving(tmp_path, expert_kind="ffn", **settings)


@pytest.mark.parametrize("gate", ["centroid", "ridge"])
def test_a_gate_that_is_fitted_to_questions_is_for_readers(gate: str, tmp_path: Path) -> None:
    dense("llama", tmp_path)
    with pytest.raises(ModelError, match=f"the gate '{gate}' is fitted to questions and their domains, for readers"):
        make_without_saving(tmp_path, expert_rank=8, gate=gate, common_experts=1)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    dense("llama", tmp_path)
    BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "a": 2}).save_pretrained(tmp_path)
    assert upcycled(tmp_path, expert_rank=8).notes == []
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()["a"] == 2


def test_opening_a_decoder(tmp_path: Path) -> None:
    dense("llama", tmp_path)
    upcycled(tmp_path, expert_rank=8, expert_names=["law", "bank", "clinic", "archive"])
    model = load_decoder(tmp_path / "out", without=["bank"])
    assert not model.training and not model.gates[0].available[1]
    assert load_decoder(tmp_path / "out", experts=["clinic", "law"]).expert_names == ["clinic", "law"]
    with pytest.raises(BundleError, match="is a 'ragmoe_mixtral' model; RagmoeBertForQuestionAnswering opens"):
        load(tmp_path / "out")
    with pytest.raises(BundleError, match="is not a bundle"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"layers": []}, ModelError, r"no layers were asked for; its modules are .*layers\.\*\.mlp\.gate_proj"),
        ({"layers": [2]}, ModelError, r"sparse_layers has \[2\], but the layers are 0 to 1"),
        ({"init": "shuffle"}, ConfigError, "there is no way to start experts 'shuffle'; there are: copy, drop, noise"),
        ({"init": "drop"}, ConfigError, "LoRA experts differ from the start"),
        ({"amount": 0.1}, ConfigError, "is 0.1: expected none, for copies are exact"),
        ({"init": "drop", "amount": 2.0, "expert_kind": "ffn"}, ConfigError, "is 2: expected 0 to 1"),
        ({"expert_kind": "ffn", "expert_rank": 8}, ModelError, "'ffn' experts have no rank"),
        ({"gates": "token"}, ModelError, "unknown settings gates; there are: balance_loss, "),
        ({"gate_width": "wide"}, ModelError, "bad settings: .*gate_width"),
        ({"top_k": 5}, ConfigError, "top_k is 5: expected 1 to 4"),
    ],
)
def test_what_cannot_be_done(settings: Any, error: type, said: str, tmp_path: Path) -> None:
    dense("llama", tmp_path)
    with pytest.raises(error, match=said):
        upcycled(tmp_path, **settings)
    assert not (tmp_path / "out").exists()


def test_bases_that_have_no_place_in_the_sparse_family(tmp_path: Path) -> None:
    dense("llama", tmp_path, attention_bias=True, mlp_bias=True)
    with pytest.raises(ModelError, match="has attention_bias, mlp_bias, which mixtral has no place for"):
        upcycled(tmp_path)
    GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is a 'gpt2' model, and those known are bert, glm4_moe.*h\.\*\.mlp\.c_fc"):
        upcycled(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="is not a checkpoint"):
        upcycled(tmp_path)


def test_a_mixture_keeps_its_experts(tmp_path: Path) -> None:
    native("mixtral").save_pretrained(tmp_path)
    for settings, said in (({"experts": 8}, "experts cannot be chosen"), ({"init": "copy"}, "init only concern")):
        with pytest.raises(ModelError, match=said):
            init(tmp_path, out=tmp_path / "out", **settings)
    with pytest.raises(BundleError, match="is not empty"):
        init(tmp_path, out=tmp_path)
