"""``ragmoe data`` from the outside: faults with line numbers, exit codes, and questions moved onto chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
from index_fixtures import Run, run, write

__all__ = ["run"]

TEXT = "The ferry leaves at six. " + " ".join(f"Stop number {i} is called Pier{i}." for i in range(12))
PASSAGES = [
    {"id": "a", "text": TEXT, "domain": "river", "doc_id": "d1", "split": "train"},
    {"id": "b", "text": "Bread is baked at dawn.", "domain": "market", "doc_id": "d2", "split": "dev"},
]
TRAIN = {"id": "q1", "question": "When?", "answers": ["six"], "gold_ids": ["a"], "answer_start": 20}
DEV = {"id": "q2", "question": "What?", "answers": ["Bread"], "gold_ids": ["b"], "answer_start": 0}


@pytest.fixture
def index(run: Run, tmp_path: Path) -> Path:
    assert run("index", "build", write(tmp_path / "corpus.jsonl", *PASSAGES), "--out", tmp_path / "index").code == 0
    return tmp_path / "index"


def test_good_files(run: Run, index: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "train.jsonl", TRAIN), write(tmp_path / "dev.jsonl", DEV)
    done = run("data", "check", *files, "--index", index)
    assert (done.code, done.out, done.err) == (0, "all is well: 2 questions in 2 files, 2 spans verbatim\n", "")
    done = run("data", "check", *files, "--index", index, "--json")
    assert done.json == {"ok": True, "questions": {str(files[0]): 1, str(files[1]): 1}, "spans": 2, "problems": []}


def test_faults_are_listed_with_file_and_line(run: Run, index: Path, tmp_path: Path) -> None:
    train = write(
        tmp_path / "train.jsonl", TRAIN, {**TRAIN, "id": "q3", "answer_start": 19}, {**TRAIN, "gold_ids": ["z"]}, "nope"
    )
    dev = write(tmp_path / "dev.jsonl", {**TRAIN, "id": "q4"})
    done = run("data", "check", train, dev, "--index", index)
    assert done.code == 1 and done.err == "error: 5 problems in 5 questions\n"
    assert done.out.splitlines() == [
        f"{train}:2: span 'six' is not at 19 of 'a', there stands ' si'; it stands at 20",
        f"{train}:3: id 'q1' stands already at {train}:1",
        f"{train}:3: gold passage 'z' is not in the index",
        f"{train}:4: not JSON: Expecting value at column 1",
        f"{dev}:1: gold document 'd1' is of split 'train' already at {train}:1, and of 'dev' here",
    ]
    as_json = run("data", "check", train, dev, "--index", index, "--json")
    assert as_json.code == 1 and not as_json.json["ok"]
    assert as_json.json["problems"][0] == {
        "place": f"{train}:2",
        "reason": "span 'six' is not at 19 of 'a', there stands ' si'; it stands at 20",
    }


def test_many_faults_are_cut_short_but_counted(run: Run, index: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", *({**TRAIN, "id": f"q{i}", "gold_ids": ["z"]} for i in range(60)))
    done = run("data", "check", file, "--index", index)
    assert done.code == 1 and "error: 60 problems in 60 questions" in done.err
    assert len(done.out.splitlines()) == 51 and done.out.splitlines()[-1] == "and 10 more (--json lists all)"


def test_errors(run: Run, index: Path, tmp_path: Path) -> None:
    done = run("data", "check", tmp_path / "none.jsonl", "--index", index)
    assert done.code == 1 and "none.jsonl: there is no such file; in " in done.err
    file = write(tmp_path / "train.jsonl", TRAIN)
    done = run("data", "check", file, "--index", tmp_path / "nowhere")
    assert done.code == 1 and "error: there is no index at" in done.err
    done = run("data", "check", file)
    assert done.code == 2 and "Missing option '--index'" in done.err
    done = run("data", "check", "--index", index)
    assert done.code == 2 and "Missing argument 'FILE'" in done.err
    (tmp_path / "x").mkdir()
    write(tmp_path / "x" / "dev.jsonl", DEV)
    done = run("data", "check", tmp_path / "x", "--index", index)
    assert done.code == 1 and done.err.endswith("x is a folder, expected a jsonl file; in it there is: dev.jsonl\n")
    done = run("data", "remap", file, "--index", index, "--out", file / "moved.jsonl")
    assert done.code == 1 and done.err.endswith("moved.jsonl cannot be written: Not a directory\n")
    done = run("data", "remap", file, "--index", index, "--out", tmp_path / "x")
    assert done.code == 1 and done.err.endswith("x cannot be written: Is a directory\n")
    assert not list(tmp_path.glob("*.part"))


def test_questions_move_onto_chunks(run: Run, index: Path, tmp_path: Path) -> None:
    words = ["--rechunk", "--chunk-words", 20, "--chunk-overlap", 5]
    assert run("index", "build", tmp_path / "corpus.jsonl", "--out", tmp_path / "chunked", *words).code == 0
    late = {**TRAIN, "id": "q5", "answers": ["Pier11"], "answer_start": TEXT.index("Pier11")}
    file = write(tmp_path / "train.jsonl", TRAIN, late)
    refused = run("data", "check", file, "--index", tmp_path / "chunked")
    assert refused.code == 1
    assert refused.out.splitlines()[0] == f"{file}:1: gold passage 'a' is not in the index, only chunks of it"
    hint = f"hint: move them onto the chunks: ragmoe data remap FILE --index {tmp_path / 'chunked'} --out NEW.jsonl\n"
    assert refused.err.endswith(hint)
    moved = tmp_path / "moved" / "train.jsonl"
    done = run("data", "remap", file, "--index", tmp_path / "chunked", "--out", moved)
    assert (done.code, done.out) == (0, f"{moved}: 2 questions\n")
    assert run("data", "check", moved, "--index", tmp_path / "chunked").code == 0
    long = {**TRAIN, "answers": [TEXT[:150]], "answer_start": 0}
    done = run("data", "remap", write(file, long), "--index", tmp_path / "chunked", "--out", moved)
    assert done.code == 1 and "lies whole in no chunk\nhint: build with larger chunks" in done.err


@pytest.fixture
def told(run: Run, tmp_path: Path) -> Path:
    """An index with one document in two passages that tell of the same thing, and others that do not."""
    treaty = [
        "The harbour treaty was signed by both dukes in or about 1848 without witnesses.",
        "Harbour treaty of the dukes: 1848",
    ]
    rows = [
        {"id": f"t{i}", "text": text, "domain": "history", "doc_id": "treaty", "split": "train"}
        for i, text in enumerate(treaty)
    ]
    rows += [{"id": f"o{i}", "text": f"Other{i} matters.", "domain": "rest", "split": "dev"} for i in range(9)]
    assert run("index", "build", write(tmp_path / "told.jsonl", *rows), "--out", tmp_path / "told").code == 0
    return tmp_path / "told"


def test_cloze_questions_are_good_questions(run: Run, told: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "cloze.jsonl"
    done = run("data", "cloze", "--index", told, "--domain", "history", "--split", "train", "--out", out)
    assert (done.code, done.out) == (0, f"{out}: 1 question of 1 passage\n")
    assert run("data", "check", out, "--index", told).code == 0
    assert '"origin": "cloze"' in out.read_text()


def test_cloze_says_what_there_is_instead(run: Run, told: Path, tmp_path: Path) -> None:
    done = run("data", "cloze", "--index", told, "--domain", "art", "--out", tmp_path / "x.jsonl")
    assert done.code == 2 and "there are: history, rest; splits: dev, train" in " ".join(done.err.split())
    done = run("data", "cloze", "--index", told, "--domain", "rest", "--out", tmp_path / "x.jsonl")
    assert done.code == 1 and "9 passages of 9 documents gave no question" in " ".join(done.err.split())
    assert not (tmp_path / "x.jsonl").exists()
