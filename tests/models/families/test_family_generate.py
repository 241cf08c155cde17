"""``generate``: neighbours are given once, go with the beams, and the gates read them once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import NATIVE, PAD, make, native, prompts, some_neighbours
from transformers import StaticCache

from ragmoe.gates import NeighbourAttention
from ragmoe.models.families import FAMILIES

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "uncached": {"do_sample": False, "use_cache": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "several": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "static": {"do_sample": False, "cache_implementation": "static"},
}


def written(model: Any, x: torch.Tensor, named: dict[str, torch.Tensor], **mode: Any) -> torch.Tensor:
    """What follows the prompt: five tokens, however soon it would like to end."""
    torch.manual_seed(3)
    mask = named.pop("attention_mask", torch.ones_like(x))
    made = model.generate(x, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, **named, **mode)
    return made[:, x.shape[1] :]


def by_hand(model: Any, x: torch.Tensor, named: dict[str, torch.Tensor]) -> torch.Tensor:
    """The likeliest token each time, the whole text read anew; the end is not allowed."""
    made = x
    for _ in range(5):
        logits = model(made, **named).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        made = torch.cat([made, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return made[:, x.shape[1] :]


@pytest.mark.parametrize("family", NATIVE)
def test_greedy_is_what_it_says_by_hand_and_in_all_caches(family: str) -> None:
    model, x, named = make(family), prompts(), some_neighbours().tensors()
    want = by_hand(model, x, named)
    for mode in ("greedy", "uncached", "static"):
        assert torch.equal(written(model, x, dict(named), **MODES[mode]), want), mode
    assert not torch.equal(by_hand(model, x, {}), want)


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_writes_what_each_prompt_writes_alone(family: str, mode: str) -> None:
    """Neighbours of one question must not reach another's beams; for sampling, the draws of one row are its own."""
    model, x, neighbours = make(family), prompts(), some_neighbours()
    together = written(model, x, neighbours.tensors(), **MODES[mode])
    if mode == "sampling":
        again = written(model, x, neighbours.tensors(), **MODES[mode])
        assert torch.equal(together, again) and not torch.equal(together, written(model, x, {}, **MODES[mode]))
        return
    rows = [written(model, x[i : i + 1], neighbours.rows([i]).tensors(), **MODES[mode]) for i in range(3)]
    assert torch.equal(together, torch.cat(rows))


@pytest.mark.parametrize("family", NATIVE)
def test_left_padding_changes_nothing(family: str) -> None:
    model, neighbours = make(family), some_neighbours(2)
    short, long = prompts(1, 4), prompts(1, 7)
    padded = torch.cat([torch.full((1, 3), PAD), short], dim=1)
    x, mask = torch.cat([padded, long]), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    for mode in ("greedy", "beams", "static"):
        both = written(model, x, {**neighbours.tensors(), "attention_mask": mask}, **MODES[mode])
        alone = written(model, short, neighbours.rows([0]).tensors(), **MODES[mode])
        assert torch.equal(both[:1], alone), mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gate", ["retrieval", "retrieval+memory"])
