"""Experts on demand: hits with and without foresight, the most memory, and seconds a question, over a mixed stream.

    python eval/bench/experts_on_demand.py [--experts 64] [--questions 200] [--out eval/results/experts_on_demand.json]
    python eval/bench/experts_on_demand.py --model starter --index indexes/demo --ask 'data/*/dev.jsonl' [--out FILE]

The first is synthetic: a reader of random weights with E full experts in each of three layers, whose gates are set so
that the neighbours of each of 16 domains speak, by so many logits, for E/16 experts of its own, beside token states
that speak for any. Each question is of a domain drawn at random. Every measurement is a process of its own; all of them
must give the same outputs to the last bit, or the program fails. The second asks a real reader from an index, one
question after the other in a random order, and counts hits alone. What it does not do: say how well anything is
answered.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _result import row, table, write_result

from ragmoe import Index, Neighbours, load
from ragmoe.corpus import read_questions
from ragmoe.models import RagmoeBertConfig, RagmoeBertForQuestionAnswering

DOMAINS, NEIGHBOURS, ENCODER_WIDTH, PASSAGES, TOKENS, LAYERS = 16, 8, 64, 5, 128, 3
GATES = ("memory", "retrieval")
KINDS = ("ahead", "lru", "all")
_SYNTHETIC = (
    "Synthetic: random weights, gates set by hand. `asked for`: experts that a question needs in a layer. `ahead`: "
    "brought in by foresight, `LRU`: without it, `all`: every expert in memory; the outputs are equal in all of them. "
    "GB are above what the process had before the model was loaded: at most, and after the last question."
)


def main() -> None:
    arguments = parse()
    if arguments.build:
        build(arguments)
    elif arguments.measure:
        print(json.dumps(measure(arguments)))
    elif arguments.model:
        real(arguments)
    else:
        synthetic(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=384, help="of the model; experts are four times as wide")
    parser.add_argument("--resident", type=int, nargs="+", help="slots a layer; default E/4 and E/8")
    parser.add_argument("--logits", type=float, nargs="+", default=[4.0, 3.0], help="what the neighbours speak with")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1, help="processes of each kind")
    parser.add_argument("--scratch", type=Path, help="where the synthetic bundle is written and removed again")
    parser.add_argument("--model", help="a bundle, for the second form")
    parser.add_argument("--index", type=Path)
    parser.add_argument("--ask", nargs="+", help="question files or globs")
    parser.add_argument("--out", type=Path, default=Path("eval/results/experts_on_demand.json"))
    for hidden in ("--build", "--measure", "--gate", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


# -- the synthetic reader ---------------------------------------------------------------------------------------------


def own_experts(experts: int, layer: int) -> torch.Tensor:
    """Which experts are a domain's own in a layer, float32 (DOMAINS, E): another set in each layer."""
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(layer))
    mine = torch.zeros(DOMAINS, experts)
    for domain, chosen in enumerate(order.chunk(DOMAINS)):
        mine[domain, chosen] = 1.0
    return mine


def centres() -> torch.Tensor:
    """The middle of each domain's embeddings, unit vectors (DOMAINS, R)."""
    drawn = torch.randn(DOMAINS, ENCODER_WIDTH, generator=torch.Generator().manual_seed(99))
    return torch.nn.functional.normalize(drawn, dim=-1)


@torch.no_grad()
def build(arguments: argparse.Namespace) -> None:
    """Write the synthetic bundle."""
    torch.manual_seed(0)
    width, logits = arguments.width, arguments.logits[0]
    config = RagmoeBertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=2 * LAYERS, num_attention_heads=width // 32,
        intermediate_size=4 * width, max_position_embeddings=TOKENS, gate=arguments.gate, experts=arguments.experts,
        top_k=2, expert_kind="ffn", neighbour_width=ENCODER_WIDTH,
    )  # fmt: skip
    model = RagmoeBertForQuestionAnswering(config)
    for layer, moe in enumerate(model.moe_layers):
        # Token states are normalised, so that each of these logits has the deviation one.
        moe.gate.token.weight.normal_(std=width**-0.5)
        if arguments.gate == "memory":
            moe.gate.vote_scale.fill_(logits / 10 * arguments.experts / DOMAINS)
        else:
            attention = moe.gate.attention
            # A token's attention is about even over the neighbours and the null neighbour.
            found = attention.value(centres() * attention.scale) * NEIGHBOURS / (NEIGHBOURS + 1)
            wanted = logits * own_experts(arguments.experts, layer)
            moe.gate.context.weight.copy_(torch.linalg.lstsq(found, wanted).solution.T)
    model.save_pretrained(arguments.folder)


