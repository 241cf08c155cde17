"""What transformers asks of any of its models, by name, for every family and both kinds of experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_decoders import NATIVE, PAD, VOCABULARY, WIDTH, E, K, R, make, prompts, some_neighbours
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import load_sharded_checkpoint

from ragmoe import BundleError, ModelError
from ragmoe.generation import is_generator
from ragmoe.models.families import FAMILIES, load_decoder

CASES = [*NATIVE, "mixtral-lora"]


def case(name: str, **settings: Any) -> Any:
    family, _, kind = name.partition("-")
    return make(family, **({"expert_kind": kind} if kind else {}), **settings)


def same(one: Any, two: Any) -> bool:
    left, right = one.state_dict(), two.state_dict()
    equal = all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)
    x, named = prompts(), some_neighbours().tensors()
    return left.keys() == right.keys() and equal and torch.equal(one(x, **named).logits, two(x, **named).logits)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(name: str, tied: bool, tmp_path: Path) -> None:
    model = case(name, tie_word_embeddings=tied, expert_names=["law", "bank", "clinic", "archive"])
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    for again in (type(model).from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(again) is type(model) and same(model, again.eval())
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
        assert again.generation_config.max_new_tokens == 7 and again.expert_names[2] == "clinic"
    bare = AutoModel.from_pretrained(tmp_path).eval()
    x = prompts()
    assert torch.equal(bare(x).last_hidden_state, model.model(x).last_hidden_state)


@pytest.mark.parametrize("name", CASES)
def test_resized_embeddings(name: str, tmp_path: Path) -> None:
    for tied in (False, True):
        model, x = case(name, tie_word_embeddings=tied), prompts()
        before = model(x).logits
        model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
        assert torch.equal(model(x).logits[..., :VOCABULARY], before) and model(x).logits.shape[-1] == VOCABULARY + 9
        assert model(x, labels=x).loss.isfinite()
        model.save_pretrained(tmp_path / str(tied))
        assert same(model, type(model).from_pretrained(tmp_path / str(tied)).eval())


@pytest.mark.parametrize("name", CASES)
def test_left_padding(name: str) -> None:
    model, x, neighbours = case(name), prompts(2, 6), some_neighbours(2)
    padded = torch.cat([torch.full((2, 3), PAD), x], dim=1)
    mask = (torch.arange(9) >= 3).long().expand(2, 9)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=places, **neighbours.tensors()).logits[:, 3:]
    assert torch.allclose(got, model(x, **neighbours.tensors()).logits, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_cache_equality(name: str) -> None:
    model, x, named = case(name), prompts(), some_neighbours().tensors()
    whole, cache, pieces = model(x, **named).logits, None, []
    for piece in x.split([3, 1, 1, 2], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True, **named)
        cache, pieces = out.past_key_values, [*pieces, out.logits]
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients_with_checkpointing_are_those_without(name: str) -> None:
    model, x, named, found = case(name).train(), prompts(), some_neighbours().tensors(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(x, labels=x, **named).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == len(list(model.parameters()))
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])
    # The routing losses reach the gates through both.
    gate = next(n for n in found[0] if n.endswith("context.weight"))
    model.config.balance_loss = model.config.z_loss = 0.0
    model.zero_grad()
    model(x, labels=x, **named).loss.backward()
    assert not torch.allclose(model.get_parameter(gate).grad, found[1][gate], atol=1e-6)


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ModelError, match="re-entrant checkpointing loses the gradients"):
        make("olmoe").activation_checkpointing_enable({"use_reentrant": True})


def test_checkpointing_is_not_re_entrant_where_nothing_is_said_of_it() -> None:
    found, made, x = [], make("mixtral").train(), prompts()
    for how in (None, {}, {"preserve_rng_state": False}):
        model = copy.deepcopy(made)
        model.activation_checkpointing_enable(how)
        model(x, labels=x).loss.backward()
        found.append([gate.token.weight.grad.clone() for gate in model.gates])
    assert all(x.abs().max() > 0 for x in found[0])
    for other in found[1:]:
        assert all(torch.allclose(x, y) for x, y in zip(found[0], other, strict=True))


def test_with_labels_the_loss_comes_first() -> None:
    for model in (make("mixtral").train(), make("mixtral").eval()):
        x = prompts()
        output = model(x, labels=x)
        assert output[0] is output.loss and output[0].ndim == 0
        assert model(x, labels=x, return_dict=False)[0].ndim == 0
    assert make("mixtral")(prompts())[0].ndim == 3


def test_trainer_shifts_labels_where_it_makes_the_loss() -> None:
    assert {f"Ragmoe{name}ForCausalLM" for name in ("Mixtral", "Qwen3Moe", "Olmoe", "Glm4Moe")} <= set(
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )


@pytest.mark.parametrize("shape", ["longer", "four"])
def test_an_attention_mask_of_more_than_this_batch(shape: str) -> None:
    """As with a prefix in the cache, or one that says of each pair whether it is seen."""
    model, x = make("mixtral").train(), prompts()
    B, T = x.shape
    if shape == "longer":
        cache = model(x, use_cache=True).past_key_values
        seen = {"attention_mask": torch.ones(B, 2 * T, dtype=torch.long), "past_key_values": cache}
    else:
        seen = {"attention_mask": torch.ones(T, T).tril().bool().expand(B, 1, T, T)}
    assert model(x, labels=x, **seen).loss.isfinite()


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_router_logits_and_routings(name: str) -> None:
    model, x, named = case(name), prompts(), some_neighbours().tensors()
    layers = len(model.sparse_layers)
    out = model(x, output_hidden_states=True, output_router_logits=True, output_routings=True, **named)
    assert len(out.hidden_states) == 3 and all(h.shape == (3, 7, WIDTH) for h in out.hidden_states)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert len(out.router_logits) == len(out.routings) == layers
    for logits_SE, routing, gate in zip(out.router_logits, out.routings, model.gates, strict=True):
        assert torch.equal(logits_SE, routing.logits_SE) and logits_SE.shape == (21, E)
        assert routing.experts_SK.shape == routing.weights_SK.shape == (21, K)
        scores_SE = logits_SE.sigmoid() if name == "glm4_moe" else logits_SE
        assert torch.equal((scores_SE + gate.balance_bias).topk(K).indices, routing.experts_SK)
    plain = model(x, **named)
    assert plain.hidden_states is plain.router_logits is plain.routings is None
    assert isinstance(model(x, return_dict=False), tuple)


@pytest.mark.parametrize("name", CASES)
def test_bf16(name: str, tmp_path: Path) -> None:
    model, x, named = case(name), prompts(), some_neighbours().tensors()
    model.save_pretrained(tmp_path / "fp32")
    half = type(model).from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16).eval()
    want, got = model(x, **named).logits, half(x, **named).logits
    assert got.dtype == torch.bfloat16
    # Some tokens go elsewhere, where two experts scored alike; most must not.
    assert (want - got).abs().median() < 0.02 * want.abs().max()
    # Small steps of the bias would be lost in half precision.
    assert all(gate.balance_bias.dtype == torch.float32 for gate in half.gates)
    half.save_pretrained(tmp_path / "bf16")
    again = type(model).from_pretrained(tmp_path / "bf16").eval()
    assert again.dtype == torch.bfloat16 and same(half, again)
    half.train()(x, labels=x, **named).loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("name", CASES)
def test_a_layer_compiles_in_one_graph(name: str) -> None:
    model, x, neighbours = case(name), torch.randn(3, 7, WIDTH), some_neighbours()
    model.set_experts_implementation("grouped_mm")
    block = model.moe_layers[0]
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, neighbours), block(x, neighbours), atol=1e-5)


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
FUSED = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
LOW_RANK = {"target_modules": [], "target_parameters": ["experts.down_a", "experts.down_b"]}


def adapted(model: Any, where: dict[str, Any]) -> Any:
    return get_peft_model(model, LoraConfig(r=8, lora_dropout=0.0, task_type="CAUSAL_LM", **where))


def shake_adapter(tuned: Any) -> set[str]:
    """What has been trained is no longer zero; the names of what is trained."""
    learns = {n for n, p in tuned.named_parameters() if p.requires_grad}
    for name in learns:
        torch.nn.init.normal_(tuned.get_parameter(name), std=0.2)
    return learns


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("on", ["attention", "experts"])
def test_peft_on_attention_and_on_experts(name: str, on: str, tmp_path: Path) -> None:
    where = ATTENTION if on == "attention" else LOW_RANK if name.endswith("lora") else FUSED
    case(name).save_pretrained(tmp_path / "base")
    model, x, named = load_decoder(tmp_path / "base"), prompts(), some_neighbours().tensors()
    want = model(x, **named).logits
    tuned = adapted(model, where)
    assert torch.allclose(tuned(x, **named).logits, want, atol=1e-5)
    tuned.train()(input_ids=x, labels=x, **named).loss.backward()
    learns = shake_adapter(tuned)
    layers = len(model.sparse_layers) if on == "experts" else model.config.num_hidden_layers
    # Two targets a layer, and two factors each.
    assert len(learns) == 4 * layers and all(tuned.get_parameter(n).grad is not None for n in learns)
    assert all("lora_" in n for n in learns)
    got = tuned.eval()(x, **named).logits
    assert not torch.allclose(got, want, atol=1e-2)
    assert tuned.generate(input_ids=x, max_new_tokens=3, **named).shape[1] > 7
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_decoder(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(again(x, **named).logits, got)
    # As transformers opens it, by the name of its folder alone.
    for opened in (AutoModelForCausalLM, type(model)):
        assert torch.equal(opened.from_pretrained(tmp_path / "adapter").eval()(x, **named).logits, got)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert same(merged, load_decoder(tmp_path / "merged"))
    assert torch.allclose(merged(x, **named).logits, got, atol=1e-4)


def test_an_adapter_for_experts_of_another_kind_is_refused() -> None:
    """LoRA experts have no fused projections: what would change nothing does not pass in silence."""
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        adapted(case("mixtral-lora"), FUSED)
    with pytest.warns(RuntimeWarning, match="gate_up_proj'.* no parameter was matched"):
        adapted(case("mixtral-lora"), {**ATTENTION, "target_parameters": ["experts.gate_up_proj"]})


def test_an_adapter_with_more_than_the_opened_model_is_refused(tmp_path: Path) -> None:
    """Experts that stay in their files take no adapter, and that on attention alone is not what was trained."""
    make("olmoe").save_pretrained(tmp_path / "base")
    adapted(load_decoder(tmp_path / "base"), {**FUSED, **ATTENTION}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BundleError, match=r"adapter does not fit the model as it was opened: .*experts\.lora_"):
        FAMILIES["olmoe"].from_pretrained(tmp_path / "adapter", resident_experts=2)


@pytest.mark.parametrize("where", [ATTENTION, FUSED])
def test_a_model_with_an_adapter_on_it_saves_the_adapter(
    where: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle of the weights beneath it would have them under names that nobody looks for."""
    # transformers asks for a newer PEFT here than anywhere else.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21")
    make("olmoe").save_pretrained(tmp_path / "base")
    tuned, x = adapted(load_decoder(tmp_path / "base"), where), prompts()
    shake_adapter(tuned)
    tuned.eval().save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "bundle.json").exists()
    again = PeftModel.from_pretrained(load_decoder(tmp_path / "base"), tmp_path / "again").eval()
    assert torch.equal(again(x).logits, tuned(x).logits)
    # Beside a bundle in one folder an adapter belongs to it.
    for file in (tmp_path / "adapter").iterdir():
        file.rename(tmp_path / "base" / file.name)
    for opened in (AutoModelForCausalLM, type(model)):
        assert torch.equal(opened.from_pretrained(tmp_path / "base").eval()(x).logits, tuned(x).logits)


