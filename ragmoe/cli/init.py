"""``ragmoe init``: a bundle whose gates see neighbours, from any base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragmoe._errors import UsageError
from ragmoe.cli._output import OVERRIDES, JsonOption, print_json

if TYPE_CHECKING:
    from ragmoe.models.families.upcycling import Made

INIT_EXAMPLES = """Examples:

  ragmoe init --base models/llama --out runs/llama --experts 8 --top-k 2 --neighbour-width 384
  ragmoe init --base models/mistral --out runs/mistral --expert-kind ffn --init drop --layers 8,12,16
  ragmoe init --base models/mixtral --out runs/mixtral --gate retrieval
  ragmoe init --base models/qwen3 --out runs/qwen3 --gate hierarchical model.expert_groups=2"""

_DENSE = "Of a dense base"


def _layers(text: str) -> list[int] | None:
    """``all`` or numbers with commas between them."""
    if text == "all":
        return None
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise UsageError(f"--layers {text}: expected all, or numbers such as 8,12,16") from None


def _further(settings: list[str], named: dict[str, Any]) -> dict[str, Any]:
    """Settings that have no option, by name; UsageError for what is none, or was given by its option too."""
    from ragmoe.training.config import set_key

    found: dict[str, Any] = {}
    for setting in settings:
        key = set_key(found, setting)
        section, _, name = key.partition(".")
        if section != "model" or not name:
            raise UsageError(f"{setting}: expected a setting of the model", hint="for example: model.expert_groups=2")
        option = "layers" if name == "sparse_layers" else name
        if option in named:
            raise UsageError(f"{setting}: there is an option for that", hint=f"--{option.replace('_', '-')}")
    return dict(found.get("model", {}))


def init(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=OVERRIDES, help="Further settings, as a training file's model section has them.", show_default=False
        ),
    ] = None,
    *,
    base: Annotated[
        str,
        typer.Option(
            metavar="PATH_OR_HUB_ID",
            help="Dense: Llama, Mistral, Qwen3, BERT (or minilm). Sparse: Mixtral, Qwen3-MoE, OLMoE, GLM-4-MoE.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="Folder to be made.", show_default=False)],
    gate: Annotated[str, typer.Option(metavar="GATE", help="See ragmoe gates ls.")] = "retrieval",
    neighbour_width: Annotated[int, typer.Option(metavar="R", help="Width of the index's embeddings.")] = 384,
    gate_width: Annotated[int, typer.Option(metavar="A", help="Width of the retrieval gate's attention.")] = 64,
    experts: Annotated[
        int | None, typer.Option(metavar="E", help=f"{_DENSE}: experts of a layer.", show_default="8")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help=f"{_DENSE}: experts of a token.", show_default="2")
    ] = None,
    expert_kind: Annotated[
        str | None, typer.Option(metavar="KIND", help=f"{_DENSE}: lora or ffn.", show_default="lora")
    ] = None,
    expert_rank: Annotated[
        int | None, typer.Option(metavar="RANK", help=f"{_DENSE}: rank of LoRA experts.", show_default="16")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help=f"{_DENSE}: all, or which become sparse.", show_default="all; every second of a BERT"
        ),
    ] = None,
    init: Annotated[
        str | None, typer.Option(metavar="WAY", help=f"{_DENSE}: copy, noise or drop.", show_default="copy")
    ] = None,
    amount: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Noise relative to a matrix's spread, or share dropped.", show_default="0.01, or 0.5"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="For what is drawn.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Give a checkpoint gates that see neighbours: upcycle a dense one, exchange the gates of a mixture."""
    from ragmoe.models.initialising import init as make

    always = {"gate": gate, "gate_width": gate_width, "neighbour_width": neighbour_width}
    given = {"experts": experts, "top_k": top_k, "expert_kind": expert_kind, "expert_rank": expert_rank}
    chosen = {name: value for name, value in given.items() if value is not None}
    ways = {"base": base, "out": out, "layers": layers, "init": init, "amount": amount, "seed": seed}
    further = _further(settings or [], {**always, **given, **ways})
    made = make(
        base,
        out=out,
        layers=None if layers is None else _layers(layers),
        init=init,
        amount=amount,
        seed=seed,
        **always,
        **chosen,
        **further,
    )
    if as_json:
        print_json({**_summary(made), "bundle": str(out)})
    else:
        typer.echo(_text(made, out))


def _summary(made: Made) -> dict[str, Any]:
    return {
        "how": made.how,
        "from": made.base_type,
        "to": made.model.config.model_type,
        "gate": made.model.config.gate,
        "experts": made.model.config.experts,
        "layers": made.layers,
        "deviation": made.deviation,
        "parameters": made.model.parameter_counts(),
        "notes": made.notes,
    }


def _text(made: Made, out: Path) -> str:
    found, counts = _summary(made), made.model.parameter_counts()
    of = made.model.config.num_hidden_layers
    lines = [
        f"{out}: {found['how']}, {found['from']} to {found['to']} with {found['experts']} experts and the gate "
        f"{found['gate']!r}",
        f"layers changed ({len(made.layers)} of {of}): {', '.join(map(str, made.layers))}",
        f"{counts['total']:,} parameters, {counts['active']:,} active for a token",
    ]
    if made.deviation:
        lines.append(f"expert copies differ from the dense weights by up to {made.deviation:.2e}")
    if made.model.can_generate():
        # Nothing of transformers is imported with ragmoe, and so nothing can be made known to it then.
        lines.append(
            f"in Python: ragmoe.load_decoder({str(out)!r}); after `import ragmoe.models.families` "
            "AutoModelForCausalLM opens it too"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in made.notes)])
