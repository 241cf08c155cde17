"""In which layers of a language model does its gate need the neighbours?

    python eval/bench/lm_layers.py BUNDLE --data DIR [--share 0.25] [--index indexes/lm] [--code runs/lm/code]

Measures a trained model on a share of the `valid` documents of the six domains of eval/experiments/lm_domains.yaml
(drawn with seed 0): with the neighbours shown to all gates; with one layer's gate shown none, as if nothing had been
found; and with one layer's gate alone shown them. Differences of perplexity in per cent with 95 % intervals over
documents. What it does not do: train models with a gate in some layers only (`model.sparse_layers`).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _lm_data import valid_files
from _result import row, table, write_result
from torch import nn
from transformers import AutoTokenizer

from ragmoe import load_decoder
from ragmoe.corpus import read_documents
from ragmoe.evaluation.perplexity import compare_perplexity, document_losses, perplexity
from ragmoe.index import Index
from ragmoe.training.config import load_config
from ragmoe.training.language import LanguageDataset
from ragmoe.training.language_expert import recalling
from ragmoe.training.retrieved import CACHE_NAME


@contextmanager
def withheld(model: Any, layers: Collection[int]) -> Iterator[None]:
    """Show the gates of these sparse layers no neighbours."""

    def none(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0], None, *given[2:])

    hooks = [gate.register_forward_pre_hook(none) for at, gate in enumerate(model.gates) if at in layers]
    yield
    for hook in hooks:
        hook.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a language model whose gate sees neighbours, trained by ragmoe")
    parser.add_argument("--data", type=Path, help="folder with one folder a domain (or RAGMOE_DATA)")
    parser.add_argument("--code", type=Path, default=Path("runs/lm/code"), help="folder of the domain of code")
    parser.add_argument("--index", type=Path, default=Path("indexes/lm"))
    parser.add_argument("--share", type=float, default=0.25, help="of each domain's documents")
    parser.add_argument("--out", type=Path, default=Path("eval/results/lm_layers.json"))
    arguments = parser.parse_args()
    documents = []
    for file in valid_files(arguments.data, arguments.code):
        of_domain = list(read_documents([file]))
        documents += random.Random(0).sample(of_domain, max(2, round(arguments.share * len(of_domain))))
    model, index = load_decoder(arguments.bundle), Index.open(arguments.index)
    language = load_config(arguments.bundle / "training.yaml").language
    data = LanguageDataset(
        documents,
        index,
        AutoTokenizer.from_pretrained(arguments.bundle),
        language,
        cache=index.folder / CACHE_NAME,
        recall=recalling(model, index),
    )
    layers = range(len(model.gates))
    cases = {"none": (), "all": layers}
    cases |= {f"layer {model.sparse_layers[at]}": (at,) for at in layers}
    cases |= {f"all but layer {model.sparse_layers[at]}": [other for other in layers if other != at] for at in layers}
    losses, rows, lines = {}, [], []
    for case, of in cases.items():
        with withheld(model, of):
            losses[case] = document_losses(model, data)
        print(f"withheld from {case}: {perplexity(losses[case]).mean:.3f}", flush=True)
    for case in list(cases)[1:]:
        change = compare_perplexity([losses[case]], [losses["none"]])
        rows.append(row(f"withheld from {case}", "perplexity", change.difference, baseline=None, target=None, unit="%"))
        lines.append([case, f"{change.difference:+.2f}", f"[{change.low:+.2f}, {change.high:+.2f}]"])
    report = (
        "# In which layers the gate needs the neighbours\n\n"
        f"`{arguments.bundle}`, {len(documents)} `valid` documents, {sum(loss.tokens for loss in losses['none']):,} "
        "tokens. By how many per cent the perplexity is higher where the neighbours are withheld from the gates of "
        "some layers, with its 95 % interval.\n\n"
        + table(["withheld from", "%", "95 % interval"], lines)
        + f"\nMade by `python eval/bench/lm_layers.py {arguments.bundle} --data DIR --share {arguments.share}`.\n"
    )
    write_result(arguments.out, "lm_layers", rows, report)
    print(report)


if __name__ == "__main__":
    main()
