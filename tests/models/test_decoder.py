"""Switch-, GShard- and Mixtral-style models from the same parts: each learns, none looks ahead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ragmoe import ConfigError, Neighbours
from ragmoe.models.decoder import DecoderConfig, MoEDecoder, gshard_style, mixtral_style, switch_style

V, T = 20, 16
SIZES = {"vocab_size": V, "width": 32, "layers": 2, "experts": 4}
STYLES = [switch_style, gshard_style, mixtral_style]
MORE = {
    "shared": {"dense_beside": True},
    "lora": {"expert_kind": "lora", "expert_rank": 8},
    "attention": {"moe_attention": True, "expert_rank": 8},
    "sigmoid": {"scores": "sigmoid", "normalise_weights": True},
}


def sentences(n: int) -> Tensor:
    """Each counts in steps of its own, which the first two tokens tell: whoever attends to them knows the rest."""
    start, step = torch.randint(0, V, (n, 1)), torch.randint(1, 4, (n, 1))
    return (start + step * torch.arange(T)) % V


def learned(config: DecoderConfig, steps: int = 70) -> tuple[float, float, MoEDecoder]:
    """Language loss before and after training."""
    torch.manual_seed(0)
    model = MoEDecoder(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        batch = sentences(16)
        output = model(batch, labels=batch)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        losses.append(output.language_loss.item())
    return losses[0], losses[-1], model


@pytest.mark.parametrize("style", STYLES)
def test_each_style_learns(style: Callable[..., DecoderConfig]) -> None:
    before, after, model = learned(style(**SIZES))
    assert before > 2.8 and after < 1.2
    routings = model(sentences(16)).routings
    assert all((r.choices_SE().sum(dim=0) > 0).sum() > 1 for r in routings)


@pytest.mark.parametrize("name", MORE)
def test_parts_are_combined(name: str) -> None:
    before, after, _ = learned(gshard_style(**SIZES, capacity_factor=None, **MORE[name]))
    assert after < before - 1.2


def test_the_styles_are_what_they_are_called() -> None:
    switch, gshard, mixtral = (MoEDecoder(style(**SIZES)) for style in STYLES)
    assert [sum(block.moe is not None for block in model.blocks) for model in (switch, gshard, mixtral)] == [1, 1, 2]
    routed = [model(sentences(4)).routings[0] for model in (switch, gshard, mixtral)]
    assert [r.experts_SK.shape[1] for r in routed] == [1, 2, 2]
    assert [r.served_SK is not None for r in routed] == [True, True, False]
    assert switch.blocks[1].dense is None and switch.blocks[0].dense is not None
    assert type(mixtral.norm) is torch.nn.RMSNorm and mixtral.position is None


@pytest.mark.parametrize("style", STYLES)
def test_no_token_sees_a_later_one(style: Callable[..., DecoderConfig]) -> None:
    """Without a limit: capacity is shared by all tokens of a batch, later ones included."""
    model = MoEDecoder(style(**SIZES, capacity_factor=None)).eval()
    one = sentences(2)
    two = one.clone()
    two[:, 9:] = (two[:, 9:] + 5) % V
    assert torch.allclose(model(one).logits[:, :9], model(two).logits[:, :9], atol=1e-5)
    assert not torch.allclose(model(one).logits[:, 9:], model(two).logits[:, 9:], atol=1e-3)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(style: Callable[..., DecoderConfig], side: str) -> None:
    model = MoEDecoder(style(**SIZES)).eval()
    ids, pad = sentences(2), (3, 0) if side == "left" else (0, 3)
    padded, mask = (torch.nn.functional.pad(x, pad) for x in (ids, torch.ones_like(ids)))
    want, got = model(ids, labels=ids), model(padded, attention_mask=mask, labels=padded)
    assert torch.allclose(got.logits[mask.bool()], want.logits.flatten(0, 1), atol=1e-5)
    assert list(got.routing_losses) == (["gshard"] if style is gshard_style else ["load_balance"])
    for name, value in got.routing_losses.items():
        assert torch.allclose(value, want.routing_losses[name])
    assert torch.allclose(got.language_loss, want.language_loss, atol=1e-5)


def test_neighbours_steer_a_decoder() -> None:
    model = MoEDecoder(gshard_style(**SIZES, gate="retrieval", neighbour_width=8, gate_width=8)).eval()
    for block in model.blocks:
        if block.moe is not None:
            torch.nn.init.normal_(block.moe.gate.context.weight, std=3.0)
    ids = sentences(2)
    found = Neighbours(torch.randn(2, 3, 8), torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert not torch.equal(model(ids, neighbours=found).routings[0].logits_SE, model(ids).routings[0].logits_SE)


def test_what_a_causal_decoder_refuses() -> None:
    with pytest.raises(
        ConfigError, match="the selection 'expert_choice' lets a token's experts depend on tokens after"
    ):
        MoEDecoder(gshard_style(**SIZES, selection="expert_choice"))
    with pytest.raises(ConfigError, match="the gate 'task' lets a token's experts depend on tokens after"):
        MoEDecoder(gshard_style(**SIZES, gate="task"))
    for priority in ("probability", "random"):
        with pytest.raises(ConfigError, match=f"the overflow priority '{priority}' lets a token's experts depend on"):
            MoEDecoder(switch_style(**SIZES, overflow_priority=priority))
    with pytest.raises(ConfigError, match="the loss 'context' needs more than the routing"):
        MoEDecoder(gshard_style(**SIZES, losses={"context": 1.0}))
    with pytest.raises(ConfigError, match="there is no norm 'batch'; there are: layer, rms"):
        MoEDecoder(gshard_style(**SIZES, norm="batch"))
    with pytest.raises(ConfigError, match="17 positions, but the model knows 16"):
        MoEDecoder(gshard_style(**SIZES, positions=16))(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"sparse_layers has \[2\], but the layers are 0 to 1"):
        MoEDecoder(gshard_style(**SIZES, sparse_layers=(2,)))
