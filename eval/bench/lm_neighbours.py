"""Do the neighbours of the text before a chunk tell the chunk's domain, and from how many tokens on?

    python eval/bench/lm_neighbours.py --data DIR [--index indexes/lm] [--code runs/lm/code] [--chunks 60]

Cuts the `valid` documents of the six domains of eval/experiments/lm_domains.yaml in chunks of several lengths, and
retrieves for some of each domain (drawn with seed 0) what a language model is shown: the neighbours of the chunk
before, leaks held back; of one length also the best of what several chunks before it retrieve. By row: the share of
neighbours that are of the chunk's domain, the share of chunks whose domain most of the neighbours have (weighted as
their votes are), and the share of all tokens that are in such chunks: the first chunk of a document has no neighbours.
As a control that searches nothing, the share of chunks whose domain a linear classifier names by the embedding of the
same text: a ridge regression on the embeddings of all passages. What it does not do: say what that is worth, which the
experiment does.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from _lm_data import DOMAINS, valid_files
from _result import row, table, write_result
from transformers import AutoTokenizer

from ragmoe._ridge import ridge
from ragmoe.corpus import read_documents
from ragmoe.corpus.leaks import LeakGuard
from ragmoe.gates.attention import weigh
from ragmoe.gates.memory import TEMPERATURE
from ragmoe.index import Index
from ragmoe.training.config import LanguageConfig
from ragmoe.training.language import LanguageDataset
from ragmoe.training.retrieved import CACHE_NAME

# Tokens of a chunk, and how many of the chunks before it are queries.
ROWS = ((16, 1), (32, 1), (64, 1), (128, 1), (128, 2), (128, 4), (128, 8), (256, 1))
NEIGHBOURS = 8
METRICS = ("of the domain", "voted into it", "tokens voted into it", "classified into it")


class Classifier:
    """Names the domain of an embedding: a ridge regression on those of an index's passages, (P, R) and (P, D)."""

    def __init__(self, index: Index, domains: list[str]) -> None:
        self.names = sorted(set(domains))
        x_PR = torch.from_numpy(np.asarray(index.embeddings, dtype=np.float32))
        y_PD = torch.from_numpy(np.array(domains)[:, None] == np.array(self.names))
        self.weight_DR, self.offset_D = ridge([(x_PR, y_PD)])

    def __call__(self, embedding_R: np.ndarray) -> str:
        scores_D = torch.from_numpy(embedding_R) @ self.weight_DR.T + self.offset_D
        return self.names[int(scores_D.argmax())]


def judge(
    dataset: LanguageDataset, chunks: int, domain_of: dict[str, str], classify: Classifier
) -> dict[str, tuple[float, ...]]:
    """For each domain the shares of METRICS: of neighbours, of chunks, of tokens and of chunks again."""
    places: dict[str, list[int]] = defaultdict(list)
    tokens: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for at, chunk in enumerate(dataset.chunks):
        domain = dataset.documents[chunk.document].domain
        tokens[domain][0] += len(chunk.ids)
        if chunk.number:
            places[domain].append(at)
            tokens[domain][1] += len(chunk.ids)
    drawn = {name: random.Random(0).sample(of, min(chunks, len(of))) for name, of in places.items()}
    dataset.retrieve([at for of in drawn.values() for at in of])
    found = {}
    for name, of in drawn.items():
        shares, votes, named = [], [], []
        for at in of:
            neighbours = dataset.neighbours(at)
            assert neighbours is not None
            own = np.array([domain_of[passage] == name for passage in neighbours.passage_ids[0]])
            weights = weigh(neighbours, TEMPERATURE)[0][neighbours.mask_BN[0]].numpy()
            totals: dict[str, float] = defaultdict(float)
            for passage, weight in zip(neighbours.passage_ids[0], weights, strict=True):
                totals[domain_of[passage]] += float(weight)
            shares.append(own.mean())
            votes.append(max(totals, key=totals.__getitem__) == name)
            queries = min(dataset.config.queries, dataset.chunks[at].number)
            asked = [dataset.query(place) for place in range(at - queries + 1, at + 1)]
            named.append(classify(dataset.index.encode(asked).mean(axis=0)) == name)
        voted = float(np.mean(votes))
        in_tokens = voted * tokens[name][1] / tokens[name][0]
        found[name] = (float(np.mean(shares)), voted, in_tokens, float(np.mean(named)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one folder a domain (or RAGMOE_DATA)")
    parser.add_argument("--code", type=Path, default=Path("runs/lm/code"), help="folder of the domain of code")
    parser.add_argument("--index", type=Path, default=Path("indexes/lm"))
    parser.add_argument("--base", type=Path, default=Path("runs/lm/base"), help="whose tokens are counted")
    parser.add_argument("--chunks", type=int, default=60, help="of each domain and length")
    parser.add_argument("--out", type=Path, default=Path("eval/results/lm_neighbours.json"))
    arguments = parser.parse_args()
    documents = list(read_documents(valid_files(arguments.data, arguments.code)))
    index, tokenizer = Index.open(arguments.index), AutoTokenizer.from_pretrained(arguments.base)
    passages = list(index.iterate())
    domain_of = {passage.id: passage.domain for passage in passages}
    classify = Classifier(index, [passage.domain for passage in passages])
    guard = LeakGuard(documents, passages)
    rows, lines = [], []
    for length, queries in ROWS:
        config = LanguageConfig(chunk_tokens=length, queries=queries, neighbours=NEIGHBOURS)
        dataset = LanguageDataset(documents, None, tokenizer, config, cache=arguments.out.parent)
        # Only now, and for a few: given at once, it would retrieve for all chunks.
        dataset.index, dataset.guard, dataset.cache = index, guard, index.folder / CACHE_NAME
        found = judge(dataset, arguments.chunks, domain_of, classify)
        found["mean"] = tuple(float(np.mean([of[i] for of in found.values()])) for i in range(len(METRICS)))
        label = f"{length} tokens" if queries == 1 else f"{length} tokens, {queries} queries"
        for name, values in found.items():
            for metric, value in zip(METRICS, values, strict=True):
                rows.append(row(f"{label}, {name}", metric, value, baseline=None, target=None))
        lines.append(
            [
                str(length),
                str(queries),
                *(" / ".join(f"{value:.2f}" for value in found[name]) for name in (*DOMAINS, "mean")),
            ]
        )
        print(f"{label}: {found['mean']}", flush=True)
    report = (
        "# What the neighbours of the text before tell of a chunk's domain\n\n"
        f"{NEIGHBOURS} neighbours of {len(index):,} passages of six domains, retrieved by as many tokens before a "
        "chunk as it has, or the best of what so many such queries retrieve; up to "
        f"{arguments.chunks} chunks of each domain's `valid` documents. Share of neighbours of "
        "the chunk's domain / share of chunks whose domain most neighbours have, weighted as votes are / share of all "
        "tokens that are in such chunks (the first chunk of a document has no neighbours) / share of chunks whose "
        "domain a ridge regression on the embeddings of the passages names, of the mean embedding of the queries: "
        "nothing is searched for that.\n\n"
        + table(["tokens", "queries", *DOMAINS, "mean"], lines)
        + "\nMade by `python eval/bench/lm_neighbours.py --data DIR`.\n"
    )
    write_result(arguments.out, "lm_neighbours", rows, report)
    print(report)


if __name__ == "__main__":
    main()
