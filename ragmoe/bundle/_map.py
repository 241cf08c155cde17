"""The map of a bundle: ``model.safetensors.index.json``, its metadata, and what makes it valid.

It stays what Hugging Face expects of a sharded checkpoint (``weight_map`` and ``metadata.total_size``); ours is the
rest of ``metadata``.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from ragmoe._errors import BundleError

MAP_NAME = "model.safetensors.index.json"
FORMAT_VERSION: Literal[1] = 1
#: What ``extra`` calls the no-answer thresholds of the experts that have their own, by id.
THRESHOLDS = "no_answer_thresholds"
# What a configuration says of where and by what it was written.
LOCAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}

_BASE = re.compile(r"base-(\d+)-\d{5}-of-\d{5}\.safetensors")
_GATE = re.compile(r"gate\.(\d+)\.safetensors")
_EXPERT = re.compile(r"expert\.(\d+)\.(\d+)\.safetensors")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpertEntry(_Record):
    """One expert: a numeric id that is never reused, a name, its version, and whether it may change."""

    id: int = Field(ge=0)
    name: str = Field(min_length=1)
    version: int = Field(ge=1)
    locked: bool = False


class EncoderRef(_Record):
    """The encoder whose embeddings the gate was trained on: its id and the sha256 of its weights."""

    id: str
    digest: str


class LineageStep(_Record):
    """How one version of the map came about.

    Attributes:
        version: the map's number.
        parent: sha256 of the map it replaced; None for the first.
        changed: what differs from that map, one sentence each.
        message: the writer's own words.
        time: UTC, ISO 8601.
        restores: the version that this one went back to; None, and not written, where it did not.
    """

    version: int = Field(ge=1)
    parent: str | None
    changed: list[str]
    message: str
    time: str
    restores: int | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        step: dict[str, Any] = written(self)
        if self.restores is None:
            step.pop("restores", None)
        return step


class BundleMap(_Record):
    """What a bundle holds; equal to the file ``model.safetensors.index.json``.

    Attributes:
        version: counts the maps of this folder, from 1.
        experts: in the order in which their tensors are stacked.
        next_expert_id: larger than every id ever used here.
        fused: tensors whose first dimension is the experts; ``<name>.<id>`` on disk.
        aliases: tensors saved under another tensor's name, because they share its memory.
        digests: sha256 of each file.
        gate_version: 0 where there is no gate.
        base_version: 0 where there is no base.
        lineage: one step a version, the last being this one.
        encoder: what made the embeddings the gate saw, or None.
        index: digest of the index it was trained with, or None.
        extra: whatever else the writer records, as JSON.
        total_size: bytes of all tensors.
        weight_map: the file of each tensor on disk.
    """

    format_version: Literal[1] = FORMAT_VERSION
    version: int = Field(ge=1)
    experts: list[ExpertEntry]
    next_expert_id: int = Field(ge=0)
    fused: list[str]
    aliases: dict[str, str] = {}
    digests: dict[str, str]
    gate_version: int = Field(ge=0)
    base_version: int = Field(ge=0)
    lineage: list[LineageStep]
    encoder: EncoderRef | None = None
    index: str | None = None
    extra: dict[str, Any] = {}
    total_size: int = Field(ge=0)
    weight_map: dict[str, str]

    @property
    def expert_ids(self) -> list[int]:
        """Ids in the order in which tensors are stacked."""
        return [expert.id for expert in self.experts]

    @property
    def expert_names(self) -> list[str]:
        """Names in the order in which tensors are stacked."""
        return [expert.name for expert in self.experts]

    @property
    def digest(self) -> str:
        """sha256 of the map as it is written."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def content(self) -> str:
        """sha256 of what the model answers by: tensors, experts, settings, thresholds, encoder and index.

        When it was saved, under which number and message, and which experts are locked is no part of that.
        """
        settings = {name: value for name, value in self.extra.get("config", {}).items() if name not in LOCAL}
        # By what the files hold, and not by their names, which count the times that they were saved.
        tensors = {name: self.digests[file] for name, file in self.weight_map.items()}
        encoder = self.encoder.model_dump() if self.encoder else None
        said = [tensors, self.expert_ids, self.expert_names, settings, self.extra.get(THRESHOLDS), encoder, self.index]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def descent(self) -> list[str]:
        """Digests of the maps that this one descends from, newest first, its own included.

        Versions that were gone back from are left out, unless one of them was gone back to.
        """
        of_version = {self.version: self.digest}
        of_version |= {step.version - 1: step.parent for step in self.lineage if step.parent}
        steps = {step.version: step for step in self.lineage}
        found, at = [], self.version
        while at in of_version:
            found.append(of_version[at])
            back = steps[at].restores if at in steps else None
            # One step further back each time, whatever a map claims.
            at = back if back is not None and back < at else at - 1
        return found

    @property
    def gate_tensors(self) -> set[str]:
        """The tensors of the gates that belong to no single expert."""
        return {name for name, file in self.weight_map.items() if _GATE.fullmatch(file)}

    def files(self) -> dict[str, list[str]]:
        """For each file the tensors that it holds."""
        found: dict[str, list[str]] = {}
        for name, file in self.weight_map.items():
            found.setdefault(file, []).append(name)
        return found

    def expert(self, id: int) -> ExpertEntry | None:
        """The expert with this id, or None."""
        return next((expert for expert in self.experts if expert.id == id), None)

    def find(self, expert: int | str) -> ExpertEntry:
        """The expert with this id or name; a name wins over an id that is written the same.

        Raises:
            BundleError: there is none; the message lists those there are.
        """
        for known in self.experts:
            if known.name == expert:
                return known
        for known in self.experts:
            if str(known.id) == str(expert):
                return known
        there = ", ".join(f"{known.id} ({known.name})" for known in self.experts) or "none"
        raise BundleError(f"there is no expert {expert!r}; there are: {there}")

    def to_json(self) -> str:
        """The text of the map file."""
        metadata = self.model_dump(mode="json", exclude={"weight_map"})
        content = {"metadata": metadata, "weight_map": self.weight_map}
        return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> BundleMap:
        """Parse and check a map file; ``source`` names it in errors.

        Raises:
            BundleError: not a map, not ours, of a newer format, or contradicting itself.
        """
        try:
            content = json.loads(text, object_pairs_hook=_no_duplicates)
            metadata, weight_map = content["metadata"], content["weight_map"]
            found = metadata.get("format_version")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{source} is damaged: {error}") from error
        if found is None:
            raise BundleError(
                f"{source} belongs to a plain sharded checkpoint, not to a bundle: its metadata has no format_version"
            )
        if found != FORMAT_VERSION:
            raise BundleError(f"{source} has format {found!r}; this ragmoe reads format {FORMAT_VERSION}")
        try:
            return cls.model_validate({**metadata, "weight_map": weight_map})
        except ValidationError as error:
            lines = [_sentence(problem) for problem in error.errors()[:5]]
            raise BundleError(f"{source} is not a valid map: " + "; ".join(lines)) from error

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in (*self._experts_problems(), *self._file_problems(), *self._alias_problems()):
            raise ValueError(problem)
        return self

    def _experts_problems(self) -> list[str]:
        ids, names = self.expert_ids, self.expert_names
        problems = []
        if len(set(ids)) < len(ids):
            problems.append(f"expert ids repeat: {ids}")
        if len(set(names)) < len(names):
            problems.append(f"expert names repeat: {names}")
        if self.fused and not ids:
            problems.append(f"there are fused tensors but no experts: {self.fused[:3]}")
        if ids and self.next_expert_id <= max(ids):
            problems.append(f"next_expert_id is {self.next_expert_id}, but expert {max(ids)} exists")
        problems += [
            f"expert {expert.id} ({expert.name}) has no tensor '{name}'"
            for expert in self.experts
            for name in self.fused
            if expert_tensor(name, expert.id) not in self.weight_map
        ]
        return problems

    def _file_problems(self) -> list[str]:
        files = self.files()
        owned = {
            expert_tensor(name, expert.id): expert_file(expert.id, expert.version)
            for expert in self.experts
            for name in self.fused
        }
        problems = []
        for file, names in files.items():
            if not self._is_ours(file):
                problems.append(
                    f"'{file}' is not a file of this bundle; expected base-{self.base_version}-*.safetensors, "
                    f"gate.{self.gate_version}.safetensors or expert.<id>.<version>.safetensors"
                )
            for name in names:
                want = owned.get(name)
                if want != file and (want is not None or _EXPERT.fullmatch(file)):
                    problems.append(f"tensor '{name}' is listed in '{file}', which is not where it belongs ({want})")
        if unmatched := sorted(self.digests.keys() ^ files.keys()):
            problems.append(f"digests and weight_map name different files: {unmatched}")
        return problems

    def _is_ours(self, file: str) -> bool:
        """Whether a file name is one that this map may list; nothing with a path in it ever is."""
        if found := _BASE.fullmatch(file):
            return int(found[1]) == self.base_version
        if found := _GATE.fullmatch(file):
            return int(found[1]) == self.gate_version
        return file in {expert_file(expert.id, expert.version) for expert in self.experts}

    def _alias_problems(self) -> list[str]:
        saved = self.weight_map.keys() | set(self.fused)
        return [
            f"alias '{alias}' of '{name}' does not fit the tensors that are saved"
            for alias, name in self.aliases.items()
            if alias in saved or name not in saved
        ]


