"""``ragmoe plan``: what a model would cost, before it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ragmoe.cli._output import OVERRIDES, OVERRIDES_HELP, JsonOption, print_json, print_tables

if TYPE_CHECKING:
    from ragmoe.evaluation.tables import Table
    from ragmoe.models.plan import Plan

PLAN_EXAMPLES = """Examples:

  ragmoe plan eval/experiments/halvern.yaml model.experts=64
  ragmoe plan starter --length 384 --batch 8
  ragmoe plan models/mixtral/config.json num_local_experts=16 --dtype bf16 --expert-parallel 8"""


def plan(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A training file, a bundle, a folder with a config.json, or a YAML file with a model_type and fields.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=OVERRIDES,
            help=f"Keys of the training file, or fields of the model, to change; {OVERRIDES_HELP}",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences of a batch.", show_default="the file's, or 1")
    ] = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of a sequence.", show_default="the file's, or 2048")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="fp32 or bf16.", show_default="the file's, or fp32")
    ] = None,
    expert_parallel: Annotated[
        int | None, typer.Option(metavar="N", help="Share the experts out over N ranks.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Count parameters, FLOPs, memory and communication of a model, without making it."""
    from ragmoe.models.plan import plan as count

    found = count(config, overrides or [], batch=batch, length=length, dtype=dtype, expert_parallel=expert_parallel)
    if as_json:
        print_json(found.as_dict())
    else:
        print_tables(_tables(found))


def _tables(plan: Plan) -> list[Table]:
    tables = [_parameters(plan), _memory(plan)]
    return [*tables, _communication(plan)] if plan.communication else tables


def _parameters(plan: Plan) -> Table:
    from ragmoe.evaluation.tables import NONE, Table

    flops, counts = plan.flops, plan.parameters_by_kind
    kinds = [*counts, *(kind for kind in flops.by_kind if kind not in counts)]
    rows = [[kind, f"{counts[kind]:,}" if kind in counts else NONE, _amount(flops.by_kind.get(kind))] for kind in kinds]
    rows.append(["all", f"{plan.parameters['total']:,}", _amount(flops.forward)])
    rows.append(["active for a token", f"{plan.parameters['active']:,}", ""])
    rows.append(["trained", f"{plan.parameters['trained']:,}", ""])
    rows.append(["forward and backward", "", _amount(flops.forward + flops.backward)])
    sparse = f", {plan.sparse_layers} of them with {plan.experts} experts, {plan.top_k} a token" if plan.experts else ""
    note = f"FLOPs of one token among {plan.length:,}."
    if flops.per_question:
        note += f" Once a question, for its neighbours: {_amount(flops.per_question)}."
    title = f"{plan.source}: {plan.model_type}, {plan.layers} layers of width {plan.width:,}{sparse}"
    return Table(title, ["", "parameters", "FLOPs of a token"], rows, note=" ".join([note, *plan.notes]))


def _memory(plan: Plan) -> Table:
    from ragmoe.evaluation.tables import NONE, Table

    m = plan.memory
    rows = [
        ["weights", _bytes(m.weights), _bytes(m.weights)],
        ["gradients", _bytes(m.gradients), _bytes(m.gradients)],
        ["AdamW's moments (fp32)", _bytes(m.moments), _bytes(m.moments)],
        ["master weights (fp32)", _bytes(m.master) if m.master else NONE, _bytes(m.master) if m.master else NONE],
        ["activations, about", _bytes(m.activations), _bytes(m.checkpointed)],
        ["training", _bytes(m.training), _bytes(m.training_checkpointed)],
    ]
    title = f"Memory of training in {plan.dtype}, {plan.batch:,} x {plan.length:,} tokens a batch"
    return Table(title, ["", "all kept", "with checkpointing"], rows)


def _communication(plan: Plan) -> Table:
    from ragmoe.evaluation.tables import Table

    c = plan.communication
    assert c is not None
    rows = [
        ["experts of a layer, a rank", f"{c.experts_per_rank:,}"],
        ["parameters, a rank", f"{c.parameters_per_rank:,}"],
        ["weights, a rank", _bytes(c.weight_bytes_per_rank)],
        ["a token and layer, forward", _bytes(c.forward)],
        ["a token and layer, backward", _bytes(c.backward)],
        ["a token, all layers, both", _bytes(c.per_token)],
        ["a rank's batch, all layers, both", _bytes(c.per_step)],
    ]
    note = "All-to-all: to the experts and back. Everything but the experts is on every rank."
    return Table(f"Expert parallelism over {c.ranks:,} ranks", ["", "each"], rows, note=note)


def _amount(value: float | None) -> str:
    """FLOPs, with a prefix."""
    from ragmoe.evaluation.tables import NONE

    return NONE if value is None else _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))


def _bytes(value: float) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """Three digits, in the unit that leaves at least one before the point."""
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:#.3g}".rstrip(".") + f" {units[power]}" if value < 999.5 else f"{value:,.0f} {units[power]}"
