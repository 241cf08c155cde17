"""Language modelling by ``train``: it learns from documents, with gates that it is given first, and resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoder import byte_tokenizer, tiny_llama

from ragmoe import ConfigError, DataError, ModelError, load_decoder
from ragmoe.bundle import list_experts
from ragmoe.generation import Generator
from ragmoe.training import load_config, prepare, train
from ragmoe.training.describe import describe
from ragmoe.training.language import learned_documents
from ragmoe.training.language_run import LanguageRun

Config = Callable[..., dict[str, Any]]
LANGUAGE = {"chunk_tokens": 24, "context_tokens": 8, "neighbours": 4}
SPARSE = {
    "gate": "retrieval", "experts": 2, "top_k": 2, "expert_kind": "lora", "expert_rank": 8, "gate_width": 8,
    "expert_names": ["river", "market"],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def content(config: Config, world: Path, base: Path) -> Config:
    def make(**changes: Any) -> dict[str, Any]:
        given = {
            "base": str(base), "model": {}, "language": LANGUAGE, "data.questions": [], "raft": {},
            "data.documents": [str(world / "corpus.jsonl")], "train.learning_rate": 5e-3, "train.steps": 4,
            "data.calibration_share": 0.0,
        }  # fmt: skip
        return config(**{**given, **changes})

    return make


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_tokenizer_that_is_missing_or_does_not_fit_is_told(content: Config, base: Path, tmp_path: Path) -> None:
    def refused(said: str, tokenizer: Any = None) -> None:
        folder = tmp_path / said[:9]
        tiny_llama(num_hidden_layers=1).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        with pytest.raises(ModelError, match=said):
            train(content(base=str(folder)), out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(r"has no tokenizer that could be opened: .*\nin Python: AutoTokenizer")
    larger, bare = byte_tokenizer(), byte_tokenizer()
    larger.add_tokens(["<cite>"])
    refused(r"has 260 tokens, but the model has embeddings for 259\nin Python: model.resize", larger)
    bare.bos_token = bare.eos_token = bare.pad_token = None
    refused("neither bos_token nor eos_token", bare)


def test_a_dense_model_learns_without_an_index_being_searched(content: Config, tmp_path: Path) -> None:
    result = train(content(**{"train.steps": 12, "data.index": None}), out=tmp_path / "out")
    found = losses(tmp_path / "out")
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    # 76 to 80 bytes each, in chunks of 24.
    assert result.learned_from == {"documents": 12, "chunks": 48}
    # It may be trained on, and asked like any other.
    assert Generator.load(tmp_path / "out").style.max_length == 1024


def test_it_is_given_gates_and_resumes_exactly(content: Config, tmp_path: Path) -> None:
    given = content(model=SPARSE, checkpoint_every=2)
    whole = train(given, out=tmp_path / "whole")
    assert whole.parameters["total"] > whole.parameters["active"] - 1 == whole.parameters["trained"] - 1
    model = load_decoder(tmp_path / "whole")
    assert (model.config.gate, model.config.neighbours, model.sparse_layers) == ("retrieval", 4, [0])
    assert model.config.encoder["id"] and model.config.index_digest
    assert model.gates[0].context.weight.any(), "the neighbours have taught the gate nothing"
    shares = [expert.mean_load for expert in list_experts(tmp_path / "whole")]
    assert sum(share or 0 for share in shares) == pytest.approx(1)

    class Stop:
        def stage(self, name: str, done: int, total: int) -> None:
            if name == "training" and done == 3:
                raise KeyboardInterrupt

        def line(self, text: str) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        train(given, out=tmp_path / "torn", show=Stop())
    train(given, out=tmp_path / "torn", resume=True)
    again = load_decoder(tmp_path / "torn").state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())


def test_the_oracle_is_told_the_domain_and_the_control_the_summary(content: Config) -> None:
    names = ["river", "market", "common"]
    told = {"gate": "oracle", "experts": 3, "common_experts": 1, "expert_names": names}
    run = prepare(load_config(content(model={**SPARSE, **told})))
    assert isinstance(run, LanguageRun)
    batch = run.collator([run.dataset[at] for at in range(16)])
    domains = [run.dataset.documents[run.dataset[at].chunk.document].domain for at in range(16)]
    assert batch["question_domain"].tolist() == [names.index(domain) for domain in domains]
    # It makes nothing of neighbours, and none are retrieved for it.
    assert not batch["neighbour_mask"].any()
    full = {"gate": "token", "neighbour_summary": True, "expert_kind": "ffn", "expert_rank": None}
    summed = prepare(load_config(content(model={**SPARSE, **full})))
    batch = summed.collator([summed.dataset[at] for at in range(16)])
    summary = summed.model.model.layers[0].summary
    with torch.no_grad():
        same = summed.model(**batch).logits
        torch.nn.init.normal_(summary.project)
        other = summed.model(**batch).logits
    changed_B = (same != other).flatten(1).any(dim=1)
    # The first chunk of a document has no neighbours, and is told nothing.
    assert torch.equal(changed_B, batch["neighbour_mask"].any(dim=1)) and changed_B.any() and not changed_B.all()


def test_domains_are_left_out_and_known_documents_mixed_in(content: Config, world: Path) -> None:
    def learned(**changes: Any) -> list[str]:
        return [document.domain for document in learned_documents(load_config(content(**changes)))[0]]

    assert learned(**{"data.without": ["market"]}) == ["river"] * 6
    assert len(learned(**{"data.limit": 5})) == 5
    # All documents are nearly of one length.
    mixed = learned(**{"data.limit": 4, "data.replay": [str(world / "corpus.jsonl")], "data.replay_share": 0.6})
    assert len(mixed) in (10, 11)
    # None of them twice, and none that is left out.
    replay: dict[str, Any] = {"data.replay": [str(world / "corpus.jsonl")], "data.replay_share": 0.9}
    said: list[str] = []
    for without, left in (([], 12), (["market"], 6)):
        made = load_config(content(**replay, **{"data.limit": 4, "data.without": without}))
        ids = [document.id for document in learned_documents(made, said.append)[0]]
        assert len(ids) == len(set(ids)) == left
    assert "makes up 66% of what is learned from, not 90%" in said[0] and "makes up 34%" in said[1]
    with pytest.raises(DataError, match="names the domain 'bank'; the documents are of market, river"):
        learned(**{"data.without": ["bank"]})


def test_a_dry_run_shows_chunks(content: Config) -> None:
    report = describe(prepare(load_config(content())))
    assert report["learned_from"] == {"documents": 12, "chunks": 48}
    assert "documents    12 in 48 chunks (0.33 passes)" in report["text"]
    assert all(row["target"] for row in report["first_batch"])


def test_losses_of_no_weight_are_left_out_of_the_log(content: Config, tmp_path: Path) -> None:
    lines: list[str] = []

    class Show:
        def stage(self, name: str, done: int, total: int) -> None: ...

        def line(self, text: str) -> None:
            lines.append(text)

    for weight in (0.0, 0.01):
        model = {**SPARSE, "balance_loss": weight}
        train(content(model=model, **{"train.steps": 1}), out=tmp_path / str(weight), show=Show())
    assert ["balance" in line for line in lines] == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.questions": ["q.jsonl"]}, "data.questions and data.documents exclude each other"),
        ({"data.documents": []}, "language is given, but no data.documents"),
        ({"data.documents": [], "language": None}, "data.questions is empty"),
        ({"language": {**LANGUAGE, "chunk_tokens": 2000}}, "a chunk with its context has 2008 tokens, but .* 1024 pos"),
        ({"base": "minilm"}, "the base minilm is no folder of a causal language model"),
        ({"train.what": "experts"}, "has no sparse layer"),
        ({"data.calibration_share": 0.2}, "data.calibration_share is 0.2, but .* no no-answer threshold"),
        ({"data.unanswerable_share": 0.4}, "data.unanswerable_share is 0.4, but"),
        ({"data.index": None, "model": SPARSE}, "the gate 'retrieval' sees neighbours, but data.index names no index"),
        ({"data.documents": [], "language": None, "data.without": ["river"]}, "data.without is given, but no"),
        (
            {"data.index": None, "data.documents": [], "data.questions": ["q"], "language": None},
            "data.index is missing",
        ),
    ],
)
def test_what_does_not_fit_is_refused(content: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(load_config(content(**changes)))


@pytest.mark.parametrize("model", [{}, SPARSE])
def test_adapters_are_trained_beside_gates_and_experts_and_merged(
    content: Config, base: Path, tmp_path: Path, model: dict[str, Any]
) -> None:
    given = content(model=model, checkpoint_every=2, **{"train.what": "lora", "train.lora": {"rank": 4, "alpha": 8.0}})
    run = prepare(load_config(given))
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    parts = {"lora": "lora_", "gate": ".mlp.gate.", "experts": ".mlp.experts."}
    assert all(any(mark in name for mark in parts.values()) for name in trained)
    adapted = {name.partition(".lora_A")[0].rpartition(".")[2] for name in trained if ".lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (
        any(parts["gate"] in name for name in trained)
        == any(parts["experts"] in name for name in trained)
        == bool(model)
    )

    whole = train(given, out=tmp_path / "whole")
    after = Generator.load(tmp_path / "whole").model.state_dict()
    assert whole.adapter == tmp_path / "whole" / "adapter" and (whole.adapter / "adapter_config.json").is_file()
    assert whole.parameters["total"] == sum(p.numel() for p in Generator.load(tmp_path / "whole").model.parameters())
    plain = {name.replace(".base_layer", ""): x for name, x in before.items() if "lora_" not in name}
    assert after.keys() == plain.keys()
    moved = {name for name, x in after.items() if not torch.equal(x, plain[name])}
    # Each adapted matrix has moved, by a matrix of low rank; embeddings and norms have not.
    names = {name for name in after if any(f".{module}." in name for module in adapted)}
    assert names <= moved and all(name in names or ".mlp.gate." in name or ".mlp.experts." in name for name in moved)
    for name in names:
        assert torch.linalg.matrix_rank(after[name] - plain[name], atol=1e-5) <= 4

    class Stop:
        def stage(self, name: str, done: int, total: int) -> None:
            if name == "training" and done == 3:
                raise KeyboardInterrupt

        def line(self, text: str) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        train(given, out=tmp_path / "torn", show=Stop())
    train(given, out=tmp_path / "torn", resume=True)
    again = Generator.load(tmp_path / "torn").model.state_dict()
    assert all(torch.equal(x, again[name]) for name, x in after.items())


@pytest.mark.parametrize(
    ("gate", "names", "error", "said"),
    [
        ("token", ["a", "b", "c", "d"], ConfigError, "which a language model's gate 'token' does not see"),
        ("retrieval", ["a", "b", "c", "d"], ModelError, "nothing that is learned from belongs to one that an expert"),
    ],
)
def test_a_loss_that_would_teach_nothing_is_refused(
    content: Config, gate: str, names: list[str], error: type[Exception], said: str
) -> None:
    model = {"gate": gate, "experts": 4, "expert_rank": 8, "expert_names": names, "losses": {"domain": 0.1}}
    with pytest.raises(error, match=said):
        prepare(load_config(content(model=model)))
