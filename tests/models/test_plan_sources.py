"""What a plan can be asked about, what it says where it cannot, and what memory and expert parallelism take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_families import BY_HAND, FIELDS, D, V, real
from tiny_models import Make

from ragmoe import ConfigError, ModelError, RagmoeError, UsageError
from ragmoe.models.plan import known_types, plan


def test_a_folder_a_json_file_and_five_lines_are_the_same(tmp_path: Path) -> None:
    real("mixtral").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(FIELDS["mixtral"]))
    wanted = plan(FIELDS["mixtral"])
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json", tmp_path / "small.yaml"):
        found = plan(source)
        assert (found.parameters, found.flops, found.source) == (wanted.parameters, wanted.flops, str(source))
    assert plan(tmp_path, ["num_local_experts=6"]).experts == 6 and plan(tmp_path).experts == 4


def test_a_bundle_has_the_experts_of_its_map(make: Make, tmp_path: Path) -> None:
    model = make(experts=6, top_k=3)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "experts": 99}))
    found = plan(tmp_path)
    counts = model.parameter_counts()
    assert found.parameters == {**counts, "trained": counts["total"]}
    assert (found.experts, found.top_k, found.length) == (6, 3, model.config.max_length)


def test_the_named_class_is_counted() -> None:
    """BERT has a language head by default; the encoder alone has a pooler, which runs once a sequence."""
    head, alone = plan(FIELDS["bert"]), plan({**FIELDS["bert"], "architectures": ["BertModel"]})
    assert head.parameters["total"] - alone.parameters["total"] == (D * D + D + 2 * D + V) - (D * D + D)
    assert (head.flops.per_sequence, alone.flops.per_sequence) == (0, 2 * D * D)
    (note,) = plan({**FIELDS["mixtral"], "architectures": ["ElsewhereForCausalLM"]}).notes
    assert note == "transformers has no ElsewhereForCausalLM: counted is its own model of type 'mixtral'."


def test_batch_length_and_dtype_default_to_what_the_source_says() -> None:
    found = plan({**FIELDS["mixtral"], "dtype": "bfloat16"})
    assert (found.batch, found.length, found.dtype) == (1, 128, "bf16")
    assert plan({"model_type": "llama", "num_hidden_layers": 1}).length == 2048
    found = plan(FIELDS["mixtral"], batch=3, length=7, dtype="bf16")
    assert (found.batch, found.length, found.dtype) == (3, 7, "bf16")


@pytest.mark.parametrize(
    ("source", "overrides", "options", "error", "said"),
    [
        ({"model_type": "mixtrall"}, [], {}, ModelError, "no model type 'mixtrall' to plan; there are: afmoe, "),
        ({"model_type": "mixtral", "experts": 4}, [], {}, ConfigError, "'mixtral' has no field 'experts'; there are: "),
        ({"model_type": "mixtral"}, ["expert=4"], {}, UsageError, "the command: 'mixtral' has no field 'expert'"),
        ({"model_type": "mixtral"}, ["hidden_size"], {}, UsageError, "expected key.key=value"),
        ({"model_type": "mixtral", "hidden_size": "wide"}, [], {}, ConfigError, "no configuration of 'mixtral'"),
        (
            {"hidden_size": 4},
            [],
            {},
            ConfigError,
            "names neither a model_type nor data to train on: it has hidden_size",
        ),
        ({"model_type": "hunyuan_v1_dense"}, [], {}, ModelError, "cannot build this 'hunyuan_v1_dense'"),
        ({"model_type": "mixtral"}, [], {"dtype": "fp8"}, UsageError, "dtype is 'fp8': expected fp32 or bf16"),
        ({"model_type": "mixtral"}, [], {"batch": 0}, UsageError, "batch is 0: expected at least 1"),
        (FIELDS["bert"], [], {"length": 129}, ModelError, "129 tokens is longer than the 128 positions"),
        (FIELDS["ragmoe_bert"], ["top_k=5"], {}, ConfigError, "top_k is 5: expected 1 to 4"),
        (FIELDS["ragmoe_bert"], ["gate=nearest"], {}, ConfigError, "there is no gate 'nearest'; there are: "),
        (FIELDS["mixtral"], [], {"expert_parallel": 3}, ModelError, "4 experts .* 3 ranks; .* that fit: 1, 2, 4"),
        (FIELDS["llama"], [], {"expert_parallel": 2}, ModelError, "the model has no routed experts"),
        (FIELDS["ragmoe_bert"], [], {"expert_parallel": 2}, ModelError, "LoRA experts lie inside a dense network"),
    ],
)
def test_errors_say_what_there_is(
    source: dict[str, Any], overrides: list[str], options: dict[str, Any], error: type[RagmoeError], said: str
) -> None:
    with pytest.raises(error, match=said):
        plan(source, overrides, **options)


def test_errors_about_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds no config\.json and is no bundle; it has notes\.txt"):
        plan(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no configuration .*none\.yaml"):
        plan(tmp_path / "none.yaml")
    for text, said in (("{", "is not JSON"), ("[]", "holds list"), ("{}", "names no model_type")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=said):
            plan(tmp_path)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(ModelError) as caught:
        plan({"model_type": "qwen3moe"})
    assert "did you mean qwen3_moe" in str(caught.value.hint)
    assert {"mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "llama", "bert", "ragmoe_bert"} <= {
        *known_types()
    }


def test_training_takes_sixteen_bytes_a_parameter_in_either_type() -> None:
    total = plan(FIELDS["mixtral"]).parameters["total"]
    for dtype, parts in (("fp32", (4, 4, 8, 0)), ("bf16", (2, 2, 8, 4))):
        m = plan(FIELDS["mixtral"], dtype=dtype).memory
        assert (m.weights, m.gradients, m.moments, m.master) == tuple(part * total for part in parts)
        assert m.state == 16 * total and m.training == m.state + m.activations
        assert m.checkpointed < m.activations and m.training_checkpointed == m.state + m.checkpointed


def test_activations_follow_batch_and_length() -> None:
    one, more = (plan(FIELDS["mixtral"], batch=b, length=t).memory.activations for b, t in ((1, 16), (3, 32)))
    assert more == 6 * one


def test_what_expert_parallelism_sends_and_holds() -> None:
    """Mixtral with four experts on four ranks: three of four tokens' experts are elsewhere."""
    count, E, K = BY_HAND["mixtral"]
    sent = plan(FIELDS["mixtral"], batch=2, length=8, dtype="bf16", expert_parallel=4).communication
    assert sent is not None
    # Out and back, K copies of D values of two bytes.
    layer = 2 * K * D * 2 * 3 / 4
    assert (sent.forward, sent.backward, sent.per_token) == (layer, layer, 2 * 3 * layer)
    assert sent.per_step == 2 * 8 * sent.per_token
    assert (sent.ranks, sent.experts_per_rank) == (4, 1)
    assert sent.parameters_per_rank == count(E // 4) and sent.weight_bytes_per_rank == 2 * count(E // 4)
    alone = plan(FIELDS["mixtral"], expert_parallel=1).communication
    assert alone is not None and alone.per_step == 0 and alone.parameters_per_rank == count(E)
    assert plan(FIELDS["mixtral"]).communication is None


def test_full_experts_of_a_reader_can_be_shared_out() -> None:
    sent = plan(FIELDS["ragmoe_bert-ffn"], expert_parallel=2).communication
    # Two of three layers are sparse; fp32; half of the experts are elsewhere.
    assert sent is not None and sent.per_token == 2 * 2 * (2 * 2 * D * 4 / 2)
