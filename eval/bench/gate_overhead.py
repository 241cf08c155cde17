"""What the retrieval gate costs beside the token gate: the same layer, and a whole training step.

    python eval/bench/gate_overhead.py [--only REGEX] [--out eval/results/gate_overhead.json]

On MiniLM's shape (D 384, H 1536, six layers, three of them sparse, 8 experts, 2 a token), 24 sequences of 256 tokens,
two a question, 16 neighbours of width 384: tokens a second with the retrieval gate to those with the token gate,
medians of interleaved runs. At most 3 % of the layer, forward and backward, and 5 % of the step, which has forward,
backward and the optimiser. Takes about a minute and a half on two cores. What it does not do: count the search for the
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _layers import DTYPES, Case, our_layer
from _result import row, table, write_result
from _timing import Clock, Run, chosen, options, passes
from torch import Tensor, nn
from torch.nn import functional as F

from ragmoe import Neighbours
from ragmoe._memory import keep_freed_memory
from ragmoe.experts import FeedForward
from ragmoe.models import RagmoeBertConfig, RagmoeBertForQuestionAnswering

GATES = ("retrieval", "token")
LAYER, STEP = 1 / 1.03, 1 / 1.05
# What is timed, by gate and pass.
Runs = dict[str, dict[str, Run]]


@dataclass(frozen=True)
class Sizes:
    """Of a batch, and of the model that reads it."""

    sequences: int = 24
    positions: int = 256
    width: int = 384
    hidden: int = 1536
    layers: int = 6
    vocabulary: int = 30522
    neighbours: int = 16
    neighbour_width: int = 384

    @property
    def tokens(self) -> int:
        return self.sequences * self.positions


SMOKE = Sizes(
    sequences=4, positions=16, width=32, hidden=64, layers=2, vocabulary=200, neighbours=3, neighbour_width=24
)


def main() -> None:
    arguments = options(__doc__, "gate_overhead", rounds=15).parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    sizes = SMOKE if arguments.smoke else Sizes()
    clock = Clock(arguments.rounds, 0.0 if arguments.smoke else 20.0)
    kinds: list[tuple[str, float, Callable[[], Runs]]] = [
        ("layer of LoRA experts", LAYER, lambda: layers(sizes, "lora", "fp32")),
        ("layer of full experts", LAYER, lambda: layers(sizes, "ffn", "fp32")),
        ("layer of full experts, bf16", LAYER, lambda: layers(sizes, "ffn", "bf16")),
        ("training step, LoRA experts", STEP, lambda: {g: {"step": step(sizes, g)} for g in GATES}),
    ]
    rows = []
    for case, target, make in kinds:
        if chosen(case, arguments.only):
            runs = make()
            seconds = clock.medians({(gate, way): run for gate in GATES for way, run in runs[gate].items()})
            for way in runs["token"]:
                ours, theirs = (sizes.tokens / seconds[gate, way] for gate in GATES)
                rows.append(row(case, way, ours, baseline=theirs, target=target, unit="tokens/s"))
    lines = [
        [r["case"], r["metric"], f"{r['value']:,.0f}", f"{r['baseline']:,.0f}", f"{1 / r['ratio'] - 1:+.1%}",
         f"{1 / r['target'] - 1:.0%}"]
        for r in rows
    ]  # fmt: skip
    headers = ["", "pass", "retrieval gate, tokens/s", "token gate, tokens/s", "more time", "at most"]
    text = (
        f"# What the retrieval gate costs\n\n{table(headers, lines)}\nMade by `python eval/bench/gate_overhead.py`.\n"
    )
    write_result(arguments.out, "gate_overhead", rows, text)
    print(text)


def some_neighbours(sizes: Sizes) -> Neighbours:
    """Neighbours of as many questions as there are pairs of sequences."""
    B, N = sizes.sequences // 2, sizes.neighbours
    embeddings_BNR = F.normalize(torch.randn(B, N, sizes.neighbour_width), dim=-1)
    return Neighbours(embeddings_BNR, torch.rand(B, N), torch.ones(B, N, dtype=torch.bool))


def layers(sizes: Sizes, kind: str, dtype: str) -> Runs:
    """One layer with each gate; of LoRA experts with the dense network they stand on."""
    case = Case(sizes.width, sizes.hidden, 8, 2, sizes.tokens, dtype)
    found, x = some_neighbours(sizes), case.input()
    network = nn.Sequential(nn.Linear(sizes.width, sizes.hidden), nn.Linear(sizes.hidden, sizes.width))
    network.to(DTYPES[dtype])
    dense = FeedForward(network[0], F.gelu, network[1]) if kind == "lora" else None
    made = {}
    for gate in GATES:
        layer = our_layer(case, gate=gate, expert_kind=kind, neighbour_width=sizes.neighbour_width)
        # As one module, so that gradients of the network do not pile up.
        made[gate] = passes(nn.ModuleList([layer, network]), _forward(layer, dense, found), x)
    return made


def _forward(layer: Any, dense: FeedForward | None, found: Neighbours) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, dense, found)[0]


def step(sizes: Sizes, gate: str) -> Run:
    """A training step of a reader: forward, losses, backward, AdamW."""
    config = RagmoeBertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // 32 or 1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        gate=gate,
        neighbour_width=sizes.neighbour_width,
    )
    model = RagmoeBertForQuestionAnswering(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = torch.randint(sizes.vocabulary, (sizes.sequences, sizes.positions))
    place = torch.full((sizes.sequences // 2, 2), 8)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **some_neighbours(sizes).tensors()}

    def run() -> None:
        optimiser.zero_grad(set_to_none=True)
        model(**inputs, start_positions=place, end_positions=place).loss.backward()
        optimiser.step()

    return run


if __name__ == "__main__":
    main()
