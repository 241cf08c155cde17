"""A family's own checkpoint with another gate: at step 0 it is that model, and afterwards the neighbours count."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import NATIVE, R, make, native, prompts, some_neighbours
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from ragmoe import BundleError, ConfigError, ModelError
from ragmoe.bundle import merge_experts, prune_experts, read_bundle
from ragmoe.gates import Gate
from ragmoe.models.families import FAMILIES
from ragmoe.models.growth import grow

SMALL = {"neighbour_width": R, "gate_width": 8}
UNNORMALISED = {"qwen3_moe", "olmoe", "glm4_moe"}


def opened(family: str, folder: Path, **settings: Any) -> Any:
    return FAMILIES[family].from_pretrained(folder, **{**SMALL, **settings}).eval()


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("gate", ["retrieval", "token", "pooled", "memory"])
def test_at_step_0_it_is_the_familys_own_model(family: str, gate: str, tmp_path: Path) -> None:
    theirs = native(family)
    theirs.save_pretrained(tmp_path)
    ours, x, neighbours = opened(family, tmp_path, gate=gate), prompts(), some_neighbours()
    assert {type(gate).__name__ for gate in ours.gates} == {type(make(family, gate=gate).gates[0]).__name__}
    named = {**neighbours.tensors(), "neighbour_votes": torch.rand(3, 4, len(ours.sparse_layers), 4)}
    want = theirs(x, use_cache=True)
    assert torch.allclose(ours(x, **named).logits, want.logits, atol=1e-5)
    # Cached: the prompt but its last token, then that token alone.
    first = ours(x[:, :-1], use_cache=True, **named)
    last = ours(x[:, -1:], past_key_values=first.past_key_values, use_cache=True, **named)
    assert torch.allclose(torch.cat([first.logits, last.logits], dim=1), want.logits, atol=1e-5)


@pytest.mark.parametrize("family", sorted(UNNORMALISED))
def test_weights_that_do_not_sum_to_one(family: str, tmp_path: Path) -> None:
    """The other setting than the family's default of this suite: each keeps what its own field says."""
    theirs = native(family, norm_topk_prob=not NATIVE[family]().norm_topk_prob)
    theirs.save_pretrained(tmp_path)
    ours, x = opened(family, tmp_path), prompts()
    assert torch.allclose(ours(x).logits, theirs(x).logits, atol=1e-5)


