from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ragmoe.cli.eval import name_of
from ragmoe.evaluation.result import Result


@pytest.fixture
def bundle(make_bundle: Any) -> Path:
    return make_bundle("retrieval", gate="retrieval", sparse_layers=[0, 1])


def test_run_prints_a_report_and_keeps_samples_and_results(
    ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path
) -> None:
    code, out, err = ragmoe("eval", "run", small_city / "task.yaml", "--model", bundle, "--out", tmp_path)
    assert code == 0
    for title in (
        "small (gold): F1 / EM",
        "Parameters and routing",
        "Retrieval",
        "Load per expert",
        "Other neighbours",
    ):
        assert title in out
    assert "samples and results" in err
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names == {"results.json", "report.md", "samples.jsonl", "samples.null.jsonl", "run.trec", "qrels.trec"}
    assert "| macro | 4 |" in (tmp_path / "small" / "report.md").read_text()


def test_run_json_is_all_of_stdout(ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path) -> None:
    code, out, _ = ragmoe(
        *("eval", "run", small_city / "task.yaml", "--model", bundle, "--out", tmp_path, "--limit", 1, "--json")
    )
    shape = json.loads(out)
    assert code == 0
    assert shape["n-samples"]["small"] == {"original": 2, "effective": 2}
    assert shape["ragmoe"]["tasks"]["small"]["retrieval"]["n"] == 2


def test_run_with_experts_on_demand_and_an_output_cache(
    ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path
) -> None:
    """Two tasks over the same questions: the second finds what the first has read, and all is as without."""
    text = (small_city / "task.yaml").read_text().replace("perturbations: [null]\n", "")
    for name in ("one", "two"):
        (small_city / f"{name}.yaml").write_text(text.replace("small", name))
    tasks = [small_city / "one.yaml", small_city / "two.yaml"]
    run = ("eval", "run", *tasks, "--model", bundle, "--json", "--out")
    plain = json.loads(ragmoe(*run, tmp_path / "plain")[1])
    code, out, _ = ragmoe(*run, tmp_path / "thrifty", "--resident-experts", 2, "--output-cache", 50)
    shape = json.loads(out)
    assert code == 0 and shape["results"] == plain["results"]
    store, cache = (shape["ragmoe"].pop(name) for name in ("experts_on_demand", "output_cache"))
    assert shape["ragmoe"] == plain["ragmoe"]
    assert (store["resident"], store["experts"]) == (2, 4) and store["hits"] + store["misses"] > 0
    assert (cache["hits"], cache["misses"], cache["entries"], cache["hit_rate"]) == (4, 4, 4, 0.5)
    # A run without either goes on with what was recorded: it is the same model.
    code, _, err = ragmoe(
        *("eval", "run", *tasks, "--model", bundle, "--out", tmp_path / "plain"), "--resident-experts", 2,
        *("--output-cache", 50),
    )  # fmt: skip
    assert code == 0
    assert "experts on demand: 2 of 4 a layer in memory, 0 hits of 0, 0 read ahead" in err
    assert "output cache: 0 hits of 0, 0 of 50 places taken" in err


def test_runs_are_compared(ragmoe: Any, small_city: Path, bundle: Path, make_bundle: Any, tmp_path: Path) -> None:
    token = make_bundle("token", gate="token", sparse_layers=[1])
    for name, model in (("a", bundle), ("b", token)):
        assert ragmoe("eval", "run", small_city / "task.yaml", "--model", model, "--out", tmp_path / name)[0] == 0
    code, out, _ = ragmoe("eval", "compare", tmp_path / "a", tmp_path / "b", "--json")
    compared = json.loads(out)["comparisons"][0]
    assert code == 0
    assert (compared["task"], compared["setting"], compared["n"]) == ("small", "gold", 4)
    assert compared["low"] <= compared["difference"] <= compared["high"]
    code, out, _ = ragmoe("eval", "compare", tmp_path / "a", tmp_path / "b", "--metric", "em")
    assert code == 0
    assert "macro" in out
    assert "too narrow where a domain has fewer than 10 documents: rivers 2, coins 2." in " ".join(out.split())
    assert ragmoe("eval", "compare", tmp_path / "a", tmp_path / "b", "--metric", "bleu")[0] == 2


