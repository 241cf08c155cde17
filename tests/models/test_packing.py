"""A bundle packed as what it adds to its base, and unpacked again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import Make, some_neighbours, tokens

from ragmoe import BundleError, load
from ragmoe.bundle import is_bundle, prune_experts, read_bundle, read_map
from ragmoe.models import RagmoeBertForQuestionAnswering, starter
from ragmoe.models.packing import ABOUT_NAME, TENSORS_NAME, is_packed, pack, unpack
from ragmoe.models.starter import resolve_bundle, starter_folder

RANK = 3


@pytest.fixture
def trained(make: Make) -> RagmoeBertForQuestionAnswering:
    """As training with adapters leaves it: gates, experts, head and low-rank changes of the base's matrices."""
    torch.manual_seed(0)
    model = make(trained=False, gate="retrieval+memory", expert_names=["a", "b", "c", "d"])
    model.config.encoder = {"id": "some", "digest": "0" * 64}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moe." in name or "outputs" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "attention.self.query.weight" in name or "intermediate.dense.weight" in name:
                rows, columns = parameter.shape
                parameter.add_(torch.randn(rows, RANK) @ torch.randn(RANK, columns) * 0.02)
    return model


@pytest.fixture
def bundle(trained: RagmoeBertForQuestionAnswering, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    trained.tokenizer.save_pretrained(folder)
    trained.save_pretrained(folder)
    return folder


@pytest.fixture
def packed(bundle: Path, dense_folder: Path, tmp_path: Path) -> Path:
    written = pack(bundle, tmp_path / "packed", base=str(dense_folder), rank=RANK)
    assert written == sum(file.stat().st_size for file in (tmp_path / "packed").iterdir())
    return tmp_path / "packed"


def test_what_is_unpacked_answers_alike(
    trained: RagmoeBertForQuestionAnswering, packed: Path, bundle: Path, tmp_path: Path
) -> None:
    assert is_packed(packed) and not is_packed(bundle) and not is_bundle(packed)
    again = load(unpack(packed, tmp_path / "again"))
    inputs = tokens() | {
        "neighbour_votes": torch.rand(4, 3, len(trained.sparse_layers), 4),
        **{k: v for k, v in some_neighbours(4).tensors().items() if k != "neighbour_votes"},
    }
    with torch.no_grad():
        a, b = trained(**inputs), again(**inputs)
    assert (a.start_logits - b.start_logits).abs()[:, :8].max() < 5e-3
    assert again.expert_names == ["a", "b", "c", "d"] and again.config.encoder == trained.config.encoder
    assert again.config.to_dict() | {"_name_or_path": ""} == load(bundle).config.to_dict() | {"_name_or_path": ""}
    assert again.tokenizer("the river")["input_ids"] == trained.tokenizer("the river")["input_ids"]
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "packed", "again"}


