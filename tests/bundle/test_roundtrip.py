"""What goes into a bundle comes out again, bit for bit, and the folder is an ordinary sharded checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ragmoe import BundleError
from ragmoe.bundle import MAP_NAME, is_bundle, read_bundle, read_map, write_bundle

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def bits(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].shape == right[name].shape, name
        assert bits(left[name]) == bits(right[name]), name


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bit pattern, NaN and -0 among them."""
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        "base": random_bits((3, 5), dtype),
        "scalar": random_bits((), dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "gate": random_bits((2, 4), dtype),
        "experts": random_bits((3, 2, 4), dtype),
        "rows": random_bits((3,), dtype),
    }
    written = write_bundle(tmp_path, state, expert_tensors={"experts", "rows"}, gate_tensors={"gate"})
    found, map_ = read_bundle(tmp_path, verify=True)
    assert map_ == written
    assert_same(found, state)


def test_non_contiguous_and_overlapping_views(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    state = {
        "transposed": torch.randn(4, 6).T,
        "strided": torch.randn(8, 4)[::2],
        "upper": whole[:4],
        "lower": whole[2:],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "experts": torch.randn(4, 5, 2).permute(2, 0, 1),
    }
    write_bundle(tmp_path, state, expert_tensors={"experts"}, gate_tensors=set())
    assert_same(read_bundle(tmp_path)[0], state)


def test_tied_tensors_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    table = torch.randn(10, 4)
    state = {"embeddings": table, "other": torch.randn(2), "head": table, "view": table.view(10, 4)}
    map_ = write_bundle(tmp_path, state, expert_tensors=set(), gate_tensors=set())
    assert map_.aliases == {"head": "embeddings", "view": "embeddings"}
    assert map_.total_size == table.nbytes + 8
    found, _ = read_bundle(tmp_path)
    assert_same(found, state)
    assert found["head"] is found["embeddings"]


def test_a_single_expert_keeps_its_dimension(tmp_path: Path) -> None:
    state = {"up": torch.randn(1, 3, 2)}
    write_bundle(tmp_path, state, expert_tensors={"up"}, gate_tensors=set())
    assert load_file(tmp_path / "expert.0.1.safetensors")["up.0"].shape == (3, 2)
    assert_same(read_bundle(tmp_path)[0], state)


def test_ids_and_names_are_kept_in_the_order_of_the_tensors(tmp_path: Path) -> None:
    state = {"up": torch.randn(3, 2)}
    write_bundle(
        tmp_path,
        state,
        expert_tensors={"up"},
        gate_tensors=set(),
        expert_ids=[5, 0, 2],
        expert_names=["bank", "clinic", "archive"],
    )
    found, map_ = read_bundle(tmp_path)
    assert (map_.expert_ids, map_.expert_names, map_.next_expert_id) == ([5, 0, 2], ["bank", "clinic", "archive"], 6)
    assert_same(found, state)
    assert torch.equal(load_file(tmp_path / "expert.5.1.safetensors")["up.5"], state["up"][0])


def test_the_base_is_cut_into_shards(tmp_path: Path) -> None:
    state = {f"w{i}": torch.randn(4) for i in range(5)} | {"large": torch.randn(100)}
    map_ = write_bundle(tmp_path, state, expert_tensors=set(), gate_tensors=set(), max_shard_bytes=32)
    assert sorted(map_.files()) == [f"base-1-0000{k}-of-00004.safetensors" for k in (1, 2, 3, 4)]
    assert all(len(names) <= 2 for names in map_.files().values())
    assert_same(read_bundle(tmp_path)[0], state)


def test_the_map_is_what_hugging_face_expects(tmp_path: Path) -> None:
    state = {"a": torch.randn(4), "g": torch.randn(2), "up": torch.randn(2, 3)}
    write_bundle(tmp_path, state, expert_tensors={"up"}, gate_tensors={"g"})
    content = json.loads((tmp_path / MAP_NAME).read_text())
    assert content["weight_map"] == {
        "a": "base-1-00001-of-00001.safetensors",
        "g": "gate.1.safetensors",
        "up.0": "expert.0.1.safetensors",
        "up.1": "expert.1.1.safetensors",
    }
    assert content["metadata"]["total_size"] == 4 * (4 + 2 + 6)


def test_transformers_opens_a_bundle_without_experts(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config)
    config.save_pretrained(tmp_path)
    write_bundle(tmp_path, model.state_dict(), expert_tensors=set(), gate_tensors=set(), max_shard_bytes=500)
    assert_same(BertModel.from_pretrained(tmp_path).state_dict(), dict(model.state_dict()))


def test_what_is_recorded_beside_the_tensors(tmp_path: Path) -> None:
    map_ = write_bundle(
        tmp_path,
        {"a": torch.ones(1)},
        expert_tensors=set(),
        gate_tensors=set(),
        encoder={"id": "minilm", "digest": "12"},
        index="34",
        extra={"threshold": 0.5, "pair": (1, 2)},
        message="first",
    )
    assert map_.encoder is not None
    assert (map_.encoder.id, map_.encoder.digest, map_.index) == ("minilm", "12", "34")
    assert map_.extra == {"threshold": 0.5, "pair": [1, 2]}
    assert (map_.lineage[0].message, map_.lineage[0].parent) == ("first", None)
    assert read_map(tmp_path) == map_
    shown = json.loads((tmp_path / "bundle.json").read_text())
    assert (shown["encoder"]["id"], shown["extra"]["threshold"], shown["message"]) == ("minilm", 0.5, "first")


def test_a_bundle_is_as_readable_as_its_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    write_bundle(tmp_path, {"a": torch.ones(1)}, expert_tensors=set(), gate_tensors=set())
    assert (tmp_path / "base-1-00001-of-00001.safetensors").stat().st_mode & 0o777 == 0o644


def test_is_bundle(tmp_path: Path) -> None:
    assert not is_bundle(tmp_path / "nowhere")
    assert not is_bundle(tmp_path)
    (tmp_path / MAP_NAME).write_text('{"metadata": {"total_size": 4}, "weight_map": {}}')
    assert not is_bundle(tmp_path)
    (tmp_path / MAP_NAME).write_text("{")
    assert is_bundle(tmp_path)
    (tmp_path / MAP_NAME).unlink()
    write_bundle(tmp_path, {"a": torch.ones(1)}, expert_tensors=set(), gate_tensors=set())
    assert is_bundle(tmp_path)


BAD_ARGUMENTS = [
    ({"expert_tensors": {"nothing"}}, r"expert_tensors names \['nothing'\].*it has base"),
    ({"gate_tensors": {"nothing"}}, r"gate_tensors names \['nothing'\]"),
    ({"expert_tensors": {"up", "down"}}, r"disagree.*'down' \(3, 2\), 'up' \(2, 4\)"),
    ({"expert_tensors": {"scalar"}}, "first dimension of at least 1"),
    ({"expert_tensors": {"up"}, "gate_tensors": {"up"}}, r"share \['up'\]"),
    ({"expert_tensors": {"up"}, "expert_ids": [0, 1, 2]}, r"have 2 experts; the expert ids are \[0, 1, 2\]"),
    ({"expert_tensors": {"up"}, "expert_ids": [1, 1]}, r"the expert ids are \[1, 1\]"),
    ({"expert_tensors": {"up"}, "expert_names": ["bank", "bank"]}, r"2 different expert names; got \['bank', 'bank'\]"),
    ({"expert_tensors": {"taken"}}, r"needed for the parts of expert tensors: \['taken.1'\]"),
    ({"encoder": {"id": "minilm"}}, r"keys id and digest; got \['id'\]"),
    ({"extra": {"threshold": float("nan")}}, "extra cannot be recorded as JSON"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_arguments_that_contradict_each_other(tmp_path: Path, arguments: dict, message: str) -> None:
    state = {
        "base": torch.ones(1),
        "up": torch.ones(2, 4),
        "down": torch.ones(3, 2),
        "scalar": torch.ones(()),
        "taken": torch.ones(2, 2),
        "taken.1": torch.ones(2),
    }
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path, state, **{"expert_tensors": set(), "gate_tensors": set(), **arguments})
    assert not is_bundle(tmp_path)


def test_tensors_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"meta device.*'hollow'"):
        write_bundle(tmp_path, {"hollow": torch.ones(2, device="meta")}, expert_tensors=set(), gate_tensors=set())
