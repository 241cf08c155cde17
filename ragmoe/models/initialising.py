"""From any base to a bundle with gates that see neighbours: what ``ragmoe init`` does.

made = init("models/llama", out="runs/llama-retrieval", experts=8, top_k=2, gate="retrieval")
print(made.how, made.layers, made.model.parameter_counts())
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ragmoe._errors import BundleError, ModelError
from ragmoe._folders import expect_folder
from ragmoe._quiet import quiet_loading
from ragmoe.bundle import is_bundle, read_map
from ragmoe.gates import ClusterGate
from ragmoe.models.bert import RagmoeBertForQuestionAnswering
from ragmoe.models.config import RagmoeBertConfig
from ragmoe.models.families import FAMILIES
from ragmoe.models.families.upcycling import (
    UPCYCLED,
    Made,
    exchange_base_gates,
    exchanged_config,
    upcycle_base,
    upcycled_decoder,
)
from ragmoe.models.upcycling import base_path

_UNQUANTISED = "start from the checkpoint that it was made of"
_UPCYCLING_DEFAULTS = {"experts": 8, "top_k": 2}


def init(
    base: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    layers: Sequence[int] | None = None,
    init: str | None = None,
    amount: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> Made:
    """Give a checkpoint gates that see neighbours, and save it as a bundle with its tokenizer.

    A mixture of experts has its gates exchanged and keeps its experts. A dense model is upcycled: a decoder to the
    sparse family of its kind, a BERT to a reader.

    Args:
        base: a folder or Hub id; ``minilm`` is the packaged encoder.
        out: the folder of the bundle, which must not hold one.
        layers: of a dense model, which become sparse; None means all of a decoder, every second of a BERT.
        init: of a dense model, how its experts start: ``copy`` (what None means), ``noise`` or ``drop``.
        amount: by how much they differ; None takes what is usual.
        seed: for everything that is drawn.
        settings: ``gate``, ``gate_width``, ``neighbour_width`` and other fields of the model; for a dense model also
            ``experts``, ``top_k``, ``expert_kind`` and ``expert_rank``.

    Raises:
        ModelError: there is no such checkpoint, no layer of it can be changed, or a setting means nothing to it.
        BundleError: ``out`` holds a bundle already.
    """
    expect_folder(out, BundleError)
    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise BundleError(f"{out} is not empty", hint="--out names a folder that is not there yet")
    made = make(base, layers=layers, init=init, amount=amount, seed=seed, **settings)
    made.model.save_pretrained(out, message=f"{made.how} of {base}")
    made.notes.extend(_copy_tokenizer(base_path(str(base)), Path(out)))
    if any(isinstance(gate, ClusterGate) and not gate.is_ready for gate in made.model.gates):
        made.notes.append("its gates have no clusters yet, so no neighbour votes: ragmoe train finds them in an index")
    return made


def make(
    base: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    init: str | None = None,
    amount: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> Made:
    """``init`` without saving anything."""
    path = base_path(str(base))
    if is_bundle(path):
        raise ModelError(
            f"{path} is a bundle already: its gates are {read_map(path).extra.get('config', {}).get('gate')!r}",
            hint="ragmoe train takes it as its base without a model section; or start from what it was made of",
        )
    config = _config(path)
    maker = _MAKERS.get(config.model_type)
    if maker is None or layers == []:
        raise ModelError(
            f"no layer was changed: {path} is a {config.model_type!r} model, "
            + ("and no layers were asked for" if maker else f"and those known are {', '.join(sorted(_MAKERS))}")
            + f"; its modules are {', '.join(_modules(config))}"
        )
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise ModelError(f"{path} is quantised ({kind}): its weights cannot be copied into experts", hint=_UNQUANTISED)
    try:
        made = maker(path, config, settings, layers=layers, init=init, amount=amount, seed=seed)
    except (OSError, ImportError, SafetensorError) as error:
        raise ModelError(f"the weights of {path} cannot be read: {_first_line(error)}") from error
    if not made.layers:
        raise ModelError(f"no layer was changed: {path} has no sparse layer; it has {', '.join(_modules(config))}")
    return made


def decoder_config(
    base: str,
    *,
    layers: Sequence[int] | None = None,
    init: str | None = None,
    amount: float | None = None,
    **settings: Any,
) -> Any:
    """The configuration of what `make` would make of a causal language model; no weight is read.

    Raises:
        ModelError: as ``make``, as far as no weights are needed to tell.
    """
    path = base_path(base)
    config = _config(path)
    if config.model_type in UPCYCLED:
        return upcycled_decoder(path, config, {**_UPCYCLING_DEFAULTS, **settings}, layers)
    if config.model_type in FAMILIES:
        return exchanged_config(path, config, settings)
    known = ", ".join(sorted({*UPCYCLED, *FAMILIES}))
    raise ModelError(f"{path} is a {config.model_type!r} model, which is given no gates; known are {known}")


def _exchange(path: str, config: Any, settings: dict[str, Any], *, seed: int, **start: Any) -> Made:
    if given := [name for name, value in start.items() if value is not None]:
        raise ModelError(
            f"{path} is a mixture of experts already: {', '.join(given)} only concern upcycling",
            hint="leave it out: the gates of all its sparse layers are exchanged",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return exchange_base_gates(path, config, settings)


def _upcycle(path: str, config: Any, settings: dict[str, Any], *, init: str | None, **start: Any) -> Made:
    return upcycle_base(path, config, {**_UPCYCLING_DEFAULTS, **settings}, init=init or "copy", **start)


def _reader(
    path: str,
    config: Any,
    settings: dict[str, Any],
    *,
    layers: Sequence[int] | None,
    init: str | None,
    amount: float | None,
    seed: int,
) -> Made:
    noise = {None: 0.0, "copy": 0.0, "noise": 0.01 if amount is None else amount}
    if init not in noise:
        raise ModelError(f"init is {init!r}, but a reader's experts start by copy or noise")
    if amount is not None and init != "noise":
        raise ModelError(f"the amount by which experts differ is {amount:g}, but copies are exact", hint="init=noise")
    settings = {**_UPCYCLING_DEFAULTS, **settings, "sparse_layers": None if layers is None else list(layers)}
    positions, length = config.max_position_embeddings, settings.get("max_length")
    if length is None:
        settings["max_length"] = min(RagmoeBertConfig.max_length, positions)
        settings["stride"] = settings.get("stride") or min(RagmoeBertConfig.stride, settings["max_length"] // 4)
    elif not isinstance(length, int) or not 0 < length <= positions:
        raise ModelError(f"max_length is {length!r}, but {path} has {positions} positions")
    model = RagmoeBertForQuestionAnswering.from_dense(path, expert_noise=noise[init], seed=seed, **settings)
    notes = ["its question-answering head is untrained: ragmoe train makes a reader of it"]
    return Made(model.eval(), "upcycling", config.model_type, model.sparse_layers, notes=notes)


_MAKERS: dict[str, Callable[..., Made]] = {
    **dict.fromkeys(FAMILIES, _exchange),
    **dict.fromkeys(UPCYCLED, _upcycle),
    "bert": _reader,
}


def _config(path: str) -> Any:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{path} is not a checkpoint: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _modules(config: Any) -> list[str]:
    """The modules of a model by name, layer numbers left out; nothing is loaded."""
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except (ValueError, ImportError):
        return ["unknown"]
    return sorted({re.sub(r"\b\d+\b", "*", name) for name, _ in model.named_modules() if name})


def _copy_tokenizer(path: str, out: Path) -> list[str]:
    """Save the base's tokenizer beside the model; a note where it has none."""
    none = [f"{path} has no tokenizer, and so has {out}"]
    if Path(path).is_dir() and not any(Path(path).glob("*token*")) and not any(Path(path).glob("vocab*")):
        return none
    try:
        with quiet_loading():
            AutoTokenizer.from_pretrained(path).save_pretrained(out)
    except (OSError, ValueError):
        return none
    return []
