from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BRIDGE = "When did the long bridge over the river Sarn open?"


def test_the_figures(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    bundle = make_bundle("retrieval", gate="retrieval", sparse_layers=[0, 1])
    code, out, _ = ragmoe("route", bundle, BRIDGE, "--index", small_city / "index", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["layers"], len(found["experts"]), found["gate_sees_neighbours"]) == ([0, 1], 4, True)
    assert len(found["neighbours"]) == 3
    assert found["neighbours"][0]["id"] == "bridge"
    answer = json.loads(ragmoe("ask", bundle, BRIDGE, "--index", small_city / "index", "--json")[1])
    # What it would answer from, or the best where it finds nothing to.
    assert found["passages"] == [(answer["passage"] or {"id": "bridge"})["id"]]
    for given, bare, moved in zip(
        found["with_neighbours"], found["without_neighbours"], found["difference"], strict=True
    ):
        assert sum(given) == pytest.approx(1.0, abs=1e-5)
        assert sum(bare) == pytest.approx(1.0, abs=1e-5)
        assert moved == pytest.approx([a - b for a, b in zip(given, bare, strict=True)])
    assert max(abs(x) for row in found["difference"] for x in row) > 0.01


def test_the_drawing_fits_eighty_columns_and_reads_without_colour(
    ragmoe: Any, small_city: Path, make_bundle: Any
) -> None:
    bundle = make_bundle("many", gate="retrieval", sparse_layers=[1], experts=16)
    code, out, _ = ragmoe("route", bundle, BRIDGE, "--index", small_city / "index")
    found = json.loads(ragmoe("route", bundle, BRIDGE, "--index", small_city / "index", "--json")[1])
    assert code == 0
    assert out.startswith("Neighbours (by blend, with their cosine)\n")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "\x1b[" not in out
    assert out.count("layer 1") == 3 * 2
    shown = out.split("Without them")[0]
    assert all(f"{value:.2f}" in shown for value in found["with_neighbours"][0])
    assert all(f"{value:+z.2f}" in out.split("Difference")[1] for value in found["difference"][0])
    assert "rivers  bridge  Bridge" in out


def test_named_experts_are_listed(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    names = ["rivers", "coins", "expert 2", "expert 3"]
    bundle = make_bundle("named", gate="retrieval", sparse_layers=[1], expert_names=names)
    _, out, _ = ragmoe("route", bundle, BRIDGE, "--index", small_city / "index")
    assert "experts: 0 rivers, 1 coins\n" in out


def test_a_gate_without_neighbours_has_nothing_to_compare(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    bundle = make_bundle("token", gate="token", sparse_layers=[1])
    code, out, _ = ragmoe("route", bundle, BRIDGE, "--index", small_city / "index")
    assert code == 0
    assert "the token gate sees no neighbours" in out
    assert out.count("layer 1") == 1


@pytest.mark.parametrize(
    ("name", "settings"), [("dense", {"sparse_layers": []}), ("single", {"experts": 1, "top_k": 1, "gate": "token"})]
)
def test_where_there_is_nothing_to_choose(
    ragmoe: Any, small_city: Path, make_bundle: Any, name: str, settings: dict[str, Any]
) -> None:
    words = ("route", make_bundle(name, **settings), BRIDGE, "--index", small_city / "index")
    code, out, err = ragmoe(*words)
    assert (code, out.count("\n")) == (0, 1), err
    assert f"{name} sends every token through the same network: there is nothing for a gate to choose" in out
    code, out, _ = ragmoe(*words, "--json")
    found = json.loads(out)
    assert code == 0 and len(found["with_neighbours"]) == len(found["layers"])
    assert all(row == pytest.approx([1.0]) for row in found["with_neighbours"])


def test_with_all_experts_held_back_no_probability_is_left(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    bundle = make_bundle("retrieval", gate="retrieval", sparse_layers=[0, 1])
    without = [word for expert in range(4) for word in ("--without", expert)]
    code, out, err = ragmoe("route", bundle, BRIDGE, "--index", small_city / "index", "--json", *without)
    assert code == 0, err
    found = json.loads(out, parse_constant=pytest.fail)
    assert found["with_neighbours"] == found["without_neighbours"] == found["difference"] == [[0.0] * 4] * 2


def test_errors(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    dense = make_bundle("dense", sparse_layers=[])
    code, _, err = ragmoe("route", dense, BRIDGE, "--index", small_city / "none")
    assert code == 1
    assert "there is no index at" in err
    for question in ("", "\u200b", "caf\udce9?"):
        assert ragmoe("route", dense, question, "--index", small_city / "index")[0] == 2
    assert ragmoe("route", small_city / "none", BRIDGE, "--index", small_city / "index")[0] == 1


def test_experts_are_numbered_by_their_ids(ragmoe: Any, small_city: Path, make_bundle: Any) -> None:
    """As all other commands have them, also where one has left."""
    bundle = make_bundle("pruned", gate="retrieval", sparse_layers=[1])
    assert ragmoe("experts", "prune", bundle, 1)[0] == 0
    route = ("route", bundle, BRIDGE, "--index", small_city / "index")
    found = json.loads(ragmoe(*route, "--json")[1])
    assert found["expert_ids"] == [0, 2, 3] and len(found["experts"]) == 3
    heads = [line.split() for line in ragmoe(*route)[1].splitlines() if line.startswith("expert ")]
    assert heads == [["expert", "0", "2", "3"]] * 3