def test_it_holds_what_was_trained_and_nothing_of_the_base(packed: Path, bundle: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(packed / TENSORS_NAME)
    state, _ = read_bundle(bundle)
    assert all(x.dtype == torch.float16 for x in tensors.values())
    new = {name for name in state if ".moe." in name or "outputs" in name}
    changed = {name for name in state if "self.query.weight" in name or "intermediate.dense.weight" in name} - new
    assert set(tensors) == new | {f"{name}.{side}" for name in changed for side in "ab"}
    assert all(tensors[f"{name}.a"].shape[1] == RANK for name in changed)


def test_ids_and_records_are_kept(bundle: Path, dense_folder: Path, tmp_path: Path) -> None:
    prune_experts(bundle, ["b"])
    pack(bundle, tmp_path / "packed", base=str(dense_folder), rank=RANK)
    before, after = read_map(bundle), read_map(unpack(tmp_path / "packed", tmp_path / "again"))
    assert after.expert_ids == [0, 2, 3] and after.expert_names == ["a", "c", "d"]
    assert after.extra == before.extra and after.encoder == before.encoder


def test_thresholds_of_single_experts_are_packed(
    trained: RagmoeBertForQuestionAnswering, bundle: Path, dense_folder: Path, tmp_path: Path
) -> None:
    trained.config.expert_thresholds = [None, 1.5, None, None]
    trained.save_pretrained(bundle)
    pack(bundle, tmp_path / "packed", base=str(dense_folder), rank=RANK)
    assert load(unpack(tmp_path / "packed", tmp_path / "again")).config.expert_thresholds == [None, 1.5, None, None]


def test_unpacking_twice_is_bit_equal(packed: Path, tmp_path: Path) -> None:
    first, second = (read_bundle(unpack(packed, tmp_path / name))[0] for name in ("one", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_precision_is_named(bundle: Path, dense_folder: Path, tmp_path: Path) -> None:
    load(bundle).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    with pytest.raises(BundleError, match=r"saved in torch\.bfloat16, .*: expected torch\.float32"):
        pack(tmp_path / "half", tmp_path / "out", base=str(dense_folder), rank=RANK)


def test_a_change_of_a_higher_rank_is_refused(bundle: Path, dense_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"changed by a matrix of a higher rank than 2: \d+\.\d% of it would be lost"):
        pack(bundle, tmp_path / "small", base=str(dense_folder), rank=2)


def other_digest(packed: Path) -> None:
    about = json.loads((packed / ABOUT_NAME).read_text())
    (packed / ABOUT_NAME).write_text(json.dumps(about | {"base_digest": "1" * 64}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / TENSORS_NAME).write_bytes(b"x"), "is damaged or missing"),
        (lambda p: (p / TENSORS_NAME).unlink(), "is damaged or missing"),
        (lambda p: (p / ABOUT_NAME).unlink(), "is no packed bundle"),
        (lambda p: (p / ABOUT_NAME).write_text("{}"), "is no packed bundle"),
        (other_digest, "adds to the weights 111111111111 of"),
        (lambda p: (p.parent / "again").mkdir(), "exists: expected a new folder"),
    ],
)
def test_faults_leave_nothing(packed: Path, tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(packed)
    with pytest.raises(BundleError, match=said):
        unpack(packed, tmp_path / "again")
    assert not is_bundle(tmp_path / "again") and not list(tmp_path.glob(".again*"))


def test_another_base_is_told(bundle: Path, make: Make, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=50, **shape)).save_pretrained(tmp_path / "other")
    with pytest.raises(BundleError, match="does not come from"):
        pack(bundle, tmp_path / "packed", base=str(tmp_path / "other"))


def test_the_starter_is_unpacked_once(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "PACKED", packed)
    monkeypatch.setenv("RAGMOE_CACHE", str(tmp_path / "cache"))
    folder = starter_folder()
    assert folder.parent == tmp_path / "cache" and is_bundle(folder)
    # Whoever may read the cache may read it.
    (tmp_path / "cache" / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "cache" / "plain").stat().st_mode
    monkeypatch.setattr(starter, "unpack", None)
    assert starter_folder() == folder == resolve_bundle("starter")
    assert load("starter").expert_names == ["a", "b", "c", "d"]
    # A folder of that name is a bundle like any other.
    shutil.copytree(folder, "starter")
    assert resolve_bundle("starter") == Path("starter")


def test_a_package_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "PACKED", tmp_path / "none")
    with pytest.raises(BundleError, match="comes without its starter"):
        load("starter")


def test_no_place_to_unpack_is_told(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "PACKED", packed)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAGMOE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BundleError, match=r"cannot be unpacked in .*\nexport RAGMOE_CACHE=DIR"):
        starter_folder()


def test_experts_of_attention_are_no_deltas(make: Make, dense_folder: Path, tmp_path: Path) -> None:
    model = make(gate="token", moe_attention=True, trained=False)
    model.tokenizer.save_pretrained(tmp_path / "bundle")
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.experts.key_value.b.normal_(std=0.1)
    model.save_pretrained(tmp_path / "bundle")
    pack(tmp_path / "bundle", tmp_path / "packed", base=str(dense_folder), rank=RANK)
    again = load(unpack(tmp_path / "packed", tmp_path / "again"))
    for one, two in zip(model.moe_layers, again.moe_layers, strict=True):
        assert torch.allclose(one.experts.key_value.b, two.experts.key_value.b, atol=1e-3)


def test_what_is_no_reader_is_refused(bundle: Path, dense_folder: Path, tmp_path: Path) -> None:
    file = bundle / "model.safetensors.index.json"
    file.write_text(file.read_text().replace('"ragmoe_bert"', '"ragmoe_mixtral"'))
    with pytest.raises(BundleError, match=r"is a 'ragmoe_mixtral' model; readers .* alone can be packed"):
        pack(bundle, tmp_path / "packed", base=str(dense_folder))
    assert not (tmp_path / "packed").exists()
