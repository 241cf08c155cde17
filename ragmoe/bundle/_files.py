"""Files of a bundle: written under another name, flushed to the disk, renamed; read through a memory map."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ragmoe._errors import BundleError
from ragmoe._folders import share

_TEMPORARY = ".writing-"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file so that it is there whole or not at all; return its sha256."""
    temporary = path.with_name(_TEMPORARY + path.name)
    try:
        save_file(_savable(tensors), temporary, metadata={"format": "pt"})
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise BundleError(f"cannot write {path}: {error}") from error
    share(temporary)
    digest = file_digest(temporary)
    _publish(temporary, path)
    return digest


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    temporary = path.with_name(_TEMPORARY + path.name)
    temporary.write_text(text, encoding="utf-8")
    _publish(temporary, path)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed writer left behind; call it under the lock."""
    for path in (*folder.glob(f"{_TEMPORARY}*"), *folder.glob(f"maps/{_TEMPORARY}*")):
        path.unlink()


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Memory-map the tensors of a file, which must be exactly those named.

    Raises:
        BundleError: the file is missing or damaged, or holds other tensors.
    """
    wanted = set(names)
    with _mapped(path) as file:
        found = set(file.keys())
        if found != wanted:
            raise BundleError(_difference(path, wanted, found))
        return {name: file.get_tensor(name) for name in sorted(wanted)}


def pick_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Memory-map some tensors of a file; the rest of it is not looked at.

    Raises:
        BundleError: the file is missing or damaged, or lacks one of them.
    """
    with _mapped(path) as file:
        return {name: file.get_tensor(name) for name in names}


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    """A file that the map lists, open for reading; what goes wrong becomes a ``BundleError``."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing, although the map lists it") from error
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit (so NaN equals itself, and 0 is not -0)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(_bytes(left), _bytes(right))


def _bytes(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _savable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none of which shares memory with another: safetensors refuses those that do."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        x = tensor.detach().cpu().contiguous()
        storage = x.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != x.nbytes:
            x = x.clone()
        seen.add(x.untyped_storage().data_ptr())
        ready[name] = x
    return ready


def _publish(temporary: Path, path: Path) -> None:
    """Flush, rename, flush the folder: after a power cut the name leads to the whole content or to the former one."""
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _difference(path: Path, wanted: set[str], found: set[str]) -> str:
    parts = []
    if missing := sorted(wanted - found):
        parts.append(f"lacks {_some(missing)}")
    if unlisted := sorted(found - wanted):
        parts.append(f"holds {_some(unlisted)}, which the map does not list there")
    return f"{path} is not the file that the map describes: it {' and '.join(parts)}"


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
