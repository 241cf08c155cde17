"""The adapter to lm-evaluation-harness: its three requests, what the gate is shown, and the harness itself."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from stub_encoder import StubEncoder
from tiny_decoder import byte_tokenizer, tiny_llama

from ragmoe import ConfigError, Index, ModelError
from ragmoe.evaluation.harness import HarnessModel
from ragmoe.generation import Generator, PromptStyle
from ragmoe.index import BuildOptions, build_index
from ragmoe.models.initialising import init

TEXTS = {"quay": "The keeper of the quay is Anna.", "lock": "Bert opens the lock at nine.", "map": "A map of the city."}


def ask(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def generator(**changes: Any) -> Generator:
    positions = changes.setdefault("max_position_embeddings", 128)
    style = PromptStyle(max_length=positions, max_answer_tokens=positions // 2)
    return Generator(tiny_llama(**changes), byte_tokenizer(), style)


class Watched:
    """Lets a generator's gate see neighbours, and notes what it is shown beside which tokens."""

    def __init__(self, made: Generator, width: int) -> None:
        self.seen: list[tuple[list[int], float, int]] = []
        model = made.model
        forward = model.forward
        model.gate_sees_neighbours, model.config.neighbours = True, width

        def watching(input_ids: Any = None, neighbour_embeddings: Any = None, **rest: Any) -> Any:
            for ids, row, mask in zip(
                input_ids.tolist(), neighbour_embeddings, rest.pop("neighbour_mask"), strict=True
            ):
                self.seen.append((ids, row.sum().item(), int(mask.sum())))
            rest.pop("neighbour_scores")
            return forward(input_ids=input_ids, **rest)

        model.forward = watching

    def beside(self, tokens: list[int]) -> tuple[float, int]:
        """What the sequence that begins with these tokens was shown."""
        return next((total, n) for ids, total, n in self.seen if ids[: len(tokens)] == tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("harness")
    rows = [{"id": name, "text": text} for name, text in TEXTS.items()]
    (place / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index(BuildOptions((str(place / "corpus.jsonl"),), place / "index", encoder=StubEncoder()))
    return place


def logs(made: Generator, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return made.model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_a_token_that_spans_both_is_not_made_use_of() -> None:
    """Else nothing of the continuation would be left to judge, which is likelier than anything."""
    tokenizer = byte_tokenizer(merges=[("1", "0")])
    made = Generator(tiny_llama(vocab_size=len(tokenizer)), tokenizer, PromptStyle(max_length=64, max_answer_tokens=16))
    assert len(tokenizer("x10")["input_ids"]) == len(tokenizer("x1")["input_ids"])
    model = HarnessModel(made)
    (merged, greedy), (other, _) = model.loglikelihood([ask("x1", "0"), ask("x1", "5")])
    context, zero = tokenizer("x1")["input_ids"], tokenizer("0")["input_ids"]
    table = logs(made, [*context, *zero])
    assert merged == pytest.approx(table[len(context) - 1, zero[0]].item(), rel=1e-4) and merged < 0 and other < 0
    assert greedy == (int(table[len(context) - 1].argmax()) == zero[0])


def test_likelihoods_are_those_of_the_whole_text() -> None:
    made = generator()
    model, tokenizer = HarnessModel(made, batch_size=2), made.tokenizer
    requests = [ask("a context", " goes on"), ask("a context ", "goes on"), ask("", "no context"), ask("b", "c")]
    found = model.loglikelihood(requests)
    for request, (nats, greedy) in zip(requests, found, strict=True):
        context = tokenizer(request.args[0].rstrip())["input_ids"] or [1]
        ids = context + tokenizer("".join(request.args)[len(request.args[0].rstrip()) :])["input_ids"]
        table = logs(made, ids)
        places = range(len(context), len(ids))
        assert nats == pytest.approx(sum(table[at - 1, ids[at]].item() for at in places), rel=1e-4)
        assert greedy == all(int(table[at - 1].argmax()) == ids[at] for at in places)
    # A space belongs to the word after it, wherever the task has put it.
    assert found[0] == found[1]


def test_a_long_context_loses_its_beginning() -> None:
    made = generator()
    model = HarnessModel(made)
    long = "x" * 300 + "the end"
    kept = long[-(128 - 4) :]
    assert model.loglikelihood([ask(long, " now")])[0][0] == pytest.approx(
        model.loglikelihood([ask(kept, " now")])[0][0], rel=1e-5
    )
    with pytest.raises(ModelError, match="a continuation has 200 tokens, but the model has 128"):
        model.loglikelihood([ask("c", "y" * 200)])


def test_a_rolling_likelihood_judges_every_token_once() -> None:
    made = generator(max_position_embeddings=1024)
    text = "".join(f"word{i} " for i in range(60))
    ids = [1, *made.tokenizer(text)["input_ids"]]
    table = logs(made, ids)
    whole = sum(table[at - 1, ids[at]].item() for at in range(1, len(ids)))
    # With room for all of it, and where the text is longer than the model: 64 tokens at a time after 64 others.
    found = HarnessModel(made).loglikelihood_rolling([ask(text), ask(""), ask("other")])
    assert found[0] == pytest.approx(whole, rel=1e-5) and found[1] == 0.0 and found[2] < 0
    small = generator()
    pieces = 0.0
    for begin in range(1, len(ids), 64):
        part = ids[max(0, begin - 64) : begin + 64]
        table, at = logs(small, part), begin - max(0, begin - 64)
        pieces += sum(table[i - 1, part[i]].item() for i in range(at, len(part)))
    assert HarnessModel(small).loglikelihood_rolling([ask(text)])[0] == pytest.approx(pieces, rel=1e-5)
    assert HarnessModel(made).loglikelihood_rolling([ask("")]) == [0.0]


def test_it_generates_until_it_is_stopped() -> None:
    made = generator(max_position_embeddings=256)
    model = HarnessModel(made)
    contexts = ["tell me", "tell me something longer", "x" * 400]
    greedy = model.generate_until([ask(context, {"max_gen_toks": 20}) for context in contexts])
    for context, said in zip(contexts, greedy, strict=True):
        ids = made.tokenizer(context)["input_ids"][-(256 - 20) :]
        with torch.no_grad():
            alone = made.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
        assert said == made.tokenizer.decode(alone, skip_special_tokens=True)
    with pytest.raises(ModelError, match="256 tokens are to be generated, but the model has 256"):
        model.generate_until([ask("tell me", {})])
    stop = greedy[0][5]
    settings = [{"max_gen_toks": 20, "until": [stop, "never said"]}, {"max_gen_toks": 20, "until": stop}]
    settings.append({"max_gen_toks": 3, "temperature": 0.0, "do_sample": False, "until": []})
    stopped = model.generate_until([ask(contexts[0], given) for given in settings])
    assert stopped[0] == stopped[1] == greedy[0][: greedy[0].index(stop)]
    assert greedy[0].startswith(stopped[2].rstrip("\ufffd")) and len(stopped[2]) <= 3


def test_the_context_retrieves_and_the_continuation_never_does(folder: Path) -> None:
    index, made = Index.open(folder / "index", encoder=StubEncoder()), generator()
    watched, tokenizer = Watched(made, 2), made.tokenizer
    model = HarnessModel(made, index)
    contexts = ["who keeps the quay?", "when does the lock open?", ""]
    model.loglikelihood([ask(context, " lock quay map") for context in contexts])
    asked = index.neighbours(contexts[:2], 2)
    for row, context in enumerate(contexts[:2]):
        total, n = watched.beside(tokenizer(context)["input_ids"])
        assert total == pytest.approx(asked.embeddings_BNR[row].sum().item()) and n == 2
    assert watched.beside([1]) == (0.0, 0)
    watched.seen.clear()
    # Of a long context its end is asked: what comes before would retrieve something else.
    model.loglikelihood([ask("map city " * 50 + "quay keeper Anna " * 22, " lock")])
    wanted = index.neighbours([" ".join(("quay keeper Anna " * 22).split()[-64:])], 2)
    assert watched.seen[0][1] == pytest.approx(wanted.embeddings_BNR.sum().item())
    with pytest.raises(ModelError, match="LlamaForCausalLM sees no neighbours"):
        HarnessModel(generator(), index)


def test_a_text_is_not_shown_itself(folder: Path) -> None:
    index, made = Index.open(folder / "index", encoder=StubEncoder()), generator(max_position_embeddings=32)
    watched = Watched(made, 2)
    model = HarnessModel(made, index)
    model.loglikelihood_rolling([ask(TEXTS["quay"])])
    # 31 bytes in stretches of 16: before the first there is nothing, and the second may see all but the text.
    assert sorted(n for _, _, n in watched.seen) == [0, 2]
    second = next(total for _, total, n in watched.seen if n)
    guarded = index.neighbours([TEXTS["quay"][:16]], 3).without([["quay"]])
    assert second == pytest.approx(guarded.embeddings_BNR.sum().item(), abs=1e-4)


def test_a_chat_is_written_by_the_tokenizer() -> None:
    made = Generator(tiny_llama(), byte_tokenizer(chat=True))
    model = HarnessModel(made)
    history = [{"role": "user", "content": "hello"}]
    assert model.apply_chat_template(history) == "<|user|>\nhello</s>\n<|assistant|>\n"
    assert model.chat_template(True) == made.tokenizer.chat_template and model.chat_template(False) == ""


def test_without_the_harness_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ragmoe.cli.main import main

    monkeypatch.delitem(sys.modules, "ragmoe.evaluation.lm_eval", raising=False)
    # Its own modules too, where it is installed and another test has imported it.
    for name in {"lm_eval", *(name for name in sys.modules if name.startswith("lm_eval."))}:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["eval", "harness", "run", "--model", "ragmoe", "--tasks", "mine"]) == 1
    said = capsys.readouterr().err
    assert "lm-evaluation-harness cannot be imported" in said and "hint: pip install 'ragmoe[lm-eval]'" in said


def test_a_batch_holds_no_more_sequences_than_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sizes = generator(max_position_embeddings=256), list[int]()
    forward = type(made.model).forward

    def watched(self: Any, input_ids: Any = None, **rest: Any) -> Any:
        sizes.append(len(input_ids))
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(made.model), "forward", watched)
    texts = [f"text {at}" for at in range(7)]
    asked = {
        "loglikelihood": [ask(text, " more") for text in texts],
        "loglikelihood_rolling": [ask(text) for text in texts],
        "generate_until": [ask(text, {"max_gen_toks": 2}) for text in texts],
    }
    for given, most in (({}, 7), ({"batch_size": 3}, 3), ({"max_batch_size": 2}, 2), ({"batch_size": 1}, 1)):
        for name, requests in asked.items():
            sizes.clear()
            answers = getattr(HarnessModel(made, **given), name)(requests)
            assert len(answers) == 7 and max(sizes) == most, (given, name)


@pytest.fixture
def ragmoe_lm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class that the harness knows, whether the harness is installed or not."""
    for name, content in {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": type("LM", (), {"__init__": lambda self: None})},
        "lm_eval.api.registry": {"register_model": lambda name: lambda kind: kind},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ragmoe.evaluation.lm_eval", raising=False)
    yield importlib.import_module("ragmoe.evaluation.lm_eval").RagmoeLM
    # Made over a stand-in, it is nobody else's.
    sys.modules.pop("ragmoe.evaluation.lm_eval", None)


def test_the_harness_own_arguments(ragmoe_lm: Any, tmp_path: Path) -> None:
    generator().save(tmp_path / "model")

    def made(**given: Any) -> Any:
        return ragmoe_lm(str(tmp_path / "model"), **given)

    plain = made(batch_size=1, device="cuda:0")
    assert (plain.batch_rows, plain.generator.model.dtype) == (1, torch.float32)
    assert (made(batch_size="auto:4").batch_rows, made(batch_size="8", max_batch_size=64).batch_rows) == (None, 8)
    assert made(max_batch_size=64).batch_rows == 64
    assert made(dtype="bfloat16").generator.model.dtype == torch.bfloat16
    assert made(dtype="auto").generator.model.dtype == torch.float32
    for given, said in (
        ({"batch_size": "many"}, "batch_size is 'many': expected a number of sequences"),
        ({"batch_size": 0}, "batch_size is 0: expected a number of sequences"),
        ({"max_batch_size": "auto"}, "max_batch_size is 'auto'"),
        ({"dtype": "int8"}, "dtype is 'int8': expected auto, float32"),
        ({"dtype": "exact"}, "dtype is 'exact': expected auto, float32"),
        ({"peft": "adapter"}, "--model ragmoe knows no 'peft'"),
    ):
        with pytest.raises(ConfigError, match=said):
            made(**given)


def test_the_harness_runs_a_local_task(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    from lm_eval.tasks import TaskManager

    import ragmoe.evaluation.lm_eval  # noqa: F401

    made = generator(max_position_embeddings=256)
    made.save(tmp_path / "model")
    rows = [
        {"q": "who keeps the quay?", "choices": ["Anna", "Bert"], "gold": 0},
        {"q": "when?", "choices": ["nine", "ten in the morning"], "gold": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/rows.jsonl"}}}
    task |= {"test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "gold"}
    kinds: dict[str, dict[str, Any]] = {
        "pick": {"output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}]},
        "say": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["x"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
        "roll": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{q}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    for name, own in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task, **own}))
    found = lm_eval.simple_evaluate(
        "ragmoe",
        model_args=f"pretrained={tmp_path}/model",
        tasks=list(kinds),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        # As its command line says it, also where there is no GPU.
        device="cuda:0",
        bootstrap_iters=0,
    )
    model = HarnessModel(made)
    picked = [[nats for nats, _ in model.loglikelihood([ask(r["q"], f" {c}") for c in r["choices"]])] for r in rows]
    right = [nats.index(max(nats)) == row["gold"] for nats, row in zip(picked, rows, strict=True)]
    assert found["results"]["pick"]["acc,none"] == sum(right) / 2
    said = [sample["resps"][0][0] for sample in found["samples"]["say"]]
    assert said == model.generate_until([ask(row["q"], {"max_gen_toks": 8, "until": ["x"]}) for row in rows])
    nats = sum(model.loglikelihood_rolling([ask(row["q"]) for row in rows]))
    size = sum(len(row["q"].encode()) for row in rows)
    assert found["results"]["roll"]["byte_perplexity,none"] == pytest.approx(math.exp(-nats / size), rel=1e-5)


def trained_bundle(place: Path) -> Path:
    """A dense model upcycled by ``init``; its gates heed neighbours by now, and its experts say different things."""
    generator(max_position_embeddings=1024).save(place / "dense")
    settings: dict[str, Any] = {"gate": "retrieval", "experts": 4, "expert_kind": "ffn"}
    init(place / "dense", out=place / "bundle", **settings, neighbour_width=StubEncoder().width)
    opened = Generator.load(place / "bundle")
    for gate, block in zip(opened.model.gates, opened.model.moe_layers, strict=True):
        torch.nn.init.normal_(gate.context.weight)  # zero until it is trained
        torch.nn.init.normal_(block.experts.down_proj)
    opened.save(place / "bundle")
    return place / "bundle"


def test_the_harness_runs_a_task_with_an_index(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``index=`` names reaches the gates, as the harness's own arguments have it."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    from lm_eval.tasks import TaskManager

    import ragmoe.evaluation.lm_eval  # noqa: F401

    monkeypatch.setattr("ragmoe.index.folder.load_encoder", lambda name: StubEncoder())
    bundle = trained_bundle(tmp_path)
    rows = [{"q": "who keeps the quay?", "gold": 0}, {"q": "who opens the lock?", "gold": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["Anna", "Bert"]
    task: dict[str, Any] = {
        "task": "who",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/rows.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "gold",
        "doc_to_choice": names,
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "who.yaml").write_text(yaml.safe_dump(task))

    def nats(index: str) -> torch.Tensor:
        found = lm_eval.simple_evaluate(
            "ragmoe",
            model_args=f"pretrained={bundle}{index}",
            tasks=["who"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
        )
        samples = sorted(found["samples"]["who"], key=lambda sample: sample["doc_id"])
        return torch.tensor([[nats for nats, _ in sample["filtered_resps"]] for sample in samples])

    requests = [ask(row["q"], f" {name}") for row in rows for name in names]
    plain, shown = (
        torch.tensor([nats for nats, _ in HarnessModel(Generator.load(bundle), index).loglikelihood(requests)])
        for index in (None, Index.open(folder / "index"))
    )
    assert torch.allclose(nats(f",index={folder}/index"), shown.view(2, 2), atol=1e-4)
    assert torch.allclose(nats(""), plain.view(2, 2), atol=1e-4)
    assert ((shown - plain).abs() > 0.01).all()