def test_tasks_that_one_run_alone_has_are_told(ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path) -> None:
    spec = yaml.safe_load((small_city / "task.yaml").read_text())
    spec |= {"questions": [str(small_city / "questions.jsonl")], "index": str(small_city / "index")}
    tasks = {name: tmp_path / f"{name}.yaml" for name in ("common", "first", "second")}
    for name, path in tasks.items():
        path.write_text(yaml.safe_dump({**spec, "name": name}))
    for out, named in (("a", ("common", "first")), ("b", ("common", "second"))):
        words = (*(tasks[name] for name in named), "--model", bundle, "--limit", 1, "--out", tmp_path / out)
        assert ragmoe("eval", "run", *words)[0] == 0
    code, out, err = ragmoe("eval", "compare", tmp_path / "a", tmp_path / "b", "--json")
    found = json.loads(out)
    assert code == 0 and [one["task"] for one in found["comparisons"]] == ["common"]
    assert found["left_out"] == ["first", "second"]
    _, _, err = ragmoe("eval", "compare", tmp_path / "a", tmp_path / "b")
    assert "not compared, since one of the two lacks them: first, second" in err


def test_runs_over_other_questions_are_not_compared(
    ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path
) -> None:
    run = ("eval", "run", small_city / "task.yaml", "--model", bundle, "--out")
    ragmoe(*run, tmp_path / "a")
    ragmoe(*run, tmp_path / "b", "--limit", 1)
    code, _, err = ragmoe("eval", "compare", tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert "2 questions differ: 2 only in the first, 0 only in the second" in err
    code, _, err = ragmoe("eval", "compare", tmp_path / "a", tmp_path / "none")
    assert code == 1
    assert "none is not a finished evaluation: expected results.json in it" in err
    assert "there is no such folder; evaluations in" in err and ": a, b\nhint: ragmoe eval run TASK" in err
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").touch()
    code, _, err = ragmoe("eval", "compare", tmp_path / "a", tmp_path / "c")
    assert code == 1
    assert "but it holds notes.txt; evaluations in" in err


def test_two_evaluations_of_one_task_are_not_taken_for_each_other(
    ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path
) -> None:
    for out in ("whole", "less"):
        run = ("eval", "run", small_city / "task.yaml", "--model", bundle, "--out", tmp_path / "all" / out)
        assert ragmoe(*run, *(("--limit", 1) if out == "less" else ()))[0] == 0
        (tmp_path / "all" / out / "small").rename(tmp_path / "all" / f"small-{out}")
    code, _, err = ragmoe("eval", "compare", tmp_path / "all", tmp_path / "all" / "small-whole")
    assert code == 1 and "holds two evaluations of the task small, in small-less and small-whole" in err
    assert f"hint: name one of them: {tmp_path / 'all' / 'small-less'} or" in err


def test_a_finished_evaluation_is_not_replaced_by_another(
    ragmoe: Any, small_city: Path, bundle: Path, make_bundle: Any, tmp_path: Path
) -> None:
    token = make_bundle("token", gate="token", sparse_layers=[1])

    def run(*words: object, model: Path = bundle) -> tuple[int, str, str]:
        return ragmoe("eval", "run", small_city / "task.yaml", "--model", model, "--out", tmp_path / "a", *words)

    assert run()[0] == 0
    before = (tmp_path / "a" / "small" / "samples.jsonl").read_bytes()
    (tmp_path / "corpus.jsonl").write_text((small_city / "corpus.jsonl").read_text().replace("barges", "boats"))
    assert ragmoe("index", "build", tmp_path / "corpus.jsonl", "--out", tmp_path / "other")[0] == 0
    for words, model, said in (
        (("--limit", 1), bundle, "all questions of each domain"),
        (("--without", "expert0"), bundle, f"the model {bundle}"),
        ((), token, f"the model {bundle}"),
        (("--index", tmp_path / "other"), bundle, "another index"),
    ):
        code, _, err = run(*words, model=model)
        assert code == 2 and f"holds a finished evaluation of {said}, which would be replaced" in err, words
        assert "hint: give another folder with --out, or --no-resume to replace it" in err
        assert (tmp_path / "a" / "small" / "samples.jsonl").read_bytes() == before
    # A task of the same name that asks otherwise, too; what is tried beside goes on where it was.
    spec = yaml.safe_load((small_city / "task.yaml").read_text())
    spec |= {"questions": [str(small_city / "questions.jsonl")], "index": str(small_city / "index")}
    other = tmp_path / "task.yaml"
    again = ("eval", "run", other, "--model", bundle, "--out", tmp_path / "a")
    other.write_text(yaml.safe_dump({**spec, "setting": "open", "passages": 1}))
    code, _, err = ragmoe(*again)
    assert code == 2 and "a finished evaluation of setting: gold and passages: 5, which would be replaced" in err
    other.write_text(yaml.safe_dump({**spec, "perturbations": ["null"]}))
    assert ragmoe(*again)[0] == 0
    assert (tmp_path / "a" / "small" / "samples.null.jsonl").is_file()
    assert run()[0] == 0
    assert run("--limit", 1, "--no-resume")[0] == 0
    assert len((tmp_path / "a" / "small" / "samples.jsonl").read_text().splitlines()) == 2


def test_failed_questions_are_in_no_mean_and_in_the_exit_code(
    ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragmoe.models import RagmoeBertForQuestionAnswering

    read = RagmoeBertForQuestionAnswering.read

    def failing(self: Any, questions: list[str], *args: Any, **kwargs: Any) -> Any:
        if any("barges" in question for question in questions):
            raise RuntimeError("out of coal")
        return read(self, questions, *args, **kwargs)

    run = ("eval", "run", small_city / "task.yaml", "--model", bundle, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(RagmoeBertForQuestionAnswering, "read", failing)
        code, out, err = ragmoe(*run)
    assert code == 1
    assert "75.0 %, 1 error" in out
    assert "2 questions failed (left out of every mean); q2: RuntimeError: out of coal" in err
    code, out, _ = ragmoe(*run)
    assert code == 0
    assert "100.0 %" in out


def test_run_needs_an_index_a_task_and_a_model(ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path) -> None:
    task = tmp_path / "t.yaml"
    task.write_text(f"name: t\nquestions: [{small_city}/questions.jsonl]\n")
    code, _, err = ragmoe("eval", "run", task, "--model", bundle, "--out", tmp_path)
    assert code == 2
    assert "the task t names no index and no corpus" in err
    assert "hint: give the index with --index DIR" in err
    assert ragmoe("eval", "run", task, "--model", bundle, "--out", tmp_path, "--index", small_city / "index")[0] == 0
    code, _, err = ragmoe("eval", "run", task, "--model", tmp_path / "none", "--index", small_city / "index")
    assert code == 1
    assert "none is not a bundle" in err
    code, _, err = ragmoe("eval", "run", "nonesuch", "--model", bundle)
    assert code == 2
    assert "there is no task file 'nonesuch'; tasks in eval/tasks: " in err
    code, _, err = ragmoe("eval", "run", task, task, "--model", bundle)
    assert code == 2
    assert "two tasks are called 't'" in err
    assert ragmoe("eval", "run", task)[0] == 2


def test_what_is_missing_is_said_before_the_model_is_loaded(
    ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("ragmoe.models.load", loaded)
    task, lost = small_city / "task.yaml", tmp_path / "lost.yaml"
    lost.write_text(f"name: lost\nquestions: [{small_city}/questions.jsonl]\nindex: nope\n")
    (tmp_path / "file").touch()
    for words, said in (
        ((task, "--model", bundle, "--index", tmp_path / "nope"), f"there is no index at {tmp_path / 'nope'}"),
        ((lost, "--model", bundle), f"there is no index at {tmp_path / 'nope'}: no such folder"),
        ((task, "--model", tmp_path), f"{tmp_path} is not a bundle: expected model.safetensors.index.json, found"),
        ((task, tmp_path / "none.yaml", "--model", bundle), "cannot read the task"),
        ((task, "--model", bundle, "--out", tmp_path / "file"), f"error: {tmp_path / 'file'} is a file; expected a"),
    ):
        code, _, err = ragmoe("eval", "run", *words)
        assert code == 1
        assert said in err


def test_gold_needs_gold_ids(ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (small_city / "questions.jsonl").read_text().splitlines()]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({**row, "gold_ids": []}) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text("name: t\nquestions: [q.jsonl]\n")
    run = ("eval", "run", tmp_path / "t.yaml", "--model", bundle, "--index", small_city / "index", "--out", tmp_path)
    code, _, err = ragmoe(*run)
    assert code == 1
    assert "error: task t: 4 of 4 questions have no gold_ids, which name the passage that the setting gold" in err
    assert f"q1 ({tmp_path}/q.jsonl:1), q2 ({tmp_path}/q.jsonl:2), " in err
    assert "hint: add them, or put `setting: open` into the task" in err
    rows[2]["gold_ids"] = []
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = ragmoe(*run)
    assert code == 0
    assert "task t: 1 of 4 questions have no gold_ids, which name the passage" in err
    assert f": q3 ({tmp_path}/q.jsonl:3); they are left out (`setting: open` needs no gold_ids)" in err
    assert "75.0 %" in out
    (tmp_path / "t.yaml").write_text("name: t\nquestions: [q.jsonl]\nsetting: open\n")
    code, _, err = ragmoe(*run, "--no-resume")
    assert code == 0
    assert "have no gold_ids" not in err


def test_what_could_not_be_scored_is_told(ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (small_city / "questions.jsonl").read_text().splitlines()]
    rows[1] |= {"answers": ["true"], "answer_type": "yesno"}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text("name: t\nquestions: [q.jsonl]\n")
    run = ("eval", "run", tmp_path / "t.yaml", "--model", bundle, "--index", small_city / "index", "--out", tmp_path)
    code, out, err = ragmoe(*run)
    assert code == 0 and "75.0 %" in out
    told = "1 question could not be scored (left out of every mean); q2: answers ['true'] to a yesno question"
    assert told in err


def test_a_stopped_run_says_the_command_that_goes_on(
    ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragmoe.models import RagmoeBertForQuestionAnswering

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    words = ("eval", "run", small_city / "task.yaml", "--model", bundle, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(RagmoeBertForQuestionAnswering, "read", stop)
        code, out, err = ragmoe(*words, "--no-resume")
    assert (code, out) == (130, "")
    kept = f"the answers recorded so far are kept in {tmp_path / 'out'}"
    assert err.splitlines()[-1] == f"stopped; {kept}; go on with: ragmoe {' '.join(map(str, words))}"


def test_the_data_folder(ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path) -> None:
    task = tmp_path / "t.yaml"
    task.write_text("name: t\nquestions: ['${RAGMOE_DATA}/questions.jsonl']\n")
    run = ("eval", "run", task, "--model", bundle, "--index", small_city / "index", "--out", tmp_path)
    code, _, err = ragmoe(*run)
    assert code == 1
    assert "needs the environment variable RAGMOE_DATA, which is not set" in err
    assert ragmoe(*run, "--data", small_city)[0] == 0
    code, _, err = ragmoe(*run, "--data", tmp_path / "none")
    assert code == 2
    assert "there is no such folder" in err


def test_a_corpus_is_indexed_once(
    ragmoe: Any, small_city: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(small_city / "corpus.jsonl", "corpus.jsonl")
    settings = {"name": "t", "questions": [f"{small_city}/questions.jsonl"], "corpus": ["corpus.jsonl"]}
    Path("t.yaml").write_text(yaml.safe_dump(settings))
    assert ragmoe("eval", "run", "t.yaml", "--model", bundle)[0] == 0
    built = list(Path("runs/indexes").glob("corpus-*/manifest.json"))
    stamp = built[0].stat().st_mtime_ns
    assert ragmoe("eval", "run", "t.yaml", "--model", bundle)[0] == 0
    assert built[0].stat().st_mtime_ns == stamp
    assert len(list(Path("runs/eval").glob("*retrieval*/t/results.json"))) == 1
    # A corpus that has changed is indexed again.
    with Path("corpus.jsonl").open("a") as file:
        file.write(json.dumps({"id": "late", "text": "The late ferry leaves at ten."}) + "\n")
    assert ragmoe("eval", "run", "t.yaml", "--model", bundle)[0] == 0
    assert built[0].stat().st_mtime_ns != stamp


def test_ls_says_what_there_is_and_how_to_name_it(ragmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = ragmoe("eval", "ls")
    assert code == 1
    assert "there is no task (*.yaml) in eval/tasks" in err
    folder = Path("eval/tasks")
    folder.mkdir(parents=True)
    (folder / "one.yaml").write_text("name: one\ndescription: The first.\nquestions: [x]\n")
    (folder / "two.yaml").write_text("name: two\n")
    code, out, _ = ragmoe("eval", "ls")
    assert code == 0
    assert "The first." in out
    assert "questions: Field required" in out
    assert "ragmoe eval run one --model BUNDLE" in out
    assert [row["task"] for row in json.loads(ragmoe("eval", "ls", "--json")[1])] == ["one", "two"]


def test_an_experiment_from_training_to_result(
    ragmoe: Any, small_city: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    content = {
        "name": "tiny",
        "index": str(small_city / "index"),
        "train": {
            "base": str(small_city / "base"),
            "model": {"experts": 4, "expert_rank": 8, "max_length": 64, "stride": 16},
            "data": {"questions": [str(small_city / "questions.jsonl")], "index": "unused", "calibration_share": 0.0},
            "raft": {"max_length": 64, "neighbours": 3},
            "train": {"steps": 2, "batch_size": 2, "precision": "fp32"},
        },
        "arms": {"dense": {"model.sparse_layers": []}, "retrieval": {"model.gate": "retrieval"}},
        "tasks": [str(small_city / "task.yaml")],
        "comparisons": [["retrieval", "untrained"]],
        "untrained": True,
        "result": "tiny.json",
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    words = ("eval", "experiment", tmp_path / "tiny.yaml", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("ragmoe.training.train", stop)
        code, _, err = ragmoe(*words)
    assert code == 130
    assert f"stopped; what was trained and read so far is kept in {tmp_path / 'out'}" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith(f"go on with: ragmoe {' '.join(map(str, words))}")
    code, out, err = ragmoe(*words)
    assert code == 0
    assert "retrieval − untrained" in out
    assert "training 2 steps" in err
    result = Result.read(tmp_path / "tiny.json")
    assert list(result.arms) == ["untrained", "dense", "retrieval"]
    assert result.arms["dense"].seconds is not None
    code, out, err = ragmoe(*words, "--json")
    assert code == 0
    assert "training 2 steps" not in err
    assert Result.model_validate_json(out).arms == result.arms
    written = json.loads((tmp_path / "tiny.json").read_text())
    report = ("eval", "report", *words[2:])
    code, out, err = ragmoe(*report)
    assert code == 0
    assert "retrieval − untrained" in out
    assert f"wrote {tmp_path / 'tiny' / 'macro_f1.png'}" in err
    assert "![Macro F1 of each arm](<tiny/macro_f1.png>)" in (tmp_path / "tiny.md").read_text()
    code, out, _ = ragmoe(*report, "--json", "--plots", tmp_path / "drawn")
    assert code == 0
    assert json.loads(out) == written == json.loads((tmp_path / "tiny.json").read_text())
    assert (tmp_path / "drawn" / "load.png").is_file()
    code, _, err = ragmoe(*report, "--seeds", "0,1")
    assert code == 0
    assert "not run yet: untrained seed 1, dense seed 1, retrieval seed 1" in err
    code, _, err = ragmoe("eval", "report", tmp_path / "tiny.yaml", "--out", tmp_path / "nowhere")
    assert code == 1
    assert "nowhere holds nothing of the experiment tiny" in err
    assert "hint: ragmoe eval experiment " in err
    code, _, err = ragmoe(*words, "train.steps=3")
    assert code == 1
    assert "train.steps (2, now 3)" in err
    for wrong in ("train.stepz=3", "steps"):
        code, _, err = ragmoe(*words, wrong)
        assert code == 2
        assert wrong.partition("=")[0] in err
    code, _, err = ragmoe(*words[:3], "--out", tmp_path / "tiny.yaml")
    assert code == 1
    assert "tiny.yaml is a file; expected a folder" in err
    code, _, err = ragmoe(*words, "--only", "tokn")
    assert code == 2
    assert "there is no arm 'tokn'; there are: untrained, dense, retrieval" in err
    code, _, err = ragmoe(*words, "--seeds", "a")
    assert code == 2
    assert "expected whole numbers" in err


def test_a_report_without_matplotlib(ragmoe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.yaml").write_text(
        "name: x\nindex: i\ntrain: {data: {questions: [q], index: i}}\narms: {a: {}}\ntasks: [t]\n"
    )
    monkeypatch.setattr("ragmoe.evaluation.plots.importlib.util.find_spec", lambda name: None)
    code, _, err = ragmoe("eval", "report", tmp_path / "x.yaml")
    assert code == 1
    assert "hint: pip install 'ragmoe[report]'" in err


def test_the_commands_import_nothing_heavy() -> None:
    heavy = [
        "torch",
        "faiss",
        "transformers",
        "sentence_transformers",
        "datasets",
        "sklearn",
        "ir_measures",
        "numpy",
        "matplotlib",
        "PIL",
    ]
    code = (
        "import sys, ragmoe.cli.eval, ragmoe.cli.ask, ragmoe.cli.route\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bundles_of_an_experiment_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are called seed-0/bundle."""
    monkeypatch.chdir(tmp_path)
    assert name_of(Path("runs/demo/dense/seed-0/bundle")) == "runs-demo-dense-seed-0-bundle"
    assert name_of(Path("runs/halvern")) == "runs-halvern"
    one, two = (name_of(tmp_path.parent / other / "seed-0" / "bundle") for other in ("a", "b"))
    assert one != two and one.startswith("seed-0-bundle-")
