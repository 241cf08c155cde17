"""Expert memory: how much each passage of an index speaks for each expert of a bundle.

P passages, L sparse layers, E experts, N neighbours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import IndexFolderError
from ragmoe._folders import refuse_link, share
from ragmoe.index import manifest as manifests

if TYPE_CHECKING:
    from torch import Tensor

    from ragmoe.index.folder import Index
    from ragmoe.index.rows import OldIndex
    from ragmoe.neighbours import Neighbours

FOLDER = "memory"
# Passages that a regression takes up at a time.
_BLOCK = 4096


@dataclass(frozen=True)
class ExpertMemory:
    """The affinity of passages to experts.

    Attributes:
        affinity_PLE: float16, summing to one over E; zero everywhere for a passage that speaks for no expert.
        questions_P: int32, how many questions about each passage were routed; 0 where the affinity is its domain's.
        expert_ids: of the experts, in the order of E.
        layers: the sparse layers.
        bundle: digest of the bundle whose routing was recorded; empty for the domains alone.
        index: digest of the index.
    """

    affinity_PLE: NDArray[np.float16]
    questions_P: NDArray[np.int32]
    expert_ids: list[int]
    layers: list[int]
    bundle: str
    index: str
    # Weight and offset of the regression behind ``guess``, once it was made.
    _regression: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the affinities."""
        content = self.affinity_PLE.tobytes() + json.dumps([self.expert_ids, self.layers]).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    @classmethod
    def of_domains(
        cls, index: Index, names: Sequence[str], expert_ids: Sequence[int], layers: Sequence[int]
    ) -> ExpertMemory:
        """Before anything is recorded: each passage speaks for the expert named like its domain, or for none."""
        at = {name: place for place, name in enumerate(names)}
        affinity_PLE = np.zeros((len(index), len(layers), len(names)), dtype=np.float16)
        for row, domain in enumerate(index.domains):
            if domain in at:
                affinity_PLE[row, :, at[domain]] = 1.0
        return cls(affinity_PLE, np.zeros(len(index), dtype=np.int32), list(expert_ids), list(layers), "", index.digest)

    def recorded(
        self, counts: Mapping[int, NDArray[np.float64]], questions: Mapping[int, int], bundle: str
    ) -> ExpertMemory:
        """The same with what was recorded put in.

        Args:
            counts: by row of the index, how many choices fell on each expert, (L, E).
            questions: by row, how many questions these came from.
        """
        affinity_PLE, questions_P = self.affinity_PLE.copy(), self.questions_P.copy()
        for row, counts_LE in counts.items():
            affinity_PLE[row] = counts_LE / np.maximum(counts_LE.sum(axis=1, keepdims=True), 1)
            questions_P[row] = questions[row]
        return replace(self, affinity_PLE=affinity_PLE, questions_P=questions_P, bundle=bundle)

    def votes(self, rows_N: Sequence[int]) -> NDArray[np.float32]:
        """What some rows of the index vote, float32 (N, L, E)."""
        return self.affinity_PLE[np.asarray(rows_N, dtype=np.int64)].astype(np.float32)

    def guess(self, embeddings_MR: Tensor, index: Index) -> Tensor:
        """What embeddings would vote that are no passages: each for one expert a layer, or for none, float32 (M, L, E).

        It is the expert that a ridge regression of the passages' affinity on their embeddings gives the largest score.
        Nothing is searched. Source: the closed-form gate of DUME.
        """
        import torch
        from torch.nn import functional as F

        from ragmoe._ridge import ridge

        _, L, E = self.affinity_PLE.shape
        regression = self._regression or ridge(self._examples(index))
        object.__setattr__(self, "_regression", regression)
        weight_OR, offset_O = regression
        scores_MLE = F.linear(embeddings_MR.float(), weight_OR, offset_O).unflatten(1, (L, E + 1))
        return F.one_hot(scores_MLE.argmax(dim=-1), E + 1)[..., :E].to(torch.float32)

    def _examples(self, index: Index) -> Iterator[tuple[Tensor, Tensor]]:
        """The passages' embeddings and affinity in blocks; what speaks for no expert is one more, (Q, L E+1)."""
        import torch

        for begin in range(0, len(index), _BLOCK):
            x_QR = torch.from_numpy(np.asarray(index.embeddings[begin : begin + _BLOCK], dtype=np.float32))
            y_QLE = torch.from_numpy(self.affinity_PLE[begin : begin + _BLOCK].astype(np.float32))
            yield x_QR, torch.cat([y_QLE, 1 - y_QLE.sum(dim=-1, keepdim=True)], dim=-1).flatten(1)

    def recall(self, neighbours: Neighbours, index: Index, *, guess: bool = False) -> Neighbours:
        """The neighbours with their votes.

        Args:
            guess: they are no passages, and vote as ``guess`` says.
        """
        import torch

        B, N = neighbours.mask_BN.shape
        votes_BNLE = torch.zeros(B, N, *self.affinity_PLE.shape[1:])
        if guess:
            votes_BNLE[neighbours.mask_BN] = self.guess(neighbours.embeddings_BNR[neighbours.mask_BN], index)
            return replace(neighbours, votes_BNLE=votes_BNLE)
        for b, (mask_N, ids) in enumerate(zip(neighbours.mask_BN, neighbours.passage_ids, strict=True)):
            votes_BNLE[b, mask_N] = torch.from_numpy(self.votes(index.rows(ids)))
        return replace(neighbours, votes_BNLE=votes_BNLE)

    def save(self, index: Index) -> Path:
        """Write it beside the index's embeddings, whole or not at all; returns the file."""
        path = memory_path(index, self.bundle)
        _write(path, self)
        return path