@pytest.mark.parametrize(("groups", "chosen"), [(4, 2), (2, 1), (4, 4)])
def test_experts_are_chosen_from_the_best_groups(groups: int, chosen: int, tmp_path: Path) -> None:
    theirs = native("glm4_moe", n_routed_experts=8, num_experts_per_tok=3, n_group=groups, topk_group=chosen)
    theirs.save_pretrained(tmp_path)
    ours, x = opened("glm4_moe", tmp_path), prompts()
    got = ours(x, **some_neighbours().tensors(), output_routings=True)
    assert torch.allclose(got.logits, theirs(x).logits, atol=1e-5)
    found = [row.div(8 // groups, rounding_mode="floor").unique() for r in got.routings for row in r.experts_SK]
    assert max(len(row) for row in found) == min(chosen, 3)
    plain = torch.cat([(gate.scores.ranked(r.logits_SE) + gate.balance_bias).topk(3).indices.sort().values
                       for gate, r in zip(ours.gates, got.routings, strict=True)])  # fmt: skip
    same = torch.equal(plain, torch.cat([r.experts_SK.sort().values for r in got.routings]))
    # Without the groups other experts would have been chosen, unless all groups are.
    assert same == (chosen == groups)


def test_a_group_that_is_held_back_is_not_chosen(tmp_path: Path) -> None:
    settings = {"n_routed_experts": 8, "n_group": 4, "topk_group": 1}
    native("glm4_moe", **settings).save_pretrained(tmp_path)
    ours, x = opened("glm4_moe", tmp_path), prompts()
    ours.set_available_experts([2, 4, 5])
    for routing in ours(x, output_routings=True).routings:
        assert set(routing.experts_SK.flatten().tolist()) == {4, 5}
    ours.save_pretrained(tmp_path / "bundle")
    with pytest.raises(ModelError, match=r"stand in 4 groups of one size \(n_group\): none can join alone"):
        grow(ours, {}, id=8, name="port")
    with pytest.raises(BundleError, match=r"stand in 4 groups of one size \(n_group\): none can go alone"):
        prune_experts(tmp_path / "bundle", [0])


def test_dense_layers_stay_dense(tmp_path: Path) -> None:
    theirs = native("qwen3_moe", mlp_only_layers=[0])
    theirs.save_pretrained(tmp_path)
    ours, x = opened("qwen3_moe", tmp_path), prompts()
    assert ours.sparse_layers == [1] and len(ours.gates) == 1
    assert torch.allclose(ours(x).logits, theirs(x).logits, atol=1e-5)


@pytest.mark.parametrize("family", NATIVE)
def test_nothing_of_a_native_checkpoint_is_lost(family: str, tmp_path: Path) -> None:
    """Native files hold one tensor an expert, under the family's older names: all of them must be found."""
    native(family).save_pretrained(tmp_path)
    model, info = FAMILIES[family].from_pretrained(tmp_path, **SMALL, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    new = {name.partition(".inner.")[2].partition(".")[0] for name in info["missing_keys"]}
    assert new == ({"attention", "context"} | ({"balance_bias"} if family != "glm4_moe" else set()))
    assert model.config.model_type == f"ragmoe_{family}"


@pytest.mark.parametrize("family", NATIVE)
def test_the_experts_run_by_the_kernel_that_was_asked_for(family: str) -> None:
    """Where transformers does not believe that a model can choose, it runs the eager loop without a word."""
    model = make(family)
    assert model.config._experts_implementation == "auto"
    x, found = prompts(), {}
    for kernel in ("auto", "eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(kernel)
        assert model.config._experts_implementation == kernel
        found[kernel] = model(x).logits
    assert all(torch.allclose(found["eager"], y, atol=1e-5) for y in found.values())


@pytest.mark.parametrize("family", NATIVE)
def test_gradients_are_the_familys_own(family: str, tmp_path: Path) -> None:
    theirs = native(family)
    theirs.save_pretrained(tmp_path)
    ours, x = opened(family, tmp_path), prompts()
    for model in (theirs, ours):
        model(x, labels=x).loss.backward()
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name.replace("mlp.gate.weight", "mlp.gate.inner.token.weight"))
        assert torch.allclose(mine.grad, parameter.grad, atol=1e-5), name


@pytest.mark.parametrize("family", NATIVE)
def test_a_trained_gate_heeds_each_questions_own_neighbours(family: str) -> None:
    model, x, neighbours = make(family), prompts(), some_neighbours()
    alone, both = model(x).logits, model(x, **neighbours.tensors()).logits
    assert not torch.allclose(alone, both, atol=1e-3)
    for row in range(3):
        single = model(x[row : row + 1], **neighbours.rows([row]).tensors()).logits
        assert torch.allclose(single[0], both[row], atol=1e-5)
    # One question may have several sequences, which stand next to each other.
    several = model(x.repeat_interleave(2, dim=0), **neighbours.tensors()).logits
    assert torch.allclose(several, both.repeat_interleave(2, dim=0), atol=1e-5)


def test_the_gate_is_the_familys_and_ours() -> None:
    model = make("mixtral")
    assert isinstance(model.model.layers[0].mlp.gate, MixtralTopKRouter)
    assert all(isinstance(gate, Gate) and gate.settings.layer == i for i, gate in enumerate(model.gates))


def test_auto_classes_know_the_configuration(tmp_path: Path) -> None:
    for family, ours in FAMILIES.items():
        config = make(family).config
        config.save_pretrained(tmp_path / family)
        again = AutoConfig.from_pretrained(tmp_path / family)
        assert type(again) is ours.config_class and again.experts == 4 and again.num_experts_per_tok == 2
        assert type(AutoModelForCausalLM.from_config(again)) is ours


def test_jitter_is_mixtrals_own() -> None:
    """It disturbs what gate and experts see, and only while training."""
    model, x = make("mixtral", router_jitter_noise=0.3, balance_loss=0.0, z_loss=0.0), prompts()
    assert torch.equal(model(x).logits, model(x).logits)
    model.train()
    assert not torch.allclose(model(x).logits, model(x).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "settings", "error", "said"),
    [
        ("mixtral", {"gate": "task"}, ModelError, "the gate 'task' lets a token's experts depend on tokens after it"),
        ("mixtral", {"selection": "expert_choice"}, ModelError, "the selection 'expert_choice' lets a token's experts"),
        ("mixtral", {"gate": "modality"}, ModelError, "types of tokens, of which a decoder knows none"),
        ("mixtral", {"gate": "router"}, ConfigError, "there is no gate 'router'; there are: centroid, "),
        ("mixtral", {"expert_kind": "glu"}, ConfigError, "expert kind of decoders 'glu'; there are: ffn, lora"),
        ("glm4_moe", {"expert_kind": "lora"}, ModelError, "expert_kind is 'lora', but ragmoe_glm4_moe takes ffn"),
        ("glm4_moe", {"n_group": 3}, ModelError, "4 experts in n_group = 3 groups"),
        ("glm4_moe", {"n_group": 2, "topk_group": 3}, ModelError, "topk_group = 3 are chosen"),
        ("glm4_moe", {"n_group": 2, "num_experts_per_tok": 3}, ModelError, "takes 3 experts, but 1 groups of 2"),
        ("olmoe", {"sparse_layers": [1, 2]}, ModelError, r"sparse_layers has \[2\], but the layers are 0 to 1"),
        ("olmoe", {"vote_start": 1.0}, ModelError, "vote_start is 1.0, but the gate 'retrieval' counts no votes"),
        ("olmoe", {"expert_names": ["a", "a", "b", "c"]}, ModelError, "expected 4 different names"),
        ("olmoe", {"losses": {"diversity": 1.0}}, ModelError, "needs more than the routing"),
        ("olmoe", {"losses": {"votes": 1.0}}, ModelError, "the gate 'retrieval' counts no votes"),
        ("olmoe", {"losses": {"z": 1.0}}, ModelError, "losses has 'z', whose weight is z_loss"),
        ("olmoe", {"balance_loss": -1.0}, ModelError, "the weight of the loss 'load_balance' is -1.0"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(family: str, settings: Any, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        make(family, **settings)


def test_experts_that_are_held_back() -> None:
    """No token goes to them, whatever they hold; where none is left, what serves every token still does."""
    for family, kind in (("mixtral", "ffn"), ("mixtral", "lora"), ("glm4_moe", "ffn")):
        model, x = make(family, expert_kind=kind), prompts()
        want = model(x).logits
        model.set_available_experts([0, 2, 3])
        without = model(x, output_routings=True)
        assert not any((routing.experts_SK == 1).any() for routing in without.routings)
        for block in model.moe_layers:
            for parameter in block.experts.parameters():
                parameter.data[1] = torch.nan
        assert torch.equal(model(x).logits, without.logits)
        model.set_available_experts([])
        assert model(x).logits.isfinite().all() and not torch.allclose(model(x).logits, want, atol=1e-3)


def test_glm_routes_in_float32_whatever_the_model_is_in(tmp_path: Path) -> None:
    """As its own does: else tokens would go to other experts than in the checkpoint."""
    native("glm4_moe", n_routed_experts=32, num_experts_per_tok=4).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ours = opened("glm4_moe", tmp_path, dtype=torch.bfloat16)
    block, gate = theirs.model.layers[-1].mlp, ours.model.layers[-1].mlp.gate
    assert gate.inner.token.weight.dtype == block.gate.weight.dtype == torch.float32
    x_SD = torch.randn(512, 32, dtype=torch.bfloat16)
    logits_SE, weights_SK, _ = gate(x_SD)
    want = block.gate(x_SD)
    assert torch.allclose(logits_SE, want[0] if isinstance(want, tuple) else want, atol=1e-5)
    assert weights_SK.dtype == torch.float32


@pytest.mark.parametrize("family", NATIVE)
def test_at_step_0_it_is_that_model_in_half_precision_too(family: str, tmp_path: Path) -> None:
    """To the bit: families differ in whether their experts take weights in float32."""
    native(family).save_pretrained(tmp_path)
    how = {"dtype": torch.bfloat16, "experts_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, **how).eval()
    ours = opened(family, tmp_path, gate="token", **how)
    x = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(x).logits, theirs(x).logits)


def test_merged_experts_of_a_decoder_are_the_best_of_their_rank(tmp_path: Path) -> None:
    """Against the singular value decomposition of the whole mean product, as a reader's are."""
    make("mixtral", expert_kind="lora", expert_rank=8).save_pretrained(tmp_path)
    before, _ = read_bundle(tmp_path)
    merged = merge_experts(tmp_path, 0, 1, "both")
    after, _ = read_bundle(tmp_path)
    factors = [name for name in merged.map.fused if name.endswith("_a")]
    assert factors and merged.kept < 1.0
    for name in factors:
        other = name[:-1] + "b"
        mean = sum(before[name][at] @ before[other][at] for at in range(2)) / 2
        u, s, v = torch.linalg.svd(mean)
        best = u[:, :8] * s[:8] @ v[:8, :]
        torch.testing.assert_close(after[name][0] @ after[other][0], best, atol=1e-4, rtol=1e-3)
    biases = [name for name in merged.map.fused if name.endswith("balance_bias")]
    assert biases
    for name in biases:
        assert after[name][0] == pytest.approx(before[name][:2].mean().item() + math.log(2), abs=1e-5)


def test_sigmoid_scores_of_merged_experts_stay_comparable(tmp_path: Path) -> None:
    """They lie between 0 and 1, where the bound for logits would win each choice."""
    make("glm4_moe").save_pretrained(tmp_path)
    before, _ = read_bundle(tmp_path)
    merged = merge_experts(tmp_path, 0, 1, "both")
    after, _ = read_bundle(tmp_path)
    (name, *_) = [name for name in merged.map.fused if name.endswith("balance_bias")]
    assert after[name][0] == pytest.approx(before[name][:2].mean().item(), abs=1e-6)