def stream(arguments: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """Questions of domains drawn at random, as ``forward`` takes them; one neighbour in eight is of another domain."""
    draw = torch.Generator().manual_seed(1)
    votes_MLE = torch.stack([own_experts(arguments.experts, layer) for layer in range(LAYERS)], dim=1)
    votes_MLE /= votes_MLE.sum(dim=-1, keepdim=True)
    for _ in range(arguments.questions):
        domain = torch.randint(DOMAINS, (1,), generator=draw).item()
        of_N = torch.full((NEIGHBOURS,), domain)
        of_N[-1] = torch.randint(DOMAINS, (1,), generator=draw)
        noise = torch.randn(NEIGHBOURS, ENCODER_WIDTH, generator=draw) / ENCODER_WIDTH**0.5
        embeddings = torch.nn.functional.normalize(centres()[of_N] + 0.5 * noise, dim=-1)
        scores = 0.5 + 0.05 * torch.rand(1, NEIGHBOURS, generator=draw)
        mask = torch.ones(1, NEIGHBOURS, dtype=torch.bool)
        neighbours = Neighbours(embeddings.unsqueeze(0), scores, mask, votes_BNLE=votes_MLE[of_N].unsqueeze(0))
        input_ids = torch.randint(1000, (PASSAGES, TOKENS), generator=draw)
        yield {"input_ids": input_ids, **neighbours.tensors()}


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read the stream in this process: seconds, memory, a digest of all outputs, and the store's summary."""
    # From here on the kernel counts the most memory anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    kind = arguments.measure
    model = load(arguments.folder, resident_experts=None if kind == "all" else arguments.resident[0])
    if model.expert_store is not None:
        model.expert_store.prefetching = kind == "ahead"
    digest, seconds = hashlib.sha256(), []
    for inputs in stream(arguments):
        begin = time.perf_counter()
        output = model(**inputs)
        seconds.append(time.perf_counter() - begin)
        digest.update(output.start_logits.numpy().tobytes())
    return {
        "seconds": median(seconds),
        "peak": (memory("VmHWM") - before) / 1e6,
        "steady": (memory("VmRSS") - before) / 1e6,
        "digest": digest.hexdigest(),
        "store": model.expert_store and model.expert_store.summary(),
    }


def memory(what: str) -> int:
    """Of this process, in kB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1])


def synthetic(arguments: argparse.Namespace) -> None:
    slots = arguments.resident or [arguments.experts // 4, arguments.experts // 8]
    rows: list[dict[str, Any]] = []
    lines: list[list[str]] = []
    for gate in GATES:
        for logits in arguments.logits:
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
                run(arguments, "--build", "yes", "--gate", gate, "--logits", str(logits), "--folder", folder)
                for resident in slots:
                    compare(arguments, folder, resident, f"{gate} gate, {logits:g} logits", rows, lines)
    heads = ["", "slots", "asked for", "hits ahead", "hits LRU", "read ahead, used", "MB a question ahead", "MB LRU"]
    heads += ["s ahead", "s LRU", "s all", "GB peak", "GB peak all", "GB after", "GB after all"]
    finish(arguments, rows, table(heads, lines), _SYNTHETIC)


def compare(
    arguments: argparse.Namespace, folder: str, resident: int, case: str, rows: list[dict], lines: list[list[str]]
) -> None:
    """Measure a bundle with so many slots: foresight, plain LRU, and all experts in memory, by turns."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind, values in found.items():
            done = run(arguments, "--measure", kind, "--folder", folder, "--resident", str(resident))
            values.append(json.loads(done))
            print(f"{case}, {resident} slots, {kind}: {values[-1]['seconds']:.3f} s a question", file=sys.stderr)
    if len({value["digest"] for values in found.values() for value in values}) > 1:
        sys.exit(f"error: {case}, {resident} slots: the outputs differ")
    ahead, lru = (found[kind][0]["store"] for kind in KINDS[:2])
    mb = [store["bytes_read"] / 1e6 / arguments.questions for store in (ahead, lru)]
    middle = {key: [median(v[key] for v in found[kind]) for kind in KINDS] for key in ("seconds", "peak", "steady")}
    name = f"{case}, {resident} of {arguments.experts}"
    rows.append(row(name, "hit rate", ahead["hit_rate"], baseline=lru["hit_rate"], target=None))
    rows.append(row(name, "read a question", mb[0], baseline=mb[1], target=None, unit="MB"))
    for key, unit in (("seconds", "s"), ("peak", "GB"), ("steady", "GB")):
        rows.append(row(name, key, middle[key][0], baseline=middle[key][2], target=None, unit=unit))
    used = f"{ahead['prefetched_used'] / max(1, ahead['prefetched']):.2f}"
    memories = [f"{middle[key][at]:.2f}" for key in ("peak", "steady") for at in (0, 2)]
    times = [f"{seconds:.3f}" for seconds in middle["seconds"]]
    hits = [f"{store['hit_rate']:.3f}" for store in (ahead, lru)]
    asked = (lru["hits"] + lru["misses"]) / arguments.questions / LAYERS
    lines.append([case, str(resident), f"{asked:.1f}", *hits, used, *(f"{x:.1f}" for x in mb), *times, *memories])


def run(arguments: argparse.Namespace, *words: str) -> str:
    """This program again, in a process of its own; later words win over earlier ones."""
    common = {"experts": arguments.experts, "width": arguments.width, "questions": arguments.questions}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in common.items()), *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


