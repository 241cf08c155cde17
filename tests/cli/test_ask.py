from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BRIDGE = "When did the long bridge over the river Sarn open?"


def test_an_answer_with_its_passage(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    bundle = make_bundle("sure", no_answer_threshold=1e9)
    code, out, _ = ragmoe("ask", bundle, BRIDGE, "--index", small_city / "index", "--json")
    found = json.loads(out)
    passage = found["passage"]
    assert (code, found["answered"]) == (0, True)
    assert passage["text"][passage["start"] : passage["end"]] == found["answer"] == found["best_guess"]
    code, out, _ = ragmoe("ask", bundle, BRIDGE, "--index", small_city / "index")
    assert code == 0
    # Not folded where it is no terminal.
    assert out.splitlines() == [
        found["answer"],
        "",
        f"{passage['id']}  {passage['title']}  score {found['score']:.2f}",
        passage["text"],
    ]


def test_nothing_answers_it(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    bundle = make_bundle("unsure", no_answer_threshold=-1e9)
    code, out, _ = ragmoe("ask", bundle, BRIDGE, "--index", small_city / "index")
    assert code == 0
    assert out.startswith("Nothing here answers it.\nbest guess: ")
    _, out, _ = ragmoe("ask", bundle, BRIDGE, "--index", small_city / "index", "--json")
    found = json.loads(out)
    assert (found["answered"], found["answer"], found["threshold"]) == (False, None, -1e9)
    assert found["best_guess"]


def test_m_is_how_many_passages_are_read(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    bundle = make_bundle("sure", no_answer_threshold=1e9)
    _, out, _ = ragmoe("ask", bundle, BRIDGE, "--index", small_city / "index", "-m", 1, "--json")
    assert json.loads(out)["passage"]["id"] == "bridge"


def test_wrong_words(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    bundle = make_bundle("sure", no_answer_threshold=1e9)
    code, _, err = ragmoe("ask", bundle, "  ", "--index", small_city / "index")
    assert (code, err) == (2, "error: the question is empty\n")
    assert ragmoe("ask", bundle, "\u200b \n", "--index", small_city / "index")[::2] == (code, err)
    # As a terminal in Latin-1 gives it.
    code, _, err = ragmoe("ask", bundle, "caf\udce9 who?", "--index", small_city / "index")
    assert code == 2 and err.startswith("error: the question holds bytes that are not UTF-8, after 'caf'\n")
    code, _, err = ragmoe("ask", bundle, "q?", "--index", small_city / "index", "-m", 0)
    assert code == 2
    code, _, err = ragmoe("ask", bundle, "q?")
    assert code == 2
    assert "--index" in err


def test_a_question_without_room_is_told(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    words = ("ask", make_bundle("sure", no_answer_threshold=1e9), f"{'the ' * 40}{BRIDGE}", "--index")
    code, out, err = ragmoe(*words, small_city / "index", "--json")
    assert code == 0 and json.loads(out)["answered"]
    assert "tokens of the question were not read: there is no room for more\n" in err
    assert "not read" not in ragmoe(*words[:2], BRIDGE, "--index", small_city / "index")[2]


def test_missing_folders(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    code, _, err = ragmoe("ask", small_city / "none", "q?", "--index", small_city / "index")
    assert code == 1
    assert "none is not a bundle" in err
    code, _, err = ragmoe("ask", make_bundle("sure", no_answer_threshold=1e9), "q?", "--index", small_city / "none")
    assert code == 1
    assert "there is no index at" in err


def test_an_expert_can_be_held_back(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    bundle = make_bundle("sure", no_answer_threshold=1e9)
    asked = (bundle, BRIDGE, "--index", small_city / "index", "--json", "--without", "0", "--without", "expert 2")
    assert ragmoe("ask", *asked)[0] == 0
    routed = json.loads(ragmoe("route", *asked)[1])["with_neighbours"]
    assert all(row[0] == row[2] == 0 and row[1] + row[3] > 0.99 for row in routed)
    code, _, err = ragmoe("ask", *asked, "--without", "sports")
    assert code == 1
    assert "there is no expert 'sports'; there are: expert 0, " in err


def test_with_experts_on_demand(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    words = ("ask", make_bundle("sure", no_answer_threshold=1e9), BRIDGE, "--index", small_city / "index")
    want = json.loads(ragmoe(*words, "--json")[1])
    code, out, err = ragmoe(*words, "--resident-experts", 1, "--json")
    found = json.loads(out)
    counted = found.pop("experts_on_demand")
    assert (code, found) == (0, want)
    assert (counted["resident"], counted["experts"]) == (1, 4) and counted["misses"] > 0
    code, out, err = ragmoe(*words, "--resident-experts", 1)
    assert code == 0
    assert out.startswith(want["answer"])
    assert "experts on demand: 1 of 4 a layer in memory, " in err and " MB read\n" in err
    assert ragmoe(*words, "--resident-experts", 0)[0] == 2
