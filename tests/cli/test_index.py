"""``ragmoe index`` from the outside: what it prints where, and each error's message and exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from index_fixtures import Run, run, write
from tiny import save_tiny_encoder

__all__ = ["run"]

PASSAGES = [
    {"id": "a", "title": "Ferries", "text": "The ferry to [Northmoor] leaves at six.", "domain": "river"},
    {"id": "b", "title": "Bread", "text": "Bread from Millrace is baked at dawn.", "domain": "market"},
    {"id": "c", "title": "Charter", "text": "The charter lies in the archive.", "domain": "archive"},
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", *PASSAGES)


@pytest.fixture
def folder(corpus: Path, tmp_path: Path, run: Run) -> Path:
    assert run("index", "build", corpus, "--out", tmp_path / "index").code == 0
    return tmp_path / "index"


def test_build_prints_the_plan_on_stderr_and_the_result_on_stdout(run: Run, corpus: Path, tmp_path: Path) -> None:
    done = run("index", "build", corpus, "--out", tmp_path / "index")
    assert done.code == 0
    assert "3: archive 1, market 1, river 1" in done.err
    assert "Flat: 3 passages, at most 50,000" in done.err
    assert "of disk" in done.err and "of memory" in done.err and "about 0.0% are longer than that" in done.err
    assert done.out.startswith(f"{tmp_path / 'index'}: 3 passages, generation 1, ")


def test_build_json_is_the_manifest(run: Run, corpus: Path, tmp_path: Path) -> None:
    done = run("index", "build", corpus, "--out", tmp_path / "index", "--json")
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    read = {"out": str(tmp_path / "index"), "dry_run": False, "duplicates": 0, "skipped_lines": []}
    assert done.json == {**read, **manifest}


def test_precision_and_batch_are_printed_recorded_and_shown(run: Run, corpus: Path, tmp_path: Path) -> None:
    out, encoder = tmp_path / "index", save_tiny_encoder(tmp_path / "model")
    words = ["index", "build", corpus, "--out", out, "--encoder", encoder, "--precision", "bf16", "--batch-tokens", 64]
    done = run(*words)
    assert done.code == 0 and "bf16, 64 tokens a batch (as asked)" in done.err
    assert "bf16, 64 tokens a batch (as asked)" in run("index", "info", out).out
    assert run("index", "verify", out).code == 0
    dry = run("index", "build", corpus, "--out", tmp_path / "dry", "--encoder", encoder, "--dry-run", "--json")
    assert dry.json["encoding"]["precision"] == "fp32" and dry.json["encoding"]["chosen"] == "default"
    (tmp_path / "r.yaml").write_text(f"sources: [{corpus}]\nout: built\nprecision: bf16\n")
    own = run("index", "build", "--recipe", tmp_path / "r.yaml")
    assert own.code == 1 and "is run by its own code, which offers no choice of precision" in own.err


def test_dry_run_writes_nothing(run: Run, corpus: Path, tmp_path: Path) -> None:
    done = run("index", "build", corpus, "--out", tmp_path / "index", "--dry-run", "--json")
    assert done.code == 0 and not (tmp_path / "index").exists()
    assert done.json["passages"] == 3 and done.json["faiss"]["factory"] == "Flat"
    assert done.json["disk_bytes"] > 0 and done.json["memory_bytes"] > 0 and done.json["longer_share"] == 0
    assert "of disk" in done.err


def test_options_reach_the_build(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", {"id": "long", "text": " ".join(f"w{i}" for i in range(50))}, "{")
    words = ["--domain", "d", "--rechunk", "--chunk-words", 20, "--chunk-overlap", 4, "--on-error", "skip"]
    done = run("index", "build", source, "--out", tmp_path / "i", *words, "--long-passages", "truncate", "--json")
    assert done.json["domains"] == {"d": 3} and done.json["skipped"] == 1
    assert done.json["chunking"] == {"words": 20, "overlap": 4, "rechunk": True, "chunks": 3}
    assert done.json["long_passages"]["mode"] == "truncate"
    (skipped,) = done.json["skipped_lines"]
    assert skipped.startswith(f"{source}:2: not JSON: Expecting property name")


def test_the_plan_says_what_was_cut_and_what_was_not(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", {"id": "long", "text": " ".join(f"w{i}" for i in range(50))})
    words = ["index", "build", source, "--out", tmp_path / "i", "--chunk-words", 20, "--chunk-overlap", 4, "--dry-run"]
    done = run(*words, "--json")
    assert done.json["chunks"] == 0
    assert "none was cut: what has an id stays whole (--rechunk cuts it too), the rest has at most 20 words" in done.err
    done = run(*words, "--rechunk", "--json")
    assert done.json["chunks"] == 3 and "chunks of at most 20 words, overlap 4: 3 passages" in done.err


def test_overwrite_and_resume(run: Run, corpus: Path, folder: Path) -> None:
    refused = run("index", "build", corpus, "--out", folder)
    assert refused.code == 1
    hint = "hint: replace it with --overwrite, or name another folder with --out"
    assert refused.err.endswith(f"error: {folder} holds an index already\n{hint}\n")
    assert run("index", "build", corpus, "--out", folder, "--resume").code == 0
    assert "generation 2" in run("index", "build", corpus, "--out", folder, "--overwrite").out


def test_stopped_by_the_user_it_says_how_to_go_on(
    run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragmoe.index import _crash

    def stop(point: str) -> None:
        if point == "block":
            raise KeyboardInterrupt

    monkeypatch.setattr(_crash, "hook", stop)
    done = run("index", "build", corpus, "--out", tmp_path / "index")
    again = f"ragmoe index build {corpus} --out {tmp_path / 'index'} --resume"
    assert done.code == 130
    assert done.err.splitlines()[-1] == f"stopped; what is encoded so far is kept; go on with: {again}"
    monkeypatch.setattr(_crash, "hook", None)
    unfinished = run("index", "info", tmp_path / "index")
    hint = f"hint: go on with: ragmoe index build SOURCE... --out {tmp_path / 'index'} --resume"
    assert unfinished.code == 1 and f"holds a build that did not finish\n{hint}" in unfinished.err
    assert run("index", "build", corpus, "--out", tmp_path / "index", "--resume").code == 0


def test_without_resume_it_says_what_a_stopped_build_had_encoded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragmoe.index import _crash, blocks

    left = [2]

    def stop(point: str) -> None:
        left[0] -= point == "block"
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(blocks, "BLOCK", 1)
    corpus = write(
        tmp_path / "corpus.jsonl", *({"id": f"p{n}", "text": f"The ferry has number {n}."} for n in range(5))
    )
    words = ["index", "build", corpus, "--out", tmp_path / "index"]
    monkeypatch.setattr(_crash, "hook", stop)
    assert run(*words).code == 130
    monkeypatch.setattr(_crash, "hook", None)
    what = "stopped before 2 of 5 blocks are encoded, missing: 2 to 4"
    dry = run(*words, "--dry-run")
    more = "; --resume encodes only these, without it all are encoded again"
    assert dry.code == 0 and what + more in " ".join(dry.err.split())
    resumed = " ".join(run(*words, "--dry-run", "--resume").err.split())
    assert what in resumed and more not in resumed
    done = run(*words)
    assert done.code == 0 and what + more in " ".join(done.err.split())
    assert "stopped before" not in run(*words, "--overwrite").err


BUILD_ERRORS = {
    "no source": (
        [],
        2,
        "error: nothing to build from\nhint: ragmoe index build SOURCE... --out DIR, or --recipe FILE\n",
    ),
    "no out": (["{corpus}"], 2, "error: no folder to write to: --out DIR is missing\n"),
    "missing source": (
        ["{tmp}/none.jsonl", "--out", "{tmp}/i"],
        1,
        "none.jsonl: there is no such file, folder or match",
    ),
    "bad line": (
        ["{tmp}/bad.jsonl", "--out", "{tmp}/i"],
        1,
        "bad.jsonl:2: no 'text'; it has: body, id\nhint: mend it, or pass over",
    ),
    "twice the same id": (["{corpus}", "{tmp}/r.jsonl", "--out", "{tmp}/i"], 1, "r.jsonl:1: id 'a' stands already at "),
    "no passages": (["{tmp}/empty.jsonl", "--out", "{tmp}/i"], 1, "error: no passages in "),
    "unknown encoder": (
        ["{corpus}", "--out", "{tmp}/i", "--encoder", "./none"],
        1,
        "encoder './none': there is no such folder",
    ),
    "chunk sizes": (["{corpus}", "--out", "{tmp}/i", "--chunk-words", "0"], 2, "error: chunks of 0 words"),
    "overlap": (
        ["{corpus}", "--out", "{tmp}/i", "--chunk-words", "50"],
        2,
        "chunks of 50 words with an overlap of 40: expected at least 1 word, and an overlap from 0 to half of a chunk "
        "(25)\nhint: --chunk-overlap 10\n",
    ),
    "out is a file": (["{corpus}", "--out", "{corpus}"], 1, "corpus.jsonl is a file; expected a folder, new or empty"),
    "out under a file": (
        ["{corpus}", "--out", "{corpus}/i/j"],
        1,
        "j cannot be made: {corpus} is a file\nhint: name another with --out\n",
    ),
    "unknown choice": (
        ["{corpus}", "--out", "{tmp}/i", "--on-error", "ignore"],
        2,
        "'ignore' is not one of 'fail', 'skip'.",
    ),
    "unknown option": (["{corpus}", "--outt", "{tmp}/i"], 2, "No such option: --outt"),
    "other things": (["{corpus}", "--out", "{tmp}"], 1, "holds other things than an index: "),
    "hub offline": (["hub:nobody/nothing", "--out", "{tmp}/i"], 1, "source 'hub:nobody/nothing' cannot be loaded"),
    "recipe and source": (["{corpus}", "--recipe", "{tmp}/r.yaml"], 2, "both sources and --recipe were given"),
    "no recipe": (["--recipe", "{tmp}/none.yaml"], 1, "none.yaml: there is no such file; in "),
}


@pytest.mark.parametrize("name", BUILD_ERRORS)
def test_build_errors(name: str, run: Run, corpus: Path, tmp_path: Path) -> None:
    words, code, message = BUILD_ERRORS[name]
    write(tmp_path / "bad.jsonl", PASSAGES[0], {"id": "x", "body": "?"})
    write(tmp_path / "empty.jsonl")
    write(tmp_path / "r.yaml", "sources: [corpus.jsonl]\nout: i")
    write(tmp_path / "r.jsonl", PASSAGES[0])
    done = run("index", "build", *(word.format(corpus=corpus, tmp=tmp_path) for word in words))
    assert done.code == code
    # Usage errors come in a box, folded at its width.
    flat = " ".join(done.err.replace("│", " ").split())
    message = message.replace("{corpus}", str(corpus))
    assert message in done.err or message in flat
    assert done.out == "" and not (tmp_path / "i").exists()


def test_a_locked_index(run: Run, corpus: Path, folder: Path) -> None:
    with FileLock(folder / "build.lock"):
        done = run("index", "build", corpus, "--out", folder, "--overwrite")
    assert done.code == 1 and "is locked: another process is writing to it\nhint: wait" in done.err


def test_an_encoder_beside_a_recipe(run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_encoder(tmp_path / "models")
    place = tmp_path / "recipes"
    place.mkdir()
    beside = f"encoder: ../{folder.relative_to(tmp_path)}\nquery_prompt: 'q: '\n"
    (place / "r.yaml").write_text(f"sources: ['{corpus}']\nout: built\n{beside}")
    monkeypatch.chdir(tmp_path / "models")
    assert run("index", "build", "--recipe", place / "r.yaml", "--passage-prompt", "p: ").code == 0
    info = json.loads(run("index", "info", place / "built", "--json").out)["encoder"]
    assert info["id"] == str(folder)
    assert (info["query_prompt"], info["passage_prompt"]) == ("q: ", "p: ")


def test_recipes(run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("sources: ['${PLACE}/corpus.jsonl']\nout: built\nlong_passages: truncate\n")
    missing = run("index", "build", "--recipe", recipe)
    assert missing.code == 1
    named = "'${PLACE}/corpus.jsonl' needs the environment variable PLACE, which is not set"
    assert f"error: recipe {recipe}: {named}\nhint: export PLACE=FOLDER\n" in missing.err
    monkeypatch.setenv("PLACE", str(tmp_path))
    done = run("index", "build", "--recipe", recipe, "--json")
    assert done.json["out"] == str(tmp_path / "built") and done.json["long_passages"]["mode"] == "truncate"
    # Flags win over the recipe.
    done = run("index", "build", "--recipe", recipe, "--out", tmp_path / "mine", "--long-passages", "windows", "--json")
    assert done.json["out"] == str(tmp_path / "mine") and done.json["long_passages"]["mode"] == "windows"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [x]\nout: y\nencodr: minilm\n", "encodr: Extra inputs are not permitted"),
        ("out: y\n", "sources: Field required"),
        ("sources: []\nout: y\n", "sources: List should have at least 1 item"),
        ("sources: [x\n", "is not YAML"),
        ("- a\n", "the file: Input should be a valid dictionary"),
    ],
)
def test_recipe_errors(run: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    done = run("index", "build", "--recipe", tmp_path / "r.yaml")
    assert done.code == 1 and message in done.err
    assert "not YAML" in message or "hint: keys: sources, out, encoder" in done.err


def test_the_recipes_that_ship_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ragmoe.index.recipe import read_recipe

    root = Path(__file__).parents[2]
    monkeypatch.setenv("RAGMOE_DATA", str(tmp_path))
    recipes = {path.name: read_recipe(path) for path in (root / "indexes").glob("*.yaml")}
    assert set(recipes) >= {"demo.yaml", "core7.yaml"}
    assert [Path(source).parent.name for source in recipes["demo.yaml"].sources] == [
        "clinic", "tenancy", "bank", "appliances", "archive",
    ]  # fmt: skip
    assert all(Path(source).parents[1] == root / "data" for source in recipes["demo.yaml"].sources)
    assert len(recipes["core7.yaml"].sources) == 7
    assert recipes["core7.yaml"].sources[0] == str(tmp_path / "wiki" / "corpus.jsonl")


def test_search_prints_a_table(run: Run, folder: Path) -> None:
    done = run("index", "search", folder, "when does the ferry leave", "-k", 2)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split() == ["rank", "score", "domain", "id", "title", "text"]
    assert lines[1].split()[0] == "1" and lines[1].split()[2:5] == ["river", "a", "Ferries"]
    assert "The ferry to [Northmoor] leaves at six." in lines[1]
    assert len(lines) == 3


@pytest.mark.parametrize("retriever", ["dense", "bm25", "hybrid", "blend"])
def test_search_json(run: Run, folder: Path, retriever: str) -> None:
    done = run("index", "search", folder, "bread at dawn", "-k", 1, "--retriever", retriever, "--json")
    (hit,) = done.json
    assert hit.pop("score") > 0
    assert hit == {"rank": 1, "id": "b", "domain": "market", "title": "Bread", "text": PASSAGES[1]["text"]}


def test_search_of_one_domain(run: Run, folder: Path) -> None:
    words = ["index", "search", folder, "bread at dawn", "--json"]
    assert [hit["id"] for hit in run(*words, "--filter", "domain=river").json] == ["a"]
    assert run(*words, "--filter", "domain=river", "--filter", "split=dev").code == 2
    twice = run(*words, "--filter", "domain=river", "--filter", "domain=market")
    assert twice.code == 2 and "--filter domain was given twice" in twice.err
    for given, message in (
        ("domain=sea", "holds no passage with domain=sea; domains: archive, market, river"),
        ("colour=red", "passages are told apart by domain, doc_id, split; got 'colour'"),
        ("river", "--filter 'river' is not of the form KEY=VALUE"),
    ):
        refused = run(*words, "--filter", given)
        assert refused.code == 2 and message in refused.err


def test_a_long_hit_begins_with_the_sentence_that_matches(run: Run, tmp_path: Path) -> None:
    text = "The bridge is old. " * 20 + "Bread is baked at dawn by Mr. Miller! It is sold at noon."
    source = write(tmp_path / "x.jsonl", {"id": "x", "text": text})
    assert run("index", "build", source, "--out", tmp_path / "i").code == 0
    done = run("index", "search", tmp_path / "i", "when is bread baked")
    assert "… Bread is baked at dawn by Mr. Miller! It is sold" in done.out.splitlines()[1]


def test_the_sentence_that_matches_is_bold_on_a_terminal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    source = write(tmp_path / "x.jsonl", {"id": "x", "text": "The bridge is old. Bread is baked at dawn. It is sold."})
    assert run("index", "build", source, "--out", tmp_path / "i").code == 0

    def terminal(stream: Any) -> Console:
        return Console(file=stream, force_terminal=True, color_system="standard", width=160, _environ={})

    monkeypatch.setattr("ragmoe.cli.index.console", terminal)
    done = run("index", "search", tmp_path / "i", "when is bread baked")
    assert "The bridge is old. \x1b[1mBread is baked at dawn.\x1b[0m It is sold." in done.out


def test_search_that_finds_nothing(run: Run, folder: Path) -> None:
    assert run("index", "search", folder, "zebra", "--retriever", "bm25", "--json").json == []
    done = run("index", "search", folder, "zebra", "--retriever", "bm25")
    assert (done.code, done.out, done.err) == (0, "", "nothing found\n")


SEARCH_ERRORS = {
    "no index": (
        ["{tmp}/none", "q"],
        1,
        "error: there is no index at {tmp}/none: no such folder\nhint: build one: ragmoe index",
    ),
    "retriever": (
        ["{index}", "q", "--retriever", "x"],
        2,
        "error: retriever 'x' is unknown; there are: blend, bm25, dense, hybrid",
    ),
    "empty": (["{index}", " "], 2, "error: the query is empty"),
    "k": (["{index}", "q", "-k", "0"], 2, "should be greater than or equal to 1"),
    "encoder": (["{index}", "q", "--encoder", "other"], 1, "was built with encoder 'stub-0'"),
}


@pytest.mark.parametrize("name", SEARCH_ERRORS)
def test_search_errors(name: str, run: Run, folder: Path, tmp_path: Path) -> None:
    words, code, message = SEARCH_ERRORS[name]
    done = run("index", "search", *(word.format(index=folder, tmp=tmp_path) for word in words))
    assert done.code == code and done.out == ""
    assert message.format(tmp=tmp_path) in done.err


def test_an_encoder_mismatch_names_both_and_the_way_out(run: Run, folder: Path) -> None:
    done = run("index", "search", folder, "q", "--encoder", "other")
    assert "'stub-0'" in done.err and "'stub-1'" in done.err
    assert (
        f"hint: open it with 'stub-0', or build anew: ragmoe index build ... --out {folder} --encoder stub-1"
        in done.err
    )


def test_info(run: Run, folder: Path) -> None:
    done = run("index", "info", folder)
    assert done.code == 0 and "archive 1, market 1, river 1" in done.out and "Flat: 3 passages" in done.out
    assert "lengths of passages" in done.out and "█" in done.out
    assert "0.0% have another with a cosine of 0.95 or more (3 looked at)" in done.out
    told = run("index", "info", folder, "--json").json
    assert told.pop("summary")["sampled"] == 3
    assert told == json.loads((folder / "manifest.json").read_text())


def test_verify(run: Run, folder: Path) -> None:
    assert run("index", "verify", folder) == (0, f"{folder}: all is well\n", "")
    assert run("index", "verify", folder, "--json").json == {"ok": True, "problems": []}


@pytest.mark.parametrize("damage", ["flipped", "missing", "truncated", "encoder"])
def test_verify_fails_and_names_what_differs(run: Run, folder: Path, damage: str) -> None:
    path, words = folder / "embeddings-1.npy", []
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
        expected = "embeddings-1.npy was changed: its sha256 is"
    elif damage == "missing":
        path.unlink()
        expected = "embeddings-1.npy is missing"
    elif damage == "truncated":
        path.write_bytes(content[:-1])
        expected = f"embeddings-1.npy has {len(content) - 1} bytes, expected {len(content)}"
    else:
        words = ["--encoder", "other"]
        expected = "was built with encoder 'stub-0'"
    done = run("index", "verify", folder, *words)
    assert done.code == 1 and done.err.startswith(f"error: {folder} is damaged: ") and expected in done.err
    assert f"hint: build it anew: ragmoe index build ... --out {folder} --overwrite" in done.err
    as_json = run("index", "verify", folder, *words, "--json")
    assert as_json.code == 1 and not as_json.json["ok"] and expected in as_json.json["problems"][0]


def test_help_names_the_defaults(run: Run) -> None:
    shown = run("index", "build", "--help").out
    for default in ("minilm", "200", "40", "fail", "windows", "auto", "measured"):
        assert f"[default: ({default})]" in shown
    assert "[default: (blend)]" in run("index", "search", "--help").out


def test_help_imports_nothing_heavy() -> None:
    heavy = "torch faiss transformers sentence_transformers datasets pyarrow pandas bm25s numpy"
    code = "import sys; from ragmoe.__main__ import main; "
    code += "main(['index', 'build', '--help']); main(['data', 'check', '--help']); "
    code += f"print([name for name in {heavy!r}.split() if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "--chunk-overlap" in done.stdout
