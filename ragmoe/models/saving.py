"""How a model becomes a bundle and comes back: the only place where models and bundles meet."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file, convert_file_size_to_int

from ragmoe._errors import BundleError, ModelError
from ragmoe._quiet import quiet_loading
from ragmoe._words import many
from ragmoe.bundle import MAP_NAME, THRESHOLDS, BundleMap, is_bundle, read_bundle, read_map, write_bundle
from ragmoe.bundle._config import own_thresholds
from ragmoe.bundle.experts import CERTIFICATES, LOAD, common_experts
from ragmoe.experts.on_demand import ExpertStore
from ragmoe.gates import Gate, gate_class
from ragmoe.models.on_demand import Slots, is_expert_weight
from ragmoe.moe import MoELayer
from ragmoe.moe.block import SparseBlock
from ragmoe.moe.layer import experts_a_token

# What of a configuration the map does not record: it says it itself, or it is only true of this machine.
_NOT_RECORDED = ("expert_ids", "expert_names", "expert_thresholds", "encoder", "index_digest", "_name_or_path")
# What a reader's training measures, which therefore belongs to the weights; decoders have no such thing.
_CALIBRATED = "no_answer_threshold"
# What PEFT writes beside an adapter's weights.
_ADAPTER = "adapter_config.json"
# What says where on the Hub something is, and how to ask there whether it is.
_HUB = ("cache_dir", "revision", "token", "local_files_only", "force_download")
_QUIETLY = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


class BundleMixin(PreTrainedModel):
    """``save_pretrained`` and ``from_pretrained`` in the bundle format (see ragmoe.bundle).

    Attributes:
        expert_store: where experts are brought in from their files as they are needed; None where all are in memory.
    """

    bundle_digests: Sequence[str]
    expert_store: ExpertStore | None = None

    def expert_tensors(self) -> set[str]:
        """Names of the tensors whose first dimension is the expert."""
        names = {f"{prefix}.{name}" for prefix, module in self.expert_modules().items() for name in module.state_dict()}
        for prefix, module in self.named_modules():
            if isinstance(module, Gate):
                names |= {f"{prefix}.{name}" for name in module.expert_parameters}
        return names

    def expert_modules(self) -> dict[str, nn.Module]:
        """By their names, first layer to last, the modules that hold a layer's experts, and nothing else."""
        blocks = {name: module for name, module in self.named_modules() if isinstance(module, MoELayer | SparseBlock)}
        return {f"{name}.experts": block.experts for name, block in blocks.items()}

    def gate_tensors(self) -> set[str]:
        """Names of the gates' tensors that belong to no single expert."""
        names = set()
        for prefix, module in self.named_modules():
            if isinstance(module, Gate):
                names |= {f"{prefix}.{name}" for name in module.state_dict()}
        return names - self.expert_tensors()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        message: str = "save",
        extra: Mapping[str, Any] | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the bundle: what has changed becomes a new version, and the map is replaced last.

        Of a model with a PEFT adapter on it (``load_adapter``) the adapter alone is written, as in transformers: under
        the names that the adapter gives them, the base's own weights would be found by nobody.

        Args:
            state_dict: saved instead of the model's own, as Trainer hands it over in distributed training.
            message: what changed, for the bundle's lineage.
            extra: recorded in the map beside the configuration, as JSON. What a bundle that the model was opened from
                records of its experts (loads, certificates) stays where it is saved over that.
            max_shard_size: of the base's files, in bytes or as ``"5GB"``; None means 2 GiB. An expert is one file.

        Raises:
            ModelError: ``push_to_hub`` was asked for, which is a step of its own.
        """
        if not is_main_process:
            return
        if self._hf_peft_config_loaded:
            size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            super().save_pretrained(save_directory, state_dict=state_dict, push_to_hub=push_to_hub, **size, **kwargs)
            return
        if push_to_hub:
            raise ModelError(
                "push_to_hub=True was asked of save_pretrained, which writes folders", hint="model.push_to_hub(REPO)"
            )
        self._must_be_whole("saved")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.state_dict() if state_dict is None else dict(state_dict)
        config = self.config
        sparse = bool(self.expert_modules())
        config.architectures = [type(self).__name__]
        # What from_pretrained loads as: a stale one would round the weights in silence.
        config.dtype = next((x.dtype for x in tensors.values() if x.is_floating_point()), self.dtype)
        self.bundle_digests = _digests(
            write_bundle(
                folder,
                tensors,
                expert_tensors=self.expert_tensors(),
                gate_tensors=self.gate_tensors(),
                expert_ids=config.expert_ids if sparse else None,
                expert_names=(config.expert_names or [f"expert {i}" for i in range(config.experts)])
                if sparse
                else None,
                encoder=config.encoder,
                index=config.index_digest,
                extra={
                    **self._kept_records(folder),
                    **(extra or {}),
                    **_record_of_thresholds(config),
                    "config": {name: value for name, value in config.to_dict().items() if name not in _NOT_RECORDED},
                    **({"generation": self.generation_config.to_dict()} if self.can_generate() else {}),
                },
                message=message,
                **({} if max_shard_size is None else {"max_shard_bytes": convert_file_size_to_int(max_shard_size)}),
                finish=partial(self._write_copies, folder),
            )
        )

    def _write_copies(self, folder: Path) -> None:
        """For other tools: what the map holds too, which is what from_pretrained goes by."""
        self.config.save_pretrained(folder)
        if self.can_generate():
            self.generation_config.save_pretrained(folder)

    def _kept_records(self, folder: Path) -> dict[str, Any]:
        """What the bundle in a folder records of its experts, where it is the one that this model was opened from."""
        if not is_bundle(folder) or (there := read_map(folder)).digest not in getattr(self, "bundle_digests", ()):
            return {}
        ids = {str(id) for id in self.config.expert_ids or range(self.config.experts)}
        kept = {key: there.extra.get(key, {}) for key in (LOAD, CERTIFICATES)}
        kept = {key: {id: value for id, value in of.items() if id in ids} for key, of in kept.items()}
        return {key: of for key, of in kept.items() if of}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        version: int | None = None,
        experts: Sequence[int | str] | None = None,
        resident_experts: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Open a bundle, or a PEFT adapter's folder with the bundle under it; all else is for transformers' loader.

        The configuration, the experts and the encoder come from the bundle's map, the one thing that is replaced at
        once; ``config.json`` is a copy of it. Of a ``config`` given, the map's own fields and the thresholds give way;
        a ``no_answer_threshold`` given by name is that of all experts.

        Args:
            version: of a bundle, an earlier version of its map instead of the current one.
            experts: of a bundle, ids or names of the experts to open, in their order; None opens all. Those that all
                domains share come last, as they do in the bundle.
            resident_experts: of a bundle, how many experts a layer keeps in memory; the others stay in their files
                until a token is routed to them (``expert_store``). Answers are the same; for inference only. None
                keeps all.
        """
        if kwargs.get("state_dict") is None:
            pretrained_model_name_or_path = _at_hand(pretrained_model_name_or_path, kwargs, version)
        path, adapter = _parted(pretrained_model_name_or_path, kwargs)
        if adapter is not None and path != adapter:
            # Its revision and subfolder are the adapter's own.
            path = _at_hand(
                path, {name: kwargs[name] for name in _HUB if name in kwargs and name != "revision"}, version
            )
        if path is None or kwargs.get("state_dict") is not None or not is_bundle(path):
            if resident_experts is not None:
                raise ModelError(f"resident_experts needs a bundle, where each expert is a file; {path} is none")
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        named: dict[str, Any] = {"version": version, "experts": experts, "resident_experts": resident_experts}
        wanted_info, adapter_name = kwargs.pop("output_loading_info", False), kwargs.pop("adapter_name", None)
        model, info = cls._open_bundle(path, *args, **named, **kwargs)
        if adapter is not None:
            found = model.load_adapter(adapter, adapter_name=adapter_name)
            # Of experts that stay in their files it would be left out.
            _check_fit(f"the adapter {adapter} does not fit the model as it was opened", found.to_dict(), "")
        return (model, info) if wanted_info else model

    @classmethod
    def _open_bundle(
        cls,
        path: Any,
        *args: Any,
        version: int | None,
        experts: Sequence[int | str] | None,
        resident_experts: int | None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """The model in a bundle, and what transformers says of its loading."""
        leave = None if resident_experts is None else is_expert_weight
        tensors, bundle = read_bundle(path, version=version, experts=experts, leave=leave)
        if "config" not in bundle.extra:
            raise BundleError(f"the map of {path} holds no configuration", hint="was it written by save_pretrained?")
        if (found := bundle.extra["config"]["model_type"]) != cls.config_class.model_type:
            raise BundleError(
                f"{path} is a {found!r} model; {cls.__name__} opens {cls.config_class.model_type!r}",
                hint="ragmoe.load opens readers, ragmoe.load_decoder opens decoders",
            )
        whole = read_map(path, version=bundle.version) if experts is not None else bundle
        gate = bundle.extra["config"].get("gate")
        if bundle.expert_ids != whole.expert_ids and gate and (why := gate_class(gate).fixed_experts):
            raise BundleError(
                f"some of the experts of {path} were asked for, or in another order, but its gate {gate!r} needs all "
                f"as they are: {why}"
            )
        config, threshold = kwargs.pop("config", None), None
        if config is None:
            # Fields given by name win, as in transformers.
            held = dict(bundle.extra["config"])
            # The precision is for the loader, which knows what "auto" is.
            precision: dict[str, Any] = {n: kwargs.pop(n) for n in ("dtype", "torch_dtype") if n in kwargs}
            threshold = kwargs.get(_CALIBRATED)
            config, kwargs = cls.config_class.from_dict(held, return_unused_kwargs=True, **kwargs)
            kwargs |= precision
        elif isinstance(config, str | os.PathLike):
            config = cls.config_class.from_pretrained(config)
        _apply_map(config, bundle)
        if threshold is not None:
            config.no_answer_threshold, config.expert_thresholds = threshold, None
        if experts is not None:
            _fit_chosen(config, bundle, whole)
        slots = None if resident_experts is None else Slots(path, bundle, resident_experts)
        if slots is not None:
            config, empty = slots.reserve(config)
            tensors |= empty
        if "generation" in bundle.extra:
            kwargs.setdefault("generation_config", GenerationConfig.from_dict(dict(bundle.extra["generation"])))
        with quiet_loading():
            model, info = super().from_pretrained(
                None, *args, config=config, state_dict=tensors, output_loading_info=True, **kwargs
            )
        prefix = f"{model.base_model_prefix}."
        # The encoder alone, out of a bundle with a head: what is left over is the head.
        alone = model.base_model is model and any(name.startswith(prefix) for name in tensors)
        _check_fit(f"{path} does not fit {cls.__name__}", info, prefix if alone else "")
        if slots is not None:
            model.expert_store = slots.hand_over(model, prefix if alone else "")
        # Wherever the process goes before the tokenizer is opened.
        model.name_or_path = model.config._name_or_path = str(Path(path).absolute())
        # Of the whole map, also where only some of its experts were opened.
        model.bundle_digests = _digests(whole)
        return model, info

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in torch, but one expert's tensor, as a bundle's files hold it, goes to that expert's place.

        Trainer resumes, and loads the best checkpoint, file by file and not strictly: what it does not know by name it
        would leave out without a word.
        """
        fused, given = self.expert_tensors(), dict(state_dict)
        parts = {name: name.rpartition(".") for name in given}
        rows = {name: (whole, int(id)) for name, (whole, _, id) in parts.items() if whole in fused and id.isdecimal()}
        if rows:
            ids, own = self.config.expert_ids or list(range(self.config.experts)), self.state_dict()
            for name, (whole, id) in rows.items():
                given.setdefault(whole, own[whole].clone())[ids.index(id)] = given.pop(name)
        return super().load_state_dict(given, *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As in torch, but ModelError for a model that holds only some of its experts."""
        if mode:
            self._must_be_whole("trained")
        return super().train(mode)

    def _must_be_whole(self, done: str) -> None:
        if (store := self.expert_store) is not None:
            raise ModelError(
                f"the model has {store.resident} of its {store.experts} experts in memory and brings in the others as "
                f"they are needed: it cannot be {done}",
                hint="load it without resident_experts",
            )

    @torch.no_grad()
    def load_bundle(self, folder: str | os.PathLike[str]) -> None:
        """Load a bundle's tensors into this model in place, strictly (as resuming a training run needs)."""
        self._must_be_whole("loaded into")
        tensors, bundle = read_bundle(Path(folder))
        _apply_map(self.config, bundle)
        self.load_state_dict(tensors, strict=True)
        self.bundle_digests = _digests(bundle)


def _at_hand(path: Any, kwargs: dict[str, Any], version: int | None) -> Any:
    """The folder of a bundle that lies below another folder (``subfolder``) or on the Hub; all else as it is.

    transformers' loader would find the base's weights there, and start experts and gates anew. From the Hub comes what
    the current version needs, or all where an earlier ``version`` is wanted.
    """
    if path is None:
        return path
    subfolder = (kwargs.get("subfolder") or "").strip("/")
    if Path(path).is_dir():
        if not subfolder or not is_bundle(Path(path) / subfolder):
            return path
        del kwargs["subfolder"]
        return str(Path(path) / subfolder)
    where = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
    try:
        found = cached_file(path, MAP_NAME, subfolder=subfolder, **where, **_QUIETLY)
    except OSError:
        # transformers' loader says it better.
        return path
    if found is None or not is_bundle(Path(found).parent):
        return path
    kwargs.pop("subfolder", None)
    names = ["*.json", "*.jinja", "*.txt", "*.model", *read_map(Path(found).parent).files()]
    if version is not None:
        names = ["*"]
    allowed = [f"{subfolder}/{name}" if subfolder else name for name in names]
    return str(Path(snapshot_download(str(path), allow_patterns=allowed, **where)) / subfolder)


def _parted(path: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """A model's folder, and that of the PEFT adapter that goes on it; None for none.

    As transformers has it: an adapter's folder names its base, unless it holds a whole model itself. The Auto classes
    have parted the two already.
    """
    found = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
    if found is not None or path is None or not (file := Path(path) / _ADAPTER).is_file():
        return path, found
    whole = is_bundle(path)
    return (path if whole else json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]), path


def _digests(bundle: BundleMap) -> list[str]:
    """Of this version and of those it descends from, newest first."""
    return bundle.descent


def _record_of_thresholds(config: Any) -> dict[str, Any]:
    """The no-answer thresholds of single experts, as a map records them."""
    own = getattr(config, "expert_thresholds", None)
    if own is None:
        return {}
    ids = config.expert_ids or range(config.experts)
    return {THRESHOLDS: {str(id): value for id, value in zip(ids, own, strict=True) if value is not None}}


def _check_fit(what: str, info: Mapping[str, Any], prefix: str) -> None:
    """Raise BundleError unless the model took all tensors that begin with the prefix, and needed no others."""
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    unexpected = sorted(name for name in info["unexpected_keys"] if name.startswith(prefix))
    if missing or unexpected:
        raise BundleError(
            f"{what}: missing {missing[:5]}, unexpected {unexpected[:5]}",
            hint="was it written by another version, or for another model class?",
        )


def _fit_chosen(config: Any, chosen: BundleMap, whole: BundleMap) -> None:
    """Count how many of the chosen experts all domains share; BundleError where these do not come last, or for few."""
    shared = [expert.name for expert in common_experts(whole) if expert in chosen.experts]
    names, K = chosen.expert_names, experts_a_token(config)
    if {*names[len(names) - len(shared) :]} != {*shared}:
        raise BundleError(
            f"the experts {', '.join(names)} were asked for: expected last what all domains share, {', '.join(shared)}",
            hint=f"experts={[name for name in names if name not in shared] + shared}",
        )
    if len(names) < K:
        raise BundleError(
            f"{many(len(names), 'expert')} asked for ({', '.join(names)}), but each token chooses {K}: expected at "
            f"least as many of {', '.join(whole.expert_names)}"
        )
    config.common_experts = len(shared)


def _apply_map(config: Any, bundle: BundleMap) -> None:
    config.encoder = bundle.encoder.model_dump() if bundle.encoder else None
    config.index_digest = bundle.index
    if _CALIBRATED in bundle.extra["config"]:
        config.no_answer_threshold = bundle.extra["config"][_CALIBRATED]
        config.expert_thresholds = own_thresholds(bundle)
    if bundle.experts:
        config.experts = len(bundle.experts)
        config.expert_ids = bundle.expert_ids
        config.expert_names = [expert.name for expert in bundle.experts]
