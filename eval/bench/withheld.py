"""Why does a reader withhold more once an expert was added: what moves the score that no answer is there?

    python eval/bench/withheld.py --bundle DIR [--bundle DIR] --expert NAME --data DIR [--index indexes/nine]

Of each reader reads dev questions of the seven core domains, which the expert is not for, over their gold passages,
with the expert and with the expert held back, and compares the no-answer scores. A reader finds that score at [CLS]:
questions are told apart by the sparse layers in which [CLS] calls the expert, and the change of the score is set
against the weight of the expert there and against the share of all tokens that call it. Questions of one sequence
alone; bundles are made by eval/experiments/starter_both.yaml. What it does not do: say whether it is right to withhold,
which tasks of the setting `rejection` do.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _result import row, table, write_result
from _retrieval_data import data_folder, dev_questions

from ragmoe import Index, load
from ragmoe.evaluation.task import subset

IN_NONE, ELSEWHERE, IN_LAST = "in no layer", "in others, not in the last", "in the last layer"


@dataclass(frozen=True)
class Change:
    """Of one question: where [CLS] calls the expert, with which weight in the last layer, how many tokens do, the
    no-answer score with the expert less that without, and whether an answer was given without it and with it."""

    calls: str
    weight: float
    tokens: float
    shift: float
    before: bool
    live: bool


@torch.no_grad()
def changes(bundle: Path, expert: str, index: Index, data: Path, count: int) -> list[Change]:
    """The change of every question that is read as one sequence."""
    live = load(bundle)
    place = live.expert_names.index(expert)
    masked = load(bundle, experts=[name for name in live.expert_names if name != expert])
    asked = subset([q for of in dev_questions(data).values() for q in of if q.answers and q.gold_ids], count)
    found = []
    for question in asked:
        passages = [index.passages(question.gold_ids)]
        seen = index.neighbours([question.question], live.config.neighbours)
        inputs = list(live.batches([question.question], passages, live.recall(seen, index, [question.domain])))
        if len(inputs) > 1 or len(inputs[0]["input_ids"]) > 1:
            continue
        weights_LT, calls_LT = [], []
        for routing in live(**inputs[0]).routings:
            own_SK = routing.experts_SK == place
            weights_LT.append((own_SK * routing.weights_SK).sum(dim=1))
            calls_LT.append(own_SK.any(dim=1))
        calls_L = [bool(calls_T[0]) for calls_T in calls_LT]
        answers = [
            model.read([question.question], passages, model.recall(seen, index, [question.domain]))[0]
            for model in (masked, live)
        ]
        found.append(
            Change(
                calls=IN_LAST if calls_L[-1] else ELSEWHERE if any(calls_L) else IN_NONE,
                weight=float(weights_LT[-1][0]),
                tokens=float(torch.stack(calls_LT).float().mean()),
                shift=answers[1].no_answer_score - answers[0].no_answer_score,
                before=answers[0].answered,
                live=answers[1].answered,
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, action="append", required=True, help="a reader with an added expert")
    parser.add_argument("--expert", required=True, help="its name")
    parser.add_argument("--data", type=Path, help="folder with one folder a domain (or RAGMOE_DATA)")
    parser.add_argument("--index", type=Path, default=Path("indexes/nine"))
    parser.add_argument("--questions", type=int, default=30, help="of each domain at most")
    parser.add_argument("--out", type=Path, default=Path("eval/results/withheld.json"))
    arguments = parser.parse_args()
    index, data = Index.open(arguments.index), data_folder(arguments.data)
    rows, parts = [], []
    for bundle in arguments.bundle:
        own, part = told(bundle, changes(bundle, arguments.expert, index, data, arguments.questions))
        rows, parts = [*rows, *own], [*parts, part]
    bundles = " ".join(f"--bundle {bundle}" for bundle in arguments.bundle)
    report = (
        f"# What an added expert does to the no-answer score of other domains' questions: {arguments.expert}\n\n"
        "Dev questions of seven domains that the expert is not for, each with its gold passage as one sequence, read "
        "with the expert and with it held back. Change: the no-answer score with it less that without, mean ± standard "
        "deviation; an answer is given where the score is below the threshold.\n\n"
        + "\n".join(parts)
        + f"\nMade by `python eval/bench/withheld.py {bundles} --expert {arguments.expert} --data DIR`.\n"
    )
    write_result(arguments.out, "withheld", rows, report)
    print(report)


def told(bundle: Path, found: list[Change]) -> tuple[list[dict[str, Any]], str]:
    """What was found of one reader, as rows and as text."""
    rows, lines = [], []
    for name in (IN_NONE, ELSEWHERE, IN_LAST):
        if not (own := [change for change in found if change.calls == name]):
            continue
        shifts = np.array([change.shift for change in own])
        tokens, before, live = (100 * np.mean([getattr(c, key) for c in own]) for key in ("tokens", "before", "live"))
        for metric, value, unit in (
            ("questions", len(own), "questions"),
            ("tokens that call it", tokens / 100, "share"),
            ("change of the no-answer score", shifts.mean(), "logits"),
            ("its standard deviation", shifts.std(), "logits"),
            ("answered without it", before / 100, "share"),
            ("answered with it", live / 100, "share"),
        ):
            case = f"{bundle}: [CLS] calls it {name}"
            rows.append(row(case, metric, float(value), baseline=None, target=None, unit=unit))
        cells = [f"{tokens:.1f} %", f"{shifts.mean():+.2f} ± {shifts.std():.2f}", f"{before:.0f} %", f"{live:.0f} %"]
        lines.append([name, str(len(own)), *cells])
    said = []
    shifts = np.array([change.shift for change in found])
    for key, words in (
        ("weight", "its weight at [CLS] in the last sparse layer"),
        ("tokens", "the tokens that call it"),
    ):
        values = np.array([getattr(change, key) for change in found])
        correlation = float(np.corrcoef(values, shifts)[0, 1]) if values.std() and shifts.std() else float("nan")
        rows.append(
            row(f"{bundle}: correlation with the change", words, correlation, baseline=None, target=None, unit="r")
        )
        said.append(f"{correlation:.2f} with {words}")
    heads = ["[CLS] calls it", "questions", "tokens that do", "change", "answered without", "with"]
    text = f"`{bundle}`, {len(found)} questions; correlation of the change over all: {' and '.join(said)}.\n\n"
    return rows, text + table(heads, lines)


if __name__ == "__main__":
    main()
