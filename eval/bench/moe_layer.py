"""How fast the MoE layer is, in matrix-product FLOPs a second, against its peers.

    python eval/bench/moe_layer.py [--only REGEX] [--device cpu] [--out eval/results/moe_layer.json]

Each row is a rate and its ratio to a baseline of the same FLOPs, medians of interleaved runs, forward and
forward+backward:

* gated experts by our kernel, and by transformers' ``grouped_mm``, to transformers' own block (Mixtral's at D 384 / H
  1536, Qwen3-MoE's at D 1024 / H 512) with the very same weights and ``grouped_mm``;
* full experts to a dense network K times as wide, and to a loop over the experts;
* LoRA experts to the dense network they stand on, by FLOPs;
* 64 experts to 8.

The targets of the grid's small batches are those of transformers' block; S 4096 has the others. Takes about five
minutes on two cores. With ``--device cuda`` also the layer of Qwen3-30B-A3B by its share of the rate of a dense
product. Freed memory is kept, as by the program itself (ragmoe/_memory.py). What it does not do: the rest of a model
(gate_overhead.py has a whole step).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import product

import torch
from _device_layer import device_rows
from _layers import Case, Contender, check_equal, dense, full, gated, lora
from _result import row, table, write_result
from _timing import BOTH, FORWARD, Clock, chosen, options, passes, where_time_goes

from ragmoe._memory import keep_freed_memory

SHAPES = ((384, 1536), (1024, 512))
EXPERTS, TOP_K = (8, 64, 128), (1, 2, 8)
LARGE, SMALL = 4096, 512
SCALING = {FORWARD: 1 / 1.25, BOTH: 1 / 1.5}


def main() -> None:
    parser = options(__doc__, "moe_layer", rounds=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    clock = Clock(arguments.rounds, 0.0 if arguments.smoke else 6.0, arguments.device)
    rows, notes = [], []
    for case, everything in cases(arguments.device, arguments.smoke):
        if chosen(case, arguments.only):
            rows += compare(case, clock, everything)
            if everything and case.experts == 8:
                notes += [profiled(case, name, make(case)[name]) for name, make in {"ours": full, "LoRA": lora}.items()]
            gc.collect()
    for case in scaling_cases(arguments.device, arguments.smoke):
        if chosen(f"64 experts to 8: {case}", arguments.only):
            rows += scaling(case, clock)
            gc.collect()
    if arguments.device == "cuda" and chosen("the layer of Qwen3-30B-A3B", arguments.only):
        rows += device_rows(clock, Case(2048, 768, 128, 8, 32768, "bf16", "cuda"))
    write_result(arguments.out, "moe_layer", rows, text := "\n".join([report(rows), *notes]))
    print(text)


def cases(device: str, smoke: bool) -> Iterator[tuple[Case, bool]]:
    """The sizes, and whether everything is compared at it, or transformers' block and the dense network alone."""
    if smoke:
        yield Case(32, 64, 8, 2, 24, "fp32", device), True
        yield Case(32, 16, 8, 2, 24, "bf16", device), False
        return
    for (width, hidden), experts, dtype in product(SHAPES, (8, 64), ("fp32", "bf16")):
        yield Case(width, hidden, experts, 2, LARGE, dtype, device), True
    for (width, hidden), experts, top_k, dtype in product(SHAPES, EXPERTS, TOP_K, ("fp32", "bf16")):
        yield Case(width, hidden, experts, top_k, SMALL, dtype, device), False


def scaling_cases(device: str, smoke: bool) -> list[Case]:
    """Layers of 64 experts that are compared with the same of 8."""
    if smoke:
        return [Case(32, 64, 64, 2, 24, "fp32", device)]
    return [Case(*shape, 64, 2, LARGE, dtype, device) for shape, dtype in product(SHAPES, ("fp32", "bf16"))]


def compare(case: Case, clock: Clock, everything: bool) -> list[dict]:
    """The rows of one size."""
    contenders = {**full(case), **gated(case), **dense(case), **(lora(case) if everything else {})}
    x = case.input()
    check_equal(case, contenders, x)
    if not everything:
        del contenders["loop"], contenders["gated, grouped_mm"]
    elif case.experts > 8:
        # A loop over slices of a fused parameter makes a gradient of its full size for each: minutes.
        del contenders["loop"]
    rates = measured(contenders, x, clock)
    peer = 1.1 if case.tokens >= LARGE else 0.95
    # Not asked for where experts have a handful of tokens each, nor on another device.
    by_dense = 0.8 if (case.device, case.dtype, case.experts, case.tokens) == ("cpu", "bf16", 8, LARGE) else None
    comparisons = [
        ("gated", "transformers", "gated experts to transformers' block", peer),
        ("gated, grouped_mm", "transformers", "the same, both by grouped_mm", 0.95),
        ("ours", "dense", "full experts to dense", by_dense),
        ("ours", "loop", "full experts to a loop", None),
        ("LoRA", "LoRA's dense", "LoRA experts to their dense network", None),
    ]
    return [
        row(str(case), f"{what}, {way}", rates[a, way], baseline=rates[b, way], target=target, unit="GFLOP/s")
        for a, b, what, target in comparisons
        if a in contenders and b in contenders
        for way in (FORWARD, BOTH)
    ]


def scaling(case: Case, clock: Clock) -> list[dict]:
    """Many experts to few, at equal FLOPs."""
    few = Case(case.width, case.hidden, 8, case.top_k, case.tokens, case.dtype, case.device)
    rates = measured({"many": full(case)["ours"], "few": full(few)["ours"]}, case.input(), clock)
    return [
        row(str(case), f"64 experts to 8, {way}", rates["many", way], baseline=rates["few", way], target=target,
            unit="GFLOP/s")
        for way, target in SCALING.items()
    ]  # fmt: skip


def measured(contenders: dict[str, Contender], x: torch.Tensor, clock: Clock) -> dict[tuple[str, str], float]:
    """GFLOP a second of each, forward and forward+backward (three times the FLOPs)."""
    runs = {
        (name, way): run
        for name, contender in contenders.items()
        for way, run in passes(contender.module, contender.forward, x).items()
    }
    seconds = clock.medians(runs)
    times = {FORWARD: 1, BOTH: 3}
    return {key: contenders[key[0]].flops * times[key[1]] / took / 1e9 for key, took in seconds.items()}


def profiled(case: Case, name: str, contender: Contender) -> str:
    """Where the time of a layer goes, forward and backward, as Markdown."""
    run = passes(contender.module, contender.forward, case.input())[BOTH]
    kind = {"ours": "full experts", "LoRA": "LoRA experts"}[name]
    lines = where_time_goes(run, device=case.device)
    return f"## Where the time goes: {kind}, {case}\n\n{table(['operation', 'share', 'calls'], lines)}"


def report(rows: list[dict]) -> str:
    """Ratios as Markdown, a line a size and direction; those that miss their target say so."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for r in rows:
        what, way = r["metric"].rsplit(", ", 1)
        missed = f" (asked: {r['target']:.2f})" if r["ok"] is False else ""
        lines.setdefault((r["case"], way), {})[what] = f"{r['ratio']:.2f}{missed}"
    headers = list(dict.fromkeys(what for cells in lines.values() for what in cells))
    body = [[*key, *(cells.get(what, "") for what in headers)] for key, cells in lines.items()]
    return (
        "# The MoE layer\n\nRates to those of the peers, medians of interleaved runs. The rates themselves are in the "
        f"JSON.\n\n{table(['case', 'pass', *headers], body)}\nMade by `python eval/bench/moe_layer.py`.\n"
    )


if __name__ == "__main__":
    main()