def memory_path(index: Index, bundle: str) -> Path:
    """Where the memory of a bundle (by its digest) lies, whether or not it exists."""
    return _path(index.folder, bundle, index.digest)


def read_memory(index: Index, bundle: str) -> ExpertMemory | None:
    """What was recorded with a bundle (by its digest) for this very index; None where nothing was.

    Raises:
        IndexFolderError: the file is damaged.
    """
    # Earlier versions named the bundle alone.
    for path in (memory_path(index, bundle), index.folder / FOLDER / f"{bundle[:16]}.safetensors"):
        memory = _read(path) if path.is_file() else None
        if memory is not None and memory.bundle == bundle and memory.index == index.digest:
            return memory
    return None


def recorded_with(known: Sequence[OldIndex]) -> list[tuple[int, ExpertMemory]]:
    """All that is recorded with some indexes, each with the number of rows before its own.

    Raises:
        IndexFolderError: a file is damaged.
    """
    found, first = [], 0
    for old in known:
        for path in sorted((old.folder / FOLDER).glob("*.safetensors")):
            memory = _read(path)
            if memory.index == old.manifest.digest:
                found.append((first, memory))
        first += old.manifest.passages
    return found


def carry_over(
    folder: Path,
    digest: str,
    recorded: Sequence[tuple[int, ExpertMemory]],
    origins: Sequence[NDArray[np.int64]],
    shared: Sequence[tuple[int, int]] = (),
) -> None:
    """Write what was recorded anew for an index whose rows are others'; it counts once that index is in force.

    A passage that stays keeps what was recorded of it, and of a new one nothing is recorded. Of one that two indexes
    held it is the mean of both, weighed by the questions that were asked about it in each.

    Args:
        digest: of the new index.
        recorded: what `recorded_with` found.
        origins: for each new row the old one, -1 where there is none; in pieces.
        shared: old rows that are the same passage, the one in ``origins`` first.
    """
    if not recorded:
        return
    at_P = np.concatenate(origins)
    ends = [first + len(memory.questions_P) for first, memory in recorded]
    # The new row of each old one, -1 where it goes.
    place = np.full(max(at_P.max() + 1, *ends, *(other + 1 for _, other in shared)), -1)
    place[at_P[at_P >= 0]] = np.flatnonzero(at_P >= 0)
    for taken, other in shared:
        place[other] = place[taken]
    for bundle in dict.fromkeys(memory.bundle for _, memory in recorded):
        # All of one bundle have its experts and layers.
        parts = [(first, memory) for first, memory in recorded if memory.bundle == bundle]
        affinity_PLE = np.zeros((len(at_P), *parts[0][1].affinity_PLE.shape[1:]), dtype=np.float16)
        questions_P = np.zeros(len(at_P), dtype=np.int32)
        for first, memory in parts:
            place_O = place[first : first + len(memory.questions_P)]
            old = np.flatnonzero(place_O >= 0)
            new, asked = place_O[old], memory.questions_P[old]
            total = questions_P[new] + asked
            share = np.divide(asked, total, out=np.ones(len(old)), where=total > 0).astype(np.float32)[:, None, None]
            affinity_PLE[new] = share * memory.affinity_PLE[old] + (1 - share) * affinity_PLE[new]
            questions_P[new] = total
        moved = replace(parts[0][1], affinity_PLE=affinity_PLE, questions_P=questions_P, index=digest)
        _write(_path(folder, bundle, digest), moved)


