"""Split a state dict into what a bundle keeps apart: the base, the gate, and one part an expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ragmoe._errors import BundleError
from ragmoe.bundle._map import expert_tensor


@dataclass(frozen=True)
class Parts:
    """The tensors of each group by their names on disk; together they are the whole state dict.

    Attributes:
        experts: by id; the tensors lack the dimension E.
        fused: names before the split, sorted.
        aliases: names left out, with the name of the tensor whose memory they share.
    """

    base: dict[str, Tensor]
    gate: dict[str, Tensor]
    experts: dict[int, dict[str, Tensor]]
    fused: list[str]
    aliases: dict[str, str]


def count_experts(state_dict: Mapping[str, Tensor], expert_tensors: set[str]) -> int:
    """E, on which the first dimensions of all expert tensors must agree; 0 where there are none.

    Raises:
        BundleError: a name is not in the state dict, or the first dimensions differ.
    """
    _require(state_dict, expert_tensors, "expert_tensors")
    sizes = {name: state_dict[name].shape[0] if state_dict[name].dim() else None for name in sorted(expert_tensors)}
    if len(set(sizes.values())) > 1:
        each = ", ".join(f"'{name}' {tuple(state_dict[name].shape)}" for name in sizes)
        raise BundleError(f"expert tensors disagree in their first dimension, the number of experts: {each}")
    count = next(iter(sizes.values()), 0)
    if count is None or (expert_tensors and count == 0):
        raise BundleError(f"expert tensors need a first dimension of at least 1: {sorted(expert_tensors)[:3]}")
    return count


def split_state(
    state_dict: Mapping[str, Tensor], expert_tensors: set[str], gate_tensors: set[str], ids: Sequence[int]
) -> Parts:
    """Sort the tensors into groups.

    Raises:
        BundleError: a name is not in the state dict or in two groups, or a tensor has no data.
    """
    _require(state_dict, gate_tensors, "gate_tensors")
    if both := sorted(expert_tensors & gate_tensors):
        raise BundleError(f"expert_tensors and gate_tensors share {both}; a tensor belongs to one of them")
    if empty := sorted(name for name, tensor in state_dict.items() if tensor.is_meta):
        raise BundleError(f"tensors without data (on the meta device) cannot be saved: {empty[:5]}")
    aliases = _aliases(state_dict)
    own = {name: tensor for name, tensor in state_dict.items() if name not in aliases}
    fused = sorted(expert_tensors & own.keys())
    parts = Parts(
        base={name: tensor for name, tensor in own.items() if name not in expert_tensors | gate_tensors},
        gate={name: tensor for name, tensor in own.items() if name in gate_tensors},
        experts={id: {expert_tensor(name, id): own[name][at] for name in fused} for at, id in enumerate(ids)},
        fused=fused,
        aliases=aliases,
    )
    taken = state_dict.keys() & {name for tensors in parts.experts.values() for name in tensors}
    if taken:
        raise BundleError(f"these names are needed for the parts of expert tensors: {sorted(taken)[:5]}")
    return parts


def _aliases(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is the same memory, seen the same way, as that of an earlier name."""
    first: dict[tuple, str] = {}
    aliases = {}
    for name, x in state_dict.items():
        if x.numel() == 0 or x.is_meta:
            continue
        place = (x.device, x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype)
        if place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
    return aliases


def _require(state_dict: Mapping[str, Tensor], names: set[str], argument: str) -> None:
    if unknown := sorted(names - state_dict.keys()):
        some = ", ".join(sorted(state_dict)[:5])
        raise BundleError(f"{argument} names {unknown[:5]}, which the state dict has not; it has {some}, ...")