def expert_tensor(name: str, id: int) -> str:
    """The name on disk of one expert's part of a fused tensor."""
    return f"{name}.{id}"


def expert_file(id: int, version: int) -> str:
    """The file of one version of an expert."""
    return f"expert.{id}.{version}.safetensors"


def gate_file(version: int) -> str:
    """The file of one version of the gate."""
    return f"gate.{version}.safetensors"


def base_file(version: int, part: int, parts: int) -> str:
    """One file of a version of the base; ``part`` counts from 1."""
    return f"base-{version}-{part:05d}-of-{parts:05d}.safetensors"


def version_of(file: str) -> tuple[str, int] | None:
    """What a file name is of (``base``, ``gate`` or ``expert.<id>``) and its version; None where it is not ours."""
    if found := _BASE.fullmatch(file):
        return "base", int(found[1])
    if found := _GATE.fullmatch(file):
        return "gate", int(found[1])
    if found := _EXPERT.fullmatch(file):
        return f"expert.{int(found[1])}", int(found[2])
    return None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what JSON readers accept in silence: a key twice, so a tensor in two files."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"'{key}' is listed twice, as {found[key]!r} and {value!r}")
        found[key] = value
    return found


def _sentence(problem: Any) -> str:
    at = ".".join(str(part) for part in problem["loc"])
    text = str(problem["msg"]).removeprefix("Value error, ")
    return f"{at}: {text}" if at else text