def _path(folder: Path, bundle: str, index: str) -> Path:
    # The index is named too, so that what is carried over to the next one can lie beside until that is in force.
    return folder / FOLDER / f"{bundle[:16]}-{index[:16]}.safetensors"


def _write(path: Path, memory: ExpertMemory) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    part = path.with_suffix(f".{os.getpid()}.part")
    for place in (path.parent, part):
        refuse_link(place, IndexFolderError)
    about = {
        "bundle": memory.bundle,
        "index": memory.index,
        "expert_ids": json.dumps(memory.expert_ids),
        "layers": json.dumps(memory.layers),
    }
    try:
        path.parent.mkdir(exist_ok=True)
        save_file({"affinity": memory.affinity_PLE, "questions": memory.questions_P}, part, metadata=about)
        share(part)
        manifests.sync(part)
        part.replace(path)
        manifests.sync_folder(path.parent)
    # Of a full disk safetensors says so in an error of its own.
    except (OSError, SafetensorError) as error:
        raise IndexFolderError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> ExpertMemory:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            affinity_PLE, questions_P = file.get_tensor("affinity"), file.get_tensor("questions")
        lists = (json.loads(about["expert_ids"]), json.loads(about["layers"]))
        return ExpertMemory(affinity_PLE, questions_P, *lists, about["bundle"], about["index"])
    except (SafetensorError, KeyError, ValueError) as error:
        folder = path.parent.parent
        again = f"ragmoe index annotate {folder} --model BUNDLE --questions FILE"
        raise IndexFolderError(
            f"{path} is damaged: {error}", hint=f"remove that file, and record it anew: {again}"
        ) from None


def sidecars(folder: Path, digest: str) -> list[Path]:
    """The files of what was recorded with the index of this digest."""
    from safetensors import SafetensorError, safe_open

    found = []
    for path in sorted((folder / FOLDER).glob("*.safetensors")):
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("index") == digest:
                found.append(path)
    return found


def forget(folder: Path, digest: str) -> None:
    """Remove what was recorded with an index that stood in a folder before the one of this digest, and what was not
    written to its end.
    """
    kept = sidecars(folder, digest)
    for path in [path for pattern in ("*.safetensors", "*.part") for path in (folder / FOLDER).glob(pattern)]:
        if path not in kept:
            path.unlink(missing_ok=True)


def recall_memory(
    index: Index, names: Sequence[str], expert_ids: Sequence[int], layers: Sequence[int], bundles: Sequence[str]
) -> ExpertMemory:
    """The memory that a model brings to an index.

    It is what was recorded with the newest of the model's own versions that left a memory; passages it says nothing of,
    and those of the domain of an expert that is newer than it, speak for their domain's expert.

    Args:
        names, expert_ids: of the model's experts, in order.
        layers: the model's sparse layers.
        bundles: digests of the versions of the model's bundle, newest first.
    """
    initial = ExpertMemory.of_domains(index, names, expert_ids, layers)
    for bundle in bundles:
        found = read_memory(index, bundle)
        if found is None or found.layers != list(layers):
            continue
        affinity_PLE = np.zeros_like(initial.affinity_PLE)
        for place, expert in enumerate(expert_ids):
            if expert in found.expert_ids:
                affinity_PLE[:, :, place] = found.affinity_PLE[:, :, found.expert_ids.index(expert)]
        if set(found.expert_ids) - set(expert_ids):
            # Of experts that have left, what was said for them goes to those that a passage speaks for besides.
            said_PL1 = affinity_PLE.sum(axis=2, keepdims=True)
            np.divide(affinity_PLE, said_PL1, out=affinity_PLE, where=said_PL1 > 0)
        new = {name for name, expert in zip(names, expert_ids, strict=True) if expert not in found.expert_ids}
        own_P = np.array([domain in new for domain in index.domains]) | (found.questions_P == 0)
        affinity_PLE[own_P] = initial.affinity_PLE[own_P]
        return replace(initial, affinity_PLE=affinity_PLE, questions_P=found.questions_P, bundle=bundle)
    return initial
