"""A plan counts what is there: against models with weights, counts by hand, and torch's own counter of FLOPs."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from small_families import BY_HAND, FIELDS, D, L, V, real
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ragmoe import ModelError
from ragmoe.models.plan import Plan, activation_bytes, plan, read_layout


@pytest.mark.parametrize("name", FIELDS)
def test_parameters_are_those_of_the_real_model(name: str) -> None:
    found = plan(FIELDS[name])
    assert found.parameters["total"] == sum(p.numel() for p in real(name).parameters())
    assert found.parameters["total"] == found.parameters["trained"] == sum(found.parameters_by_kind.values())


@pytest.mark.parametrize("name", BY_HAND)
def test_total_and_active_parameters_by_hand(name: str) -> None:
    count, E, K = BY_HAND[name]
    found = plan(FIELDS[name])
    assert (found.experts, found.top_k) == (E, K)
    assert found.parameters == {"total": count(E), "active": count(K), "trained": count(E)}
    assert found.parameters_by_kind["experts"] == count(E) - count(0)


def test_a_reader_counts_itself_the_same() -> None:
    model = real("ragmoe_bert")
    counts = plan(FIELDS["ragmoe_bert"]).parameters
    assert model.parameter_counts() == {"total": counts["total"], "active": counts["active"]}


def test_the_kinds_of_a_model_with_a_shared_expert() -> None:
    kinds = plan(FIELDS["deepseek_v3"]).parameters_by_kind
    assert kinds["gate"] == 2 * 8 * D and kinds["shared expert"] == 2 * 3 * D * 96
    assert kinds["dense FFN"] == 3 * D * 160 and kinds["embedding"] == kinds["head"] == V * D
    assert kinds["norm"] == (2 * L + 1) * D + L * (24 + 16) and "other" not in kinds


def test_gates_keep_what_is_theirs() -> None:
    kinds = plan(FIELDS["ragmoe_bert"], ["neighbour_summary=true"]).parameters_by_kind
    assert kinds["gate"] == 2 * (4 * D + 4 * 16 + 2 * (16 * (D + 32 + 32) + 16 + 1) + D * 16)
    assert kinds["attention"] == L * 4 * (D * D + D) and "other" not in kinds


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("ragmoe_mixtral", {"num_local_experts": 4, "expert_kind": "lora", "expert_rank": 8, "intermediate_size": 160}),
        ("ragmoe_mixtral", {"num_local_experts": 4, "intermediate_size": 160, "neighbour_summary": True}),
        ("ragmoe_qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 48, "sparse_layers": [1]}),
        ("ragmoe_olmoe", {"num_experts": 4, "gate": "token"}),
        ("ragmoe_glm4_moe", {"n_routed_experts": 4, "moe_intermediate_size": 48, "first_k_dense_replace": 1}),
    ],
)
def test_decoders_with_gates_count_themselves_the_same(family: str, settings: dict[str, Any]) -> None:
    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 4, "pad_token_id": 0}
    found = plan({"model_type": family, **sizes, "num_experts_per_tok": 2, "neighbour_width": 32, **settings})
    config = AutoConfig.for_model(family, **sizes, num_experts_per_tok=2, neighbour_width=32, **settings)
    model = AutoModelForCausalLM.from_config(config)
    assert {name: found.parameters[name] for name in ("total", "active")} == model.parameter_counts()
    gates = sum(x.numel() for name, x in model.named_parameters() if ".gate.inner." in name or ".summary." in name)
    assert found.parameters_by_kind["gate"] == gates and not found.notes


def test_tied_weights_are_one_parameter_and_two_uses() -> None:
    apart, tied = plan(FIELDS["llama"]), plan(FIELDS["llama"], ["tie_word_embeddings=true"])
    assert apart.parameters["total"] - tied.parameters["total"] == V * D
    assert apart.flops.forward == tied.flops.forward


def counted(model: Any, **inputs: torch.Tensor) -> int:
    """FLOPs of a real forward, with attention in plain matrix products, which the counter knows on a CPU."""
    grouped = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in FIELDS if not name.startswith("ragmoe")])
def test_flops_are_those_of_a_real_forward(name: str) -> None:
    B, T = 2, 24
    model = real(name).eval()
    if plan(FIELDS[name]).experts:
        model.set_experts_implementation("eager")
    flops = plan(FIELDS[name], length=T).flops
    assert counted(model, input_ids=torch.randint(5, 90, (B, T))) == B * T * flops.forward
    assert flops.backward == 2 * flops.forward == 2 * sum(flops.by_kind.values())


def test_a_window_is_all_that_attention_costs() -> None:
    heads, width = 4, 16
    wide, narrow = (plan(FIELDS["mixtral"], [f"sliding_window={w}"], length=24).flops for w in ("null", 10))
    assert wide.by_kind["attention scores"] == L * 2 * 24 * heads * 2 * width
    assert narrow.by_kind["attention scores"] == L * 2 * 10 * heads * 2 * width


@pytest.mark.parametrize("kind", ["lora", "ffn"])
@pytest.mark.parametrize("gate", ["token", "pooled", "retrieval", "retrieval+memory"])
def test_flops_of_a_reader_by_token_sequence_and_question(gate: str, kind: str) -> None:
    B, M, T, N = 2, 3, 12, 3
    fields = {**FIELDS["ragmoe_bert"], "gate": gate, "expert_kind": kind, "neighbour_summary": gate == "token"}
    found = plan(fields, length=T)
    config = real("ragmoe_bert").config
    for key in ("gate", "expert_kind", "neighbour_summary"):
        setattr(config, key, fields[key])
    config._experts_implementation = "eager"
    model = type(real("ragmoe_bert"))(config).eval()
    inputs = {
        "neighbour_embeddings": torch.randn(B, N, 32),
        "neighbour_scores": torch.rand(B, N),
        "neighbour_mask": torch.ones(B, N, dtype=torch.bool),
        "neighbour_votes": torch.rand(B, N, 2, 4),
    }
    total = counted(model, input_ids=torch.randint(5, 90, (B * M, T)), **inputs)
    flops = found.flops
    assert total == B * (M * (T * flops.forward + flops.per_sequence) + flops.per_question)
    assert flops.per_sequence == 2 * 4 * D and flops.per_question > 0


def test_keys_and_values_are_made_once_a_question() -> None:
    flops = plan(FIELDS["ragmoe_bert"]).flops
    assert flops.per_question == 2 * (2 * 3 * 2 * 32 * 16)
    # Query, attention over three neighbours and the null neighbour, W_t and W_c; in two layers. A CPU's products are of
    # eight experts, of which there are four here.
    assert flops.by_kind["gate"] == 2 * 2 * (D * 16 + 2 * 4 * 16 + 8 * D + 8 * 16)


def saved(model: Any, **inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward, parameters and inputs apart; shared memory once."""
    known = [*model.parameters(), *model.buffers(), *inputs.values()]
    sizes = {x.untyped_storage().data_ptr(): 0 for x in known}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        # Held, so that its address is not given to another.
        alive.append(x)
        storage = x.untyped_storage()
        sizes.setdefault(storage.data_ptr(), storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(**inputs)
    assert output.loss.requires_grad
    return sum(sizes.values())


def labelled(name: str, B: int = 2, T: int = 48) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(5, 90, (B, T))
    if not name.startswith("ragmoe"):
        return {"input_ids": input_ids, "labels": input_ids.clone()}
    places = torch.zeros(B, 1, dtype=torch.long)
    return {
        "input_ids": input_ids,
        "token_type_ids": torch.ones_like(input_ids),
        "start_positions": places,
        "end_positions": places.clone(),
        "neighbour_embeddings": torch.randn(B, 3, 32),
        "neighbour_scores": torch.rand(B, 3),
        "neighbour_mask": torch.ones(B, 3, dtype=torch.bool),
    }


# Readers are trained with weights in fp32.
IN_BF16 = [(name, torch.bfloat16) for name in FIELDS if not name.startswith("ragmoe")]


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in FIELDS), *IN_BF16])
def test_activations_are_what_autograd_saves(name: str, dtype: torch.dtype) -> None:
    model = real(name).to(dtype).train()
    measured = saved(model, **labelled(name))
    assert activation_bytes(read_layout(model), 2 * 48, dtype.itemsize) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_checkpointing_keeps_the_inputs_and_one_layer(name: str) -> None:
    inputs = labelled(name)
    model = real(name).train()
    layers = model.model.layers
    whole = saved(model, **inputs)
    model.model.layers = layers[:-1]
    one = whole - saved(model, **inputs)
    model.model.layers = layers
    model.activation_checkpointing_enable({"use_reentrant": False})
    kept = saved(model, **inputs)
    assert kept < whole / 2
    found = plan(FIELDS[name], batch=2, length=48).memory
    assert found.checkpointed == pytest.approx(kept + one, rel=0.2)
    assert found.activations == pytest.approx(whole, rel=0.2)