def test_keys_and_values_are_made_once_a_call(mode: str, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("qwen3_moe", gate=gate), prompts()
    named = {**some_neighbours().tensors(), "neighbour_votes": torch.rand(3, 4, 2, 4)}
    rows: list[int] = []
    made = NeighbourAttention.key_values

    def counted(self: NeighbourAttention, neighbours: Any, dtype: torch.dtype) -> Any:
        rows.append(len(neighbours))
        return made(self, neighbours, dtype)

    monkeypatch.setattr(NeighbourAttention, "key_values", counted)
    written(model, x, named, **MODES[mode])
    # Once for each layer's gate, of the three questions and not of their beams.
    assert rows == [3, 3]


def test_prepared_neighbours_say_what_they_said_before() -> None:
    for gate in ("retrieval", "retrieval+memory", "pooled"):
        model, x, neighbours = make("mixtral", gate=gate), prompts(), some_neighbours()
        named = {**neighbours.tensors(), "neighbour_votes": torch.rand(3, 4, 2, 4)}
        prepared = model.prepare_neighbours(neighbours)
        assert bool(prepared) == (gate != "pooled")
        assert torch.equal(model(x, **named, **prepared).logits, model(x, **named).logits)
        if prepared:
            wrong = {**prepared, "neighbour_keys": prepared["neighbour_keys"].flip(2)}
            assert not torch.equal(model(x, **named, **wrong).logits, model(x, **named).logits)


@pytest.mark.parametrize("family", NATIVE)
def test_router_logits_are_off_while_it_writes(family: str, tmp_path: Path) -> None:
    """Asked for in the configuration they would break cached decoding, whose mask is longer than its tokens."""
    theirs = native(family)
    theirs.save_pretrained(tmp_path)
    model = FAMILIES[family].from_pretrained(tmp_path, output_router_logits=True, neighbour_width=16).eval()
    x = prompts()
    assert model(x).router_logits is not None
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    assert model.prepare_inputs_for_generation(x, attention_mask=mask)["output_router_logits"] is False
    kwargs = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = model.generate(x, return_dict_in_generate=True, output_logits=True, **kwargs)
    assert torch.equal(out.sequences, theirs.generate(x, **kwargs))


def test_neighbours_of_another_batch_are_refused() -> None:
    """Whether or not its tokens could be shared out among them."""
    model = make("olmoe")
    for questions in (1, 3):
        model(prompts(rows=3), **some_neighbours(questions).tensors())
    for rows, questions in ((2, 3), (2, 4), (3, 2)):
        with pytest.raises(ValueError, match=f"{rows} sequences came with the neighbours of {questions} questions"):
            model(prompts(rows=rows, length=12), **some_neighbours(questions).tensors())


def test_what_generate_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="neighbour_embedings"):
        make("olmoe").generate(prompts(), neighbour_embedings=torch.zeros(3, 1, 16), max_new_tokens=2)
    with pytest.raises(ValueError, match="neighbour_embeddings came without"):
        make("olmoe").generate(prompts(), neighbour_embeddings=torch.zeros(3, 1, 16), max_new_tokens=2)


def test_a_cache_of_ones_own_goes_on_where_it_stopped() -> None:
    model, x, named = make("mixtral"), prompts(), some_neighbours().tensors()
    want = written(model, x, dict(named), do_sample=False)
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert torch.equal(written(model, x, dict(named), do_sample=False, past_key_values=cache), want)


@pytest.mark.parametrize("family", NATIVE)
def test_it_goes_on_from_embeddings_as_from_their_tokens(family: str) -> None:
    model, x, named = make(family), prompts(), some_neighbours().tensors()
    embedded = model.get_input_embeddings()(x)
    for mode in ("greedy", "beams", "uncached"):
        how = {"max_new_tokens": 5, "min_new_tokens": 5, "attention_mask": torch.ones_like(x), **MODES[mode]}
        want = written(model, x, dict(named), **MODES[mode])
        assert torch.equal(model.generate(inputs_embeds=embedded, **dict(named), **how), want), mode


@pytest.mark.parametrize("helper", ["the same", "other names", "other layers", "without votes"])
def test_an_assistant_with_expert_memory_reads_votes_that_are_for_it(helper: str) -> None:
    names = {"expert_names": ["a", "b", "c", "d"]}
    model, x = make("mixtral", gate="memory", vote_start=2.0, **names), prompts()[:1]
    named = {**some_neighbours().rows([0]).tensors(), "neighbour_votes": torch.rand(1, 4, 2, 4)}
    other = {
        "the same": {"gate": "memory", **names},
        "other names": {"gate": "memory", "expert_names": ["a", "b", "c", "x"]},
        "other layers": {"gate": "memory", "sparse_layers": [1], **names},
        "without votes": {"gate": "retrieval", **names},
    }[helper]
    assistant = make("qwen3_moe", **other)
    want = written(model, x, dict(named), do_sample=False)
    assert torch.equal(written(model, x, dict(named), do_sample=False, assistant_model=assistant), want)
    read = model._read_by(assistant)
    assert ("neighbour_votes" in read, "neighbour_scores" in read) == {
        "the same": (True, True),
        "without votes": (False, True),
    }.get(helper, (False, False))


@pytest.mark.parametrize("assistant", ["plain", "of ours", "of another width"])
def test_an_assistant_changes_nothing_of_what_is_written(assistant: str) -> None:
    model, x, named = make("mixtral"), prompts()[:1], some_neighbours().rows([0]).tensors()
    helper = {
        "plain": lambda: native("mixtral"),
        "of ours": lambda: make("qwen3_moe"),
        "of another width": lambda: make("mixtral", neighbour_width=24),
    }[assistant]()
    want = written(model, x, dict(named), do_sample=False)
    assert torch.equal(written(model, x, dict(named), do_sample=False, assistant_model=helper), want)
    assert torch.equal(written(model, x, dict(named), do_sample=False, prompt_lookup_num_tokens=2), want)