@pytest.mark.parametrize("name", CASES)
def test_two_steps_of_trainer(name: str, tmp_path: Path) -> None:
    """Trainer drops what forward does not name: without the neighbours some weights would stay as they are."""
    model, neighbours, x = case(name), some_neighbours(8), prompts(8)
    rows = [
        {"input_ids": x[i], "labels": x[i], **{k: v[0] for k, v in neighbours.rows([i]).tensors().items()}}
        for i in range(8)
    ]
    before = {n: p.clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, learning_rate=0.05,
        report_to=[], use_cpu=True, save_strategy="no", activation_checkpointing=True, lr_scheduler_type="constant",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert not {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    trainer.save_model()
    assert same(model.eval(), type(model).from_pretrained(tmp_path).eval())


def test_trainers_own_way_of_loading_finds_the_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer resumes and loads the best checkpoint file by file, not strictly, and with nobody to convert names."""
    model, other = make("qwen3_moe", expert_ids=[4, 0, 2, 7]), make("qwen3_moe", expert_ids=[4, 0, 2, 7])
    model.save_pretrained(tmp_path)
    # It sweeps the whole memory after each file, which after all other tests takes a second.
    monkeypatch.setattr("gc.collect", lambda: 0)
    load_sharded_checkpoint(other, tmp_path, strict=False)
    assert same(model, other)


@pytest.mark.parametrize("name", CASES)
def test_device_map(name: str, tmp_path: Path) -> None:
    model, x, named = case(name), prompts(), some_neighbours().tensors()
    model.save_pretrained(tmp_path / "bundle")
    places = {"": "cpu"}
    again = type(model).from_pretrained(tmp_path / "bundle", device_map=places).eval()
    assert torch.equal(again(x, **named).logits, model(x, **named).logits)
    offloaded = type(model).from_pretrained(
        tmp_path / "bundle",
        device_map={"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
                    "model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=str(tmp_path / "offload"),
    ).eval()  # fmt: skip
    assert next(offloaded.model.layers[0].parameters()).is_meta
    assert torch.equal(offloaded(x, **named).logits, model(x, **named).logits)


@pytest.mark.parametrize("name", CASES)
def test_one_file_an_expert_with_its_gate_rows(name: str, tmp_path: Path) -> None:
    model = case(name)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == {"base-1-00001-of-00001.safetensors", "gate.1.safetensors"} | {
        f"expert.{i}.1.safetensors" for i in range(E)
    }
    x, want = prompts(), model.state_dict()
    two = type(model).from_pretrained(tmp_path, experts=[3, 1])
    assert two.config.experts == 2 and two.config.expert_ids == [3, 1]
    own = model.expert_tensors()
    assert any(".experts." in n for n in own) and any(n.endswith("context.weight") for n in own)
    assert all(torch.equal(y, want[n][[3, 1]] if n in own else want[n]) for n, y in two.state_dict().items())
    assert two(x).logits.isfinite().all()
    # One expert is changed: one file is written.
    with torch.no_grad():
        block = model.moe_layers[0]
        next(block.experts.parameters())[2] += 1.0
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} - files == {"expert.2.2.safetensors"}


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path)
    with pytest.raises(BundleError, match="is a 'ragmoe_mixtral' model; RagmoeOlmoeForCausalLM opens 'ragmoe_olmoe'"):
        FAMILIES["olmoe"].from_pretrained(tmp_path)
    narrow = torch.zeros(3, 4, R // 2)
    with pytest.raises(ModelError, match="embeddings are 8 wide, but the gate reads 16"):
        make("mixtral")(prompts(), neighbour_embeddings=narrow, neighbour_scores=narrow[..., 0],
                        neighbour_mask=narrow[..., 0].bool())  # fmt: skip


def test_parameters_are_counted() -> None:
    model = make("glm4_moe")
    routed = sum(p.numel() for block in model.moe_layers for p in block.experts.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert model.parameter_counts() == {"total": total, "active": total - routed * (E - K) // E}


@pytest.mark.parametrize("name", CASES)
def test_a_model_made_in_python_is_known_by_its_class_once_it_is_saved(name: str, tmp_path: Path) -> None:
    model = case(name)
    model.config.architectures = None
    model.save_pretrained(tmp_path)
    assert is_generator(tmp_path) and type(load_decoder(tmp_path)) is type(model)
