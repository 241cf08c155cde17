"""``ask`` and ``eval run`` with a causal language model in the place of a reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_encoder import StubEncoder
from tiny_decoder import byte_tokenizer, tiny_llama

from ragmoe import Index
from ragmoe.bundle import read_map
from ragmoe.cli.main import main
from ragmoe.corpus.types import Passage
from ragmoe.evaluation import Results
from ragmoe.gates import RetrievalGate
from ragmoe.generation import Generator, PromptStyle
from ragmoe.generation.answers import GeneratedAnswer, read_answer
from ragmoe.generation.prompts import Prompt
from ragmoe.index import BuildOptions, build_index
from ragmoe.models.initialising import init

TEXTS = {"quay": "The keeper of the quay is Anna.", "lock": "Bert opens the lock at nine."}
ASKED = [
    {"id": "a", "question": "who keeps the quay?", "answers": ["Anna the keeper"], "gold_ids": ["quay"]},
    {"id": "b", "question": "is the lock open?", "answers": ["yes"], "gold_ids": ["lock"], "answer_type": "yesno"},
    {"id": "c", "question": "what does it weigh?", "answers": [], "context_ids": ["lock"]},
]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"id": name, "text": text, "domain": "port"} for name, text in TEXTS.items()]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index(BuildOptions((str(tmp_path / "corpus.jsonl"),), tmp_path / "index", encoder=StubEncoder()))
    monkeypatch.setattr("ragmoe.index.folder.load_encoder", lambda name: StubEncoder())
    asked = [{"answer_type": "text", "domain": "port", **row} for row in ASKED]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "task.yaml").write_text("name: port\nquestions: [questions.jsonl]\nsetting: open\npassages: 2\n")
    style = PromptStyle(max_length=500, max_answer_tokens=8)
    Generator(tiny_llama(num_hidden_layers=1), byte_tokenizer(), style).save(tmp_path / "model")
    return tmp_path


def test_ask(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ask", str(world / "model"), "who keeps the quay?", "--index", str(world / "index")]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["answer_type"] == "text" and said["answered"] is True and said["answer"] and 0 <= said["score"] <= 1
    for option in (["--without", "x"], ["--resident-experts", "1"]):
        assert main([*words, *option]) == 1
        assert "is no bundle: it has no experts of its own" in capsys.readouterr().err
    style = json.loads((world / "model" / "prompt.json").read_text())
    prompts = Generator.load(world / "model").prompts
    whole = len(prompts.ids("who keeps the quay?", [Passage(name, text) for name, text in TEXTS.items()]))
    # One token less than both passages and the answer take.
    (world / "model" / "prompt.json").write_text(json.dumps({**style, "max_length": whole + 7}))
    assert main(words) == 0
    assert "1 passage shortened or left out" in capsys.readouterr().err


def test_experts_on_demand_and_held_back(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = world / "bundle"
    words = ["ask", str(bundle), "who keeps the quay?", "--index", str(world / "index"), "--json"]
    settings = {"gate": "retrieval", "experts": 4, "expert_rank": 8}
    init(world / "model", out=world / "of-another-width", **settings)
    assert main(["ask", str(world / "of-another-width"), *words[2:]]) == 1
    assert f"init ... --neighbour-width {StubEncoder().width}" in capsys.readouterr().err
    init(world / "model", out=bundle, **settings, neighbour_width=StubEncoder().width)

    def said(*more: str) -> dict[str, Any]:
        assert main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)

    plain, thrifty = said(), said("--resident-experts", "2")
    counted = thrifty.pop("experts_on_demand")
    assert thrifty == plain and (counted["resident"], counted["experts"]) == (2, 4) and counted["misses"] > 0
    # With all held back but one there is but one to be read.
    first, *others = Generator.load(bundle).expert_names
    alone = said("--resident-experts", "1", *(x for name in others for x in ("--without", name)))
    assert alone["experts_on_demand"]["bytes_read"] < counted["bytes_read"]
    assert main([*words, "--without", "nobody"]) == 1 and f"there are: {first}" in capsys.readouterr().err
    # What is recorded of the same model is taken over; of one that does without an expert it is not.
    out, task = ["--out", str(world / "out"), "--json"], str(world / "task.yaml")
    run = ["eval", "run", task, "--model", str(bundle), "--index", str(world / "index"), *out]
    digests = []
    for more in ([], ["--resident-experts", "2"], ["--without", first, "--no-resume"]):
        assert main([*run, *more]) == 0
        found = Results.load(world / "out" / "port")
        digests.append(found.model_digest)
        shares = [layer["load"][0] for layer in found.real["routing"]["layers"]]
        assert (sum(shares) == 0) == ("--without" in more)
        capsys.readouterr()
    assert digests[0] == digests[1] != digests[2]
    assert (
        main([*run, "--output-cache", "3", "--no-resume"]) == 2
        and "--output-cache is for readers" in capsys.readouterr().err
    )


def test_a_bundle_just_made_is_asked_within_its_positions(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = world / "short"
    Generator(tiny_llama(num_hidden_layers=1, max_position_embeddings=400), byte_tokenizer()).save(base)
    assert json.loads((base / "prompt.json").read_text())["max_length"] == 400
    (base / "prompt.json").unlink()
    init(base, out=world / "made", gate="token", experts=2)
    for words in (["ask"], ["route"]):
        assert main([*words, str(world / "made"), "who?", "--index", str(world / "index"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)


def test_route(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["who keeps the quay?", "--index", str(world / "index")]
    assert main(["route", str(world / "model"), *asked]) == 0
    assert "has no gate of ragmoe's" in (said := capsys.readouterr().out) and "ragmoe init --base" in said
    assert main(["route", str(world / "model"), *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["with_neighbours"] == []
    bundle = world / "bundle"
    settings = {"gate": "retrieval", "experts": 4, "expert_rank": 8, "neighbour_width": StubEncoder().width}
    init(world / "model", out=bundle, **settings)
    opened = Generator.load(bundle)
    for module in opened.model.modules():
        if isinstance(module, RetrievalGate):
            torch.nn.init.normal_(module.context.weight)  # zero until it is trained
    opened.save(bundle)
    assert main(["route", str(bundle), *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passages"] == [n["id"] for n in found["neighbours"]] and set(found["passages"]) == set(TEXTS)
    given, bare = (torch.tensor(found[f"{name}_neighbours"]) for name in ("with", "without"))
    assert given.shape == (1, 4) and torch.allclose(given.sum(1), torch.ones(1, dtype=given.dtype))
    assert (given - bare).abs().max() > 0.01
    # The same as by hand, from the model's own routings.
    index = Index.open(world / "index")
    generator, shown = Generator.load(bundle), index.passages(found["passages"])
    ids = torch.tensor([generator.prompts.make(asked[0], shown).ids])
    seen = generator.recall(index.neighbours(asked[:1], generator.config.neighbours), index)
    routings = generator.model(input_ids=ids, **seen.tensors(), output_routings=True).routings
    assert torch.allclose(given[0], routings[0].logits_SE.softmax(-1).mean(0).double().float(), atol=1e-6)
    # The gate sees as many neighbours as it learned with; the prompt has as many passages as there is room for.
    opened.model.config.neighbours = 1
    opened.save(bundle)
    assert main(["route", str(bundle), *asked, "--json"]) == 0
    fewer = json.loads(capsys.readouterr().out)
    assert len(fewer["neighbours"]) == 1 and fewer["passages"] == found["passages"]
    style = json.loads((bundle / "prompt.json").read_text())
    room = len(generator.prompts.ids(asked[0], shown[:1])) + style["max_answer_tokens"]
    (bundle / "prompt.json").write_text(json.dumps({**style, "max_length": room}))
    assert main(["route", str(bundle), *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passages"] == found["passages"][:1]
    first = found["experts"][0]
    assert main(["route", str(bundle), *asked, "--json", "--without", first]) == 0
    assert json.loads(capsys.readouterr().out)["with_neighbours"][0][0] == 0
    assert main(["route", str(bundle), *asked]) == 0
    assert "over the question and " in capsys.readouterr().out


def test_a_memory_is_recorded_and_recalled(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, index = world / "bundle", Index.open(world / "index")
    init(world / "model", out=bundle, gate="memory", experts=4, expert_rank=8, neighbour_width=index.width)
    words = ["index", "annotate", str(index.folder), "--model", str(bundle)]
    assert main([*words, "--questions", str(world / "questions.jsonl"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["used"], said["recorded"], said["passages"]) == (2, 2, 2)
    made = Generator.load(bundle)
    recorded = made.memory(index)
    assert recorded.questions_P.tolist() == [1, 1] and recorded.bundle == said["bundle"]
    votes_BNLE = made.recall(index.neighbours(["who keeps the quay?"], 2), index).votes_BNLE
    assert votes_BNLE is not None and votes_BNLE.sum(dim=-1).allclose(torch.ones(1), atol=1e-2)


def test_eval_run_scores_words_and_citations(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {
        "who keeps the quay?": "Anna is keeper [1]",
        "is the lock open?": "yes [2]",
        "what does it weigh?": "ton [1]",
    }
    read: dict[str, list[str]] = {}

    def scripted(
        self: Generator, questions: list[str], passages: list[list[Passage]], *args: object, **kwargs: object
    ) -> list[GeneratedAnswer]:
        read.update({q: [p.id for p in own] for q, own in zip(questions, passages, strict=True)})
        prompts = [Prompt([1], [], tuple(own)) for own in passages]
        return [read_answer(p, said[q], -1.0, -2.0) for q, p in zip(questions, prompts, strict=True)]

    monkeypatch.setattr(Generator, "read", scripted)
    words = ["eval", "run", str(world / "task.yaml"), "--model", str(world / "model"), "--index", str(world / "index")]
    assert main([*words, "--out", str(world / "out"), "--json"]) == 0
    assert read["who keeps the quay?"] == ["quay", "lock"] and read["is the lock open?"] == ["lock", "quay"]
    samples = {sample.id: sample for sample in Results.load(world / "out" / "port").samples["real"]}
    a, b, c = (samples[name] for name in "abc")
    assert (a.cited, a.citation_precision, a.citation_recall) == (("quay",), 1.0, 1.0)
    # Of "anna is keeper" two words stand in "anna the keeper" in their order.
    assert a.rouge_l == pytest.approx(2 / 3)
    # The second passage is not the gold one.
    assert (b.cited, b.citation_precision, b.citation_recall, b.rouge_l) == (("quay",), 0.0, 0.0, None)
    assert (b.em, c.citation_precision, c.citation_recall, c.answered) == (1.0, 0.0, None, True)
    generation = Results.load(world / "out" / "port").real["generation"]
    assert generation["citation_precision"]["macro"] == pytest.approx(100 / 3)
    assert generation["citation_recall"]["per_domain"] == {"port": {"mean": 50.0, "n": 2}}
    capsys.readouterr()
    # Asked in another way it is another model, and nothing is taken over.
    Generator(tiny_llama(num_hidden_layers=1), byte_tokenizer(), PromptStyle("memory", 500, 8)).save(world / "model")
    read.clear()
    assert main([*words, "--out", str(world / "out"), "--json"]) == 0
    assert len(read) == 3
    read.clear()
    assert main([*words, "--out", str(world / "out"), "--json"]) == 0
    assert not read


def test_an_expert_is_added_without_an_index(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init(world / "model", out=world / "bundle", gate="token", experts=2, expert_rank=8)
    rows = [{"id": f"d{i}", "text": f"bread and salt {i} " * 3, "domain": "market"} for i in range(3)]
    (world / "market.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (world / "others.jsonl").write_text(json.dumps({"id": "o", "text": "who keeps the key of the lock?"}) + "\n")
    words = ["experts", "add", str(world / "bundle"), "train.batch_size=2", "--name", "market"]
    words += ["--corpus", str(world / "market.jsonl"), "--others", str(world / "others.jsonl"), "--steps", "2"]
    judged = ["--dev", str(world / "market.jsonl"), "--known", str(world / "corpus.jsonl")]
    assert main([*words, *judged, "--dry-run"]) == 0
    assert "3 in 3 chunks" in capsys.readouterr().out and read_map(world / "bundle").version == 1
    assert main([*words, *judged, "train.gate_learning_rate=0.3"]) == 0
    said = capsys.readouterr().out
    for text in (
        "Certificate of market",
        "perplexity before",
        "identical",
        "change, %",
        "routed, %",
        "2 steps on 3 documents",
    ):
        assert text in said.replace("\n", " "), said
    assert main(["experts", "show", str(world / "bundle"), "market"]) == 0
    assert "Certificate of market" in capsys.readouterr().out
    assert main([*words[:5], "stall", *words[6:], "--task", str(world / "task.yaml")]) == 1
    assert "--corpus FILE to learn from, --dev and --known FILE to judge by" in capsys.readouterr().err


def test_asking_what_has_only_read_documents(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"base={world / 'model'}", f"data.documents=['{world / 'corpus.jsonl'}']", "train.steps=1"]
    cut = ["language.chunk_tokens=8", "language.context_tokens=8", "train.batch_size=2"]
    (world / "documents.yaml").write_text("{}\n")
    assert main(["train", str(world / "documents.yaml"), *settings, *cut, "--out", str(world / "reads")]) == 0
    capsys.readouterr()
    asked = ["who keeps the quay?", "--index", str(world / "index"), "--json"]
    assert main(["ask", str(world / "reads"), *asked]) == 0
    assert "has learned to go on with documents and not to answer" in " ".join(capsys.readouterr().err.split())
    assert main(["ask", str(world / "model"), *asked]) == 0
    assert "has learned to go on" not in capsys.readouterr().err


def test_ask_names_all_that_is_cited(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = GeneratedAnswer("Anna, at nine", ("quay", "lock"), 0.5, -1.0, "Anna [1], at nine [2]")
    monkeypatch.setattr(Generator, "answer", lambda *_, **__: [said])
    words = ["ask", str(world / "model"), "who, and when?", "--index", str(world / "index")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cited"], found["said"], found["passage"]["id"]) == (["quay", "lock"], said.said, "quay")
    assert main(words) == 0
    assert "also cited: lock" in capsys.readouterr().out


def test_pruning_is_measured_on_a_language_model(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"experts": 3, "top_k": 1, "gate": "token", "expert_kind": "lora", "expert_rank": 8}
    init(world / "model", out=world / "sparse", expert_names=["a", "b", "c"], **settings)
    words = ["experts", "prune", str(world / "sparse"), "b", "--task", str(world / "task.yaml")]
    assert main([*words, "--index", str(world / "index"), "--dry-run", "--json"]) == 0
    (measured,) = json.loads(capsys.readouterr().out)["measured"]
    assert measured["task"] == "port" and 0 < measured["load"] < 1
