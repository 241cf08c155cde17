"""What ``ragmoe plan`` can be asked about, as a configuration of transformers and how it would be trained.

A training file of ``ragmoe train``; a bundle; a folder with a ``config.json``, or such a file; a YAML file, or a
mapping, that names a ``model_type`` and its fields.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ragmoe._errors import ConfigError, ModelError, RagmoeError, UsageError
from ragmoe._quiet import quiet_loading
from ragmoe.bundle import is_bundle, read_map
from ragmoe.models.config import RagmoeBertConfig
from ragmoe.models.starter import resolve_bundle

Source = str | Path | Mapping[str, Any]

# What transformers reads though no class declares it: old names of fields, and the width of a head in most families.
_UNDECLARED = {"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "head_dim", "model_type"}
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}


@dataclass(frozen=True)
class Planned:
    """A model that might be.

    Attributes:
        name: what was asked about.
        config: of the model.
        batch, length, dtype: of training, where the source says so.
        counts: of the model, how many parameters are held in training, and how many are trained; None means all.
        notes: what was assumed.
    """

    name: str
    config: Any
    batch: int = 1
    length: int | None = None
    dtype: str = "fp32"
    counts: Callable[[Any], tuple[int, int]] | None = None
    notes: Sequence[str] = ()


def read_source(source: Source, overrides: Sequence[str] = ()) -> Planned:
    """Find out what is asked about.

    Args:
        overrides: ``key=value`` with the value in YAML: fields of the model, or keys of a training file.

    Raises:
        ConfigError: there is no such file, or it holds no configuration, or one with unknown fields.
        ModelError: transformers knows no such model.
        UsageError: an override cannot be read, or names no field.
    """
    if isinstance(source, Mapping):
        return _of_mapping("configuration", copy.deepcopy(dict(source)), overrides)
    path = resolve_bundle(source)
    if is_bundle(path):
        map_ = read_map(path)
        # The map alone says how many experts there are.
        experts = {"experts": len(map_.experts)} if map_.experts else {}
        return _of_fields(str(source), {**map_.extra.get("config", {}), **experts}, overrides)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            have = ", ".join(sorted(entry.name for entry in path.parent.iterdir())[:8]) or "nothing"
            raise ConfigError(f"{path.parent} holds no config.json and is no bundle; it has {have}", hint=_HINT)
    if not path.is_file():
        raise ConfigError(f"there is no configuration {path}", hint=_HINT)
    if path.suffix == ".json":
        return _of_fields(str(source), _read_json(path), overrides)
    from ragmoe.training.config import read_yaml

    return _of_mapping(str(source), read_yaml(path), overrides, path)


_HINT = (
    "ragmoe plan takes a training file, a bundle, a folder with a config.json, or a YAML file with a model_type "
    "and its fields"
)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; expected an object")
    return content


def _of_mapping(name: str, content: dict[str, Any], overrides: Sequence[str], path: Path | None = None) -> Planned:
    """Fields of a model where there is a ``model_type``; else a training file."""
    if "model_type" in content:
        _check_fields(name, _config_class(content["model_type"]), content)
        return _of_fields(name, content, overrides)
    if "data" not in content:
        raise ConfigError(
            f"{name} names neither a model_type nor data to train on: it has {', '.join(content)}", hint=_HINT
        )
    from ragmoe.training.planned import planned_training

    return planned_training(name, path or content, overrides)


def _of_fields(name: str, content: dict[str, Any], overrides: Sequence[str]) -> Planned:
    """A model by the fields of its configuration; those of a ``config.json`` may be of any version of transformers."""
    from ragmoe.models.families import RoutingConfig
    from ragmoe.training.config import set_key

    changed = [set_key(content, override) for override in overrides]
    if not isinstance(content.get("model_type"), str):
        raise ConfigError(f"{name} names no model_type", hint=_HINT)
    kind = _config_class(content["model_type"])
    _check_fields("the command", kind, [key.partition(".")[0] for key in changed], UsageError)
    try:
        config = kind.from_dict(dict(content))
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{name} is no configuration of {content['model_type']!r}: {error}") from None
    notes = []
    named = content.get("architectures") or []
    if named and not _named_class(config) and not isinstance(config, RagmoeBertConfig | RoutingConfig):
        notes.append(f"transformers has no {named[0]}: counted is its own model of type {config.model_type!r}.")
    dtype = str(content.get("dtype") or content.get("torch_dtype") or "float32")
    length = getattr(config, "max_length", None) if isinstance(config, RagmoeBertConfig) else None
    return Planned(name, config, length=length, dtype=_DTYPES.get(dtype, "fp32"), notes=notes)


def _config_class(model_type: Any) -> Any:
    """The configuration class of a model type; ModelError lists what there is."""
    from transformers import CONFIG_MAPPING

    known = known_types()
    if model_type not in known:
        near = difflib.get_close_matches(str(model_type), known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ModelError(
            f"there is no model type {model_type!r} to plan; there are: {', '.join(known)}",
            hint=f"{hint}a model of another name may be built like one of these: model_type=deepseek_v3",
        )
    return CONFIG_MAPPING[model_type]


def known_types() -> list[str]:
    """The model types that can be planned: encoders and decoders of text in transformers, and this package's own."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    from ragmoe.models.families import FAMILIES

    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    return sorted({*names, RagmoeBertConfig.model_type, *(f.config_class.model_type for f in FAMILIES.values())})


def _check_fields(name: str, kind: Any, names: Iterable[str], error: type[RagmoeError] = ConfigError) -> None:
    """Refuse a field that does not exist: transformers would keep it, and plan without it."""
    known = {field.name for field in dataclasses.fields(kind)} | {*kind.attribute_map, *_UNDECLARED}
    if unknown := sorted(set(names) - known):
        shown = ", ".join(sorted(name for name in known if not name.startswith("_")))
        raise error(f"{name}: {kind.model_type!r} has no field {unknown[0]!r}; there are: {shown}")


def _named_class(config: Any) -> Any:
    """The class of transformers that a configuration names itself, if it is one of this configuration's models."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named if getattr(named, "config_class", None) is type(config) else None


def build_on_meta(config: Any) -> Any:
    """The model of a configuration on the meta device, which keeps shapes and no values.

    The class is the one the configuration names, otherwise the model with its language head.

    Raises:
        ModelError: it reads and writes apart, or not text alone, or transformers cannot build it.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    )

    if config.is_encoder_decoder or config.get_text_config() is not config:
        what = "has an encoder and a decoder" if config.is_encoder_decoder else "reads more than text"
        raise ModelError(
            f"{config.model_type!r} {what}; expected one stack of layers over text",
            hint="plan its text_config, which is a configuration of its own",
        )
    mappings = (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_QUESTION_ANSWERING_MAPPING)
    kind = _named_class(config) or next(mapping[type(config)] for mapping in mappings if type(config) in mapping)
    try:
        with torch.device("meta"), quiet_loading():
            return kind(config)
    except RagmoeError:
        raise
    except Exception as error:
        raise ModelError(f"transformers cannot build this {config.model_type!r}: {error}") from error