# -- a real reader ----------------------------------------------------------------------------------------------------


def real(arguments: argparse.Namespace) -> None:
    index = Index.open(arguments.index)
    files = [file for pattern in arguments.ask for file in sorted(glob.glob(pattern))]
    questions = [question.question for file in files for question in read_questions(file)]
    random.Random(0).shuffle(questions)
    questions = questions[: arguments.questions]
    experts = load(arguments.model).config.experts
    rows, lines = [], []
    for resident in arguments.resident or [experts // 2, experts // 4]:
        found = {}
        for ahead in (True, False):
            model = load(arguments.model, resident_experts=resident)
            model.expert_store.prefetching = ahead
            answers = [model.answer([question], index)[0].text for question in questions]
            found[ahead] = (model.expert_store.summary(), answers)
        (with_it, one), (without, other) = found[True], found[False]
        if one != other:
            sys.exit(f"error: {resident} slots: the answers differ")
        case = f"{arguments.model}, {resident} of {experts}"
        rows.append(row(case, "hit rate", with_it["hit_rate"], baseline=without["hit_rate"], target=None))
        used = f"{with_it['prefetched_used'] / max(1, with_it['prefetched']):.2f}"
        mb = [f"{store['bytes_read'] / 1e6 / len(questions):.2f}" for store in (with_it, without)]
        lines.append([case, f"{with_it['hit_rate']:.3f}", f"{without['hit_rate']:.3f}", used, *mb])
    heads = ["", "hits ahead", "hits LRU", "read ahead, used", "MB a question ahead", "MB LRU"]
    finish(arguments, rows, table(heads, lines), f"{len(questions)} questions of {len(files)} files in a random order.")


def finish(arguments: argparse.Namespace, rows: list[dict[str, Any]], text: str, note: str) -> None:
    made = " ".join(["python eval/bench/experts_on_demand.py", *sys.argv[1:]])
    report = f"# Experts on demand\n\nMade by `{made}`\n\n{note}\n\n{text}"
    write_result(arguments.out, "experts_on_demand", rows, report)
    print(text)


if __name__ == "__main__":
    main()
