"""Which loss makes a gate's choices flatter, and which sharper: at the start of a training, and after it.

    python eval/bench/gate_losses.py --data DIR [--arm retrieval_slow] [--batches 4]

Takes an arm of eval/experiments/lm_domains.yaml as it starts and, where it has been trained, as it ended. Of each
loss, with its weight, over the arm's first batches: the norm of its gradient in the gates' parameters, and its pull on
the entropy, which is how much of minus that gradient points where the mean entropy of the gates' choices grows fastest:
above zero it flattens. What it does not do: say how far Adam goes, which divides each step by the size of gradients.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from _lm_data import data_folder
from _result import row, table, write_result
from torch import Tensor

from ragmoe.evaluation.experiment import load_experiment
from ragmoe.gates import Routing
from ragmoe.moe import load_balance_loss, z_loss
from ragmoe.training.config import TrainingConfig
from ragmoe.training.run import AnyRun, prepare
from ragmoe.training.trainer import part_of

LOSSES = ("language", "balance", "z")


def entropy(routings: Sequence[Routing], mask_S: Tensor) -> Tensor:
    """Of the gates' choices, in nats: the mean over tokens and layers."""
    log_SEs = [routing.logits_SE.log_softmax(dim=-1)[mask_S] for routing in routings]
    return torch.stack([-(log_SE.exp() * log_SE).sum(dim=1).mean() for log_SE in log_SEs]).mean()


def pulls(run: AnyRun, batches: int) -> tuple[float, dict[str, tuple[float, float]]]:
    """The entropy, and of each loss the gradient's norm and its pull on the entropy."""
    model = run.model.train()
    gates = [parameter for name, parameter in model.named_parameters() if part_of(name) == "gate"]
    size, found, level = run.config.train.batch_size, dict.fromkeys(("entropy", *LOSSES), 0.0), 0.0
    for at in range(batches):
        batch = run.collator([run.dataset[i] for i in range(at * size, (at + 1) * size)])
        output, mask_S = model(**batch), batch["attention_mask"].reshape(-1).bool()
        routings = output["routings"]
        values = {
            "entropy": entropy(routings, mask_S),
            "language": output["loss"] if output.get("language_loss") is None else output["language_loss"],
            "balance": model.config.balance_loss * sum(load_balance_loss(r, mask_S) for r in routings) / len(routings),
            "z": model.config.z_loss * sum(z_loss(r, mask_S) for r in routings) / len(routings),
        }
        level += values["entropy"].item() / batches
        for name, value in values.items():
            gradients = torch.autograd.grad(value, gates, retain_graph=True, materialize_grads=True, allow_unused=True)
            found[name] = found[name] + torch.cat([gradient.flatten() for gradient in gradients]) / batches
    uphill = found.pop("entropy")
    uphill = uphill / uphill.norm()
    return level, {name: (float(of.norm()), -float(uphill @ of)) for name, of in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one folder a domain (or RAGMOE_DATA)")
    parser.add_argument("--arm", default="retrieval_slow")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--runs", type=Path, default=Path("runs/lm_domains"), help="the experiment's folder of arms")
    parser.add_argument("--out", type=Path, default=Path("eval/results/gate_losses.json"))
    arguments = parser.parse_args()
    os.environ["RAGMOE_DATA"] = str(data_folder(arguments.data))
    config = load_experiment(Path("eval/experiments/lm_domains.yaml")).training(arguments.arm, 0, Path("indexes/lm"))
    cases: dict[str, TrainingConfig] = {"at the start": config}
    if (trained := arguments.runs / arguments.arm / "seed-0" / "bundle").is_dir():
        learned = config.train.model_copy(update={"context_start": None})
        changes = {"base": str(trained), "model": {}, "train": learned}
        cases["after training"] = config.model_copy(update=changes)
    rows, lines = [], []
    for case, of in cases.items():
        level, losses = pulls(prepare(of, cache=arguments.runs / "cache"), arguments.batches)
        rows.append(row(case, "entropy", level, baseline=None, target=None, unit="nats"))
        for name, (norm, pull) in losses.items():
            for metric, value in (("gradient", norm), ("pull on entropy", pull)):
                rows.append(row(f"{case}, {name}", metric, value, baseline=None, target=None, unit="norm"))
        cells = [f"{norm:.4f} / {pull:+.4f}" for norm, pull in losses.values()]
        lines.append([case, f"{level:.2f}", *cells])
        print(lines[-1], flush=True)
    report = (
        f"# What flattens the gates of `{arguments.arm}`\n\n"
        "Mean entropy of the gates' choices in nats; then of each loss, with its weight, the norm of its gradient in "
        "the gates' parameters / how much of minus that gradient points where the entropy grows fastest (above zero it "
        f"flattens). The first {arguments.batches} batches of the arm in eval/experiments/lm_domains.yaml, seed 0.\n\n"
        + table(["", "entropy", *LOSSES], lines)
        + "\nMade by `python eval/bench/gate_losses.py --data DIR`.\n"
    )
    write_result(arguments.out, "gate_losses", rows, report)
    print(report)


if __name__ == "__main__":
    main()
