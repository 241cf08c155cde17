"""Decoders whose experts stay in their files: the same words, in a bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_decoders import NATIVE, E, K, make, prompts, some_neighbours
from transformers import AutoModelForCausalLM

from ragmoe import ModelError, load_decoder


@pytest.mark.parametrize("name", [*NATIVE, "mixtral-lora"])
def test_what_it_says_is_the_same(name: str, tmp_path: Path) -> None:
    family, _, kind = name.partition("-")
    # Of a width whose vectorised activation treats no element apart.
    sizes = {"moe_intermediate_size": 64} if family in ("qwen3_moe", "glm4_moe") else {}
    make(family, **({"expert_kind": kind} if kind else {}), **sizes).save_pretrained(tmp_path)
    whole, x, named = load_decoder(tmp_path), prompts(), some_neighbours().tensors()
    want, said = whole(x, **named).logits, whole.generate(x, max_new_tokens=4, do_sample=False, **named)
    for resident in (1, K, E):
        small = load_decoder(tmp_path, resident_experts=resident)
        for _ in range(2):
            assert torch.equal(small(x, **named).logits, want)
        assert torch.equal(small.generate(x, max_new_tokens=4, do_sample=False, **named), said)
        assert small.expert_store.resident == resident and small.config.to_dict() == whole.config.to_dict()
        assert small.parameter_counts() == whole.parameter_counts()
        held = sum(p.numel() for name, p in small.named_parameters() if ".experts." in name and "shared" not in name)
        all_ = sum(p.numel() for name, p in whole.named_parameters() if ".experts." in name and "shared" not in name)
        assert held * E == all_ * resident
        found = small.expert_store.counters()
        assert found.misses and (resident == E) == (found.evictions == 0)
    with pytest.raises(ModelError, match="cannot be trained"):
        small.train()


def test_neighbours_are_foreseen_once_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("mixtral").save_pretrained(tmp_path)
    small, x, named = load_decoder(tmp_path, resident_experts=2), prompts(), some_neighbours().tensors()
    seen: list[int] = []
    monkeypatch.setattr(small.expert_store, "prefetch", lambda neighbours: seen.append(len(neighbours)))
    small.generate(x, max_new_tokens=5, do_sample=False, **named)
    assert seen == [3]


def test_the_kernel_can_still_be_chosen_and_the_auto_class_opens_it(tmp_path: Path) -> None:
    make("olmoe").save_pretrained(tmp_path)
    x, named = prompts(), some_neighbours().tensors()
    whole, small = (AutoModelForCausalLM.from_pretrained(tmp_path, resident_experts=n).eval() for n in (None, 1))
    for model in (whole, small):
        model.set_experts_implementation("eager")
    assert small.moe_layers[0].experts.slots.fused.config._experts_implementation == "eager"
    assert torch.equal(small(x, **named).logits, whole(x, **named).logits)