# As their makers publish them, in thousand millions: total and active.
PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    "Mixtral 8x7B": (
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
        },
        46.7,
        12.9,
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
        30.5,
        3.3,
    ),
    "OLMoE-1B-7B": (
        {
            "model_type": "olmoe",
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "vocab_size": 50304,
        },
        6.9,
        1.3,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    fields, total, active = PUBLISHED[name]
    found = plan(fields)
    assert found.parameters["total"] / 1e9 == pytest.approx(total, abs=0.05)
    assert found.parameters["active"] / 1e9 == pytest.approx(active, abs=0.06)


def test_a_trillion_parameters_need_no_memory() -> None:
    fields = {
        "model_type": "deepseek_v3",
        "n_routed_experts": 384,
        "num_attention_heads": 64,
        "first_k_dense_replace": 1,
        "vocab_size": 163840,
    }
    plan(FIELDS["deepseek_v3"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: Plan = plan(fields, dtype="bf16", expert_parallel=64)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert found.parameters_by_kind["experts"] == 60 * 384 * 3 * 7168 * 2048
    assert found.parameters["total"] == 1_026_408_209_408 and found.parameters["active"] < 33e9
    # In units of 1024 bytes; the weights alone would be 1.9 TiB.
    assert grown < 100 * 1024


def test_more_experts_a_token_than_there_are() -> None:
    with pytest.raises(ModelError, match="a token takes 9 experts, but a layer has 8: expected 1 to 8"):
        plan(FIELDS["qwen3_moe"], ["num_experts_per_tok=9"])
    with pytest.raises(ModelError, match="set num_experts_per_tok"):
        plan(
            {**FIELDS["deepseek_v3"], "model_type": "deepseek_v2", "num_experts_per_tok": None, "topk_method": "greedy"}
        )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "albert"}, "expected one list of its 12 layers"),
        ({"model_type": "jetmoe"}, "cannot tell the experts of 'jetmoe' by name: mlp.input_linear.weight"),
        ({"model_type": "bart"}, "has an encoder and a decoder"),
    ],
)
def test_a_model_that_would_be_counted_wrongly_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        plan(fields)


def test_what_is_not_counted_is_said() -> None:
    assert plan(FIELDS["mixtral"]).notes == ()
    (note,) = plan(
        {"model_type": "qwen3_next", "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2}
    ).notes
    assert note.startswith("Not in the FLOPs and activations: what linear_attention do")
